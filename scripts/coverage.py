"""Sums the lines that `llvm-cov export --format=lcov` lists: `coverage.py LCOV [--files]`, by floor or by file.

A line counts once, however many functions were made of it, and is covered if any program ran it. Test code is left out:
modules and files below `#[cfg(test)]`.
"""

import collections
import pathlib
import re
import sys

PROJECT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "src"
# From the top down; the files of src itself that are of no floor come last.
FLOORS = ("cli", "csi", "kedro", "fuse", "fs", "image", "dataset", "vineyard")
TEST_MODULE = re.compile(r"^#\[cfg\(test\)\]\n(?:#!?\[[^\n]*\]\n)*(?:pub(?:\([a-z]+\))? )?mod (\w+)( \{|;)", re.MULTILINE)


def test_code():
    """The first line of the tests of each file, and the paths of files that are all test."""
    begins, whole = {}, []
    for path in SOURCE.rglob("*.rs"):
        for found in TEST_MODULE.finditer(text := path.read_text()):
            if found[2] == ";":
                folder = path.parent if path.name in ("lib.rs", "main.rs") else path.with_suffix("")
                whole.append(str(folder / found[1]))
            else:
                # Such a module is the last of its file.
                begins[str(path)] = text.count("\n", 0, found.start()) + 1
    return begins, whole


def lines_of(lcov):
    """By file, whether each line of code was run."""
    begins, whole = test_code()
    files = collections.defaultdict(dict)
    lines = None
    for record in lcov:
        kind, _, value = record.rstrip("\n").partition(":")
        if kind == "SF":
            path = str(pathlib.Path(value))
            is_test = any(path == f"{stem}.rs" or path.startswith(f"{stem}/") for stem in whole)
            lines = files[path] if path.startswith(f"{SOURCE}/") and not is_test else None
            end = begins.get(path, sys.maxsize)
        elif kind == "DA" and lines is not None:
            number, count = map(int, value.split(",")[:2])
            if number < end:
                lines[number] = lines.get(number, False) or count > 0
    return files


def main():
    with open(sys.argv[1]) as lcov:
        files = lines_of(lcov)
    sums = collections.defaultdict(lambda: [0, 0])
    for path, lines in files.items():
        parts = pathlib.Path(path).relative_to(SOURCE).parts
        floor = parts[0].removesuffix(".rs")
        names = [floor if floor in FLOORS else "other", "all of src"]
        for name in names if "--files" not in sys.argv else ["/".join(parts)]:
            sums[name][0] += sum(lines.values())
            sums[name][1] += len(lines)
    order = [*FLOORS, "other", "all of src"]
    for name in sorted(sums, key=lambda name: (order.index(name) if name in order else -1, name)):
        covered, count = sums[name]
        if count:
            print(f"{name:<12} {covered:>6} of {count:>6} lines  {100 * covered / count:5.1f} %")


if __name__ == "__main__":
    main()

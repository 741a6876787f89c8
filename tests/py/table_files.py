"""Writes files of random tables, with pyarrow and polars, and says what is in them.

    table_files.py make FOLDER FIRST LAST [STEP...]

For each seed, files `SEED-KIND.EXTENSION` and beside each `FILE.expected`, an Arrow stream of the table as its own
library reads it, and a line of JSON. The libraries crash on some types: each attempt is named in FOLDER/step before it
is made, and an attempt that is given as STEP is left out. `files` starts this program as often as it takes.
"""

import hashlib
import io
import json
import pathlib
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, field

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

import images
import random_tables as tables


@dataclass
class Made:
    """A file."""

    seed: int
    file: str
    digest: str
    # Columns that pyarrow reads back from a Parquet file that it wrote itself.
    parquet: list[int] = field(default_factory=list)
    # Whether polars wrote it, so that polars must read it.
    polars: bool = False

    def expected(self, folder: pathlib.Path) -> pa.Table:
        return pa.ipc.open_stream((folder / f"{self.file}.expected").read_bytes()).read_all()


def arrow_bytes(table: pa.Table, rng: random.Random) -> bytes:
    """An Arrow file; a stream where dictionaries differ between chunks in a way that a file cannot say."""
    options = {"compression": rng.choice([None, None, "lz4", "zstd"])}
    rows = rng.choice([None, None, 1 + table.num_rows // 3, 1000])
    kinds = [(pa.ipc.new_file, True), (pa.ipc.new_file, False), (pa.ipc.new_stream, False)]
    if rng.random() < 0.2:
        kinds = kinds[::-1]
    for make, unify in kinds:
        out = io.BytesIO()
        options |= {"unify_dictionaries": unify, "emit_dictionary_deltas": rng.random() < 0.3}
        try:
            with make(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
                writer.write_table(table, max_chunksize=rows)
            return out.getvalue()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    raise AssertionError("a table that Arrow cannot write")


def read_arrow(data: bytes) -> pa.Table:
    found = (pa.ipc.open_file if data.startswith(b"ARROW1") else pa.ipc.open_stream)(data).read_all()
    found.validate(full=True)
    return found


def read_parquet(data: bytes) -> pa.Table:
    found = pq.ParquetFile(io.BytesIO(data)).read()
    found.validate(full=True)
    return found


class Maker:
    def __init__(self, folder: pathlib.Path, left_out: set[str]):
        self.folder = folder
        self.left_out = left_out

    def step(self, name: str) -> bool:
        """Whether an attempt is to be made."""
        (self.folder / "step").write_text(name)
        return name not in self.left_out

    def keep(self, made: Made, data: bytes, expected: pa.Table):
        (self.folder / made.file).write_bytes(data)
        with pa.ipc.new_stream(str(self.folder / f"{made.file}.expected"), expected.schema) as writer:
            writer.write_table(expected)
        made.digest = hashlib.sha256(data).hexdigest()
        made.parquet = [i for i in range(expected.num_columns) if self.step(f"{made.file}/own/{i}") and self.own_parquet(expected.select([i]))]
        print(json.dumps(asdict(made)), flush=True)

    def own_parquet(self, table: pa.Table) -> bool:
        out = io.BytesIO()
        try:
            pq.write_table(table, out)
            return tables.difference(read_parquet(out.getvalue()), table) is None
        except (pa.ArrowException, NotImplementedError, OSError, IndexError):
            return False

    def parquet(self, file: str, table: pa.Table, rng: random.Random):
        """A Parquet file of the columns that pyarrow writes and reads back."""
        options = {
            "compression": rng.choice(["none", "snappy", "zstd", "gzip", "brotli", "lz4"]),
            "use_dictionary": rng.random() < 0.5,
            "version": rng.choice(["1.0", "2.4", "2.6"]),
            "data_page_version": rng.choice(["1.0", "2.0"]),
            "row_group_size": rng.choice([None, 1 + table.num_rows // 2, 7]),
            "data_page_size": rng.choice([None, 64]),
            "store_schema": rng.random() < 0.8,
            "use_compliant_nested_type": rng.random() < 0.8,
        }

        def attempt(name: str, table: pa.Table) -> tuple[bytes, pa.Table] | None:
            if not self.step(f"{file}/{name}"):
                return None
            out = io.BytesIO()
            try:
                pq.write_table(table, out, **options)
                return out.getvalue(), read_parquet(out.getvalue())
            except (pa.ArrowException, NotImplementedError, OSError, IndexError):
                return None

        kept = [i for i in range(table.num_columns) if attempt(str(i), table.select([i]))]
        return attempt("all", table.select(kept)) if kept else None

    def frame(self, file: str, table: pa.Table) -> pl.DataFrame | None:
        """The columns that polars reads and writes."""
        kept = {}
        for i, name in enumerate(table.column_names):
            one = table.select([i])
            if name in kept or not images.polars_reads(one.schema) or "extension" in str(one.schema):
                continue
            if not self.step(f"{file}/{i}"):
                continue
            try:
                series = pl.from_arrow(one).to_series()
                frame = pl.DataFrame([series])
                for write, read in ((pl.DataFrame.write_ipc, pl.read_ipc), (pl.DataFrame.write_parquet, pl.read_parquet)):
                    out = io.BytesIO()
                    write(frame, out)
                    if not read(io.BytesIO(out.getvalue())).equals(frame):
                        raise ValueError("polars reads other values than it wrote")
                    read_arrow(out.getvalue()) if read is pl.read_ipc else read_parquet(out.getvalue())
            except BaseException:  # polars' panics are no Exception
                continue
            kept[name] = series
        return pl.DataFrame(list(kept.values())) if kept else None

    def make(self, seed: int):
        rng = random.Random(seed)
        every = tables.every_type()
        table = tables.table(seed, every[seed % len(every)])
        data = arrow_bytes(table, rng)
        self.keep(Made(seed, f"{seed}-pyarrow.{rng.choice(['arrow', 'feather'])}", ""), data, read_arrow(data))
        file = f"{seed}-parquet.parquet"
        if made := self.parquet(file, table, rng):
            self.keep(Made(seed, file, ""), *made)
        frame = self.frame(f"{seed}-polars", table)
        if frame is None:
            return
        for file, write, read in (
            (f"{seed}-polars.arrow", lambda out: frame.write_ipc(out, compression=rng.choice(["uncompressed", "lz4", "zstd"])), read_arrow),
            (
                f"{seed}-polars_parquet.parquet",
                lambda out: frame.write_parquet(
                    out,
                    compression=rng.choice(["uncompressed", "lz4", "zstd", "snappy", "gzip"]),
                    row_group_size=rng.choice([None, 50]),
                ),
                read_parquet,
            ),
        ):
            if self.step(f"{file}/write"):
                out = io.BytesIO()
                write(out)
                self.keep(Made(seed, file, "", polars=True), out.getvalue(), read(out.getvalue()))


def files(folder: pathlib.Path, first: int, last: int) -> list[Made]:
    """The files of the tables `first..last`."""
    left_out: list[str] = []
    made: list[Made] = []
    while first < last:
        command = [sys.executable, __file__, "make", str(folder), str(first), str(last), *left_out]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=300)
        done = [Made(**json.loads(line)) for line in result.stdout.splitlines()]
        if result.returncode == 0:
            return made + done
        # A negative status is a signal: the library crashed.
        assert result.returncode < 0, result.stderr[-3000:]
        step = (folder / "step").read_text()
        assert step not in left_out
        left_out.append(step)
        crashed = int(step.split("-")[0])
        made += [m for m in done if m.seed < crashed]
        first = crashed
    return made


if __name__ == "__main__":
    maker = Maker(pathlib.Path(sys.argv[2]), set(sys.argv[5:]))
    for seed in range(int(sys.argv[3]), int(sys.argv[4])):
        maker.make(seed)

"""usage: bench NAME [options]. Each benchmark is a module of this folder with `GOALS`-bearing figures and a `run`."""

import argparse
import importlib
import sys

from common import Report, parse_size

BENCHMARKS = ["read", "write", "cluster", "kedro"]


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure the mount against an ordinary tmpfs.")
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--size", type=parse_size, default="1Gi", help="bytes of the large table (default: 1Gi)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement (default: 5)")
    parser.add_argument("--count", type=int, default=10_000, help="datasets or saves of the small ones (default: 10000)")
    parser.add_argument("--names", type=int, default=100_000, help="names of the longest listing (default: 100000)")
    parser.add_argument("--only", default="", help="only the parts whose names contain this")
    arguments = parser.parse_args()
    report = Report(arguments.name, vars(arguments).copy())
    importlib.import_module(f"bench_{arguments.name}").run(report, arguments)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())

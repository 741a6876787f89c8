"""A client that works on a mount and checks every byte: `load.py KIND FOLDER STOP SEED`, until the file STOP exists.

It ends with one line of JSON: how often it worked, what was wrong, and how long its slowest operations took.
"""

import hashlib
import json
import mmap
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pandas as pd

SHARED = ("large.arrow", "small.arrow", "plain.bin")


def prepare(folder):
    """The files that all clients read."""
    folder = pathlib.Path(folder)
    large = pd.DataFrame({"a": np.arange(1_000_000), "b": np.arange(1_000_000) * 0.5})
    large.to_feather(folder / "large.arrow", compression="uncompressed")
    pd.DataFrame({"a": np.arange(1_000)}).to_feather(folder / "small.arrow", compression="uncompressed")
    (folder / "plain.bin").write_bytes(random.Random(1).randbytes(3_000_000))


def start(clients, kinds, folder, stop):
    """Starts a client of each kind, adds it to `clients`, and waits until all work."""
    for seed, kind in enumerate(kinds):
        command = [sys.executable, __file__, kind, str(folder), str(stop), str(seed)]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for client in clients:
        assert client.stdout.readline() == "ready\n", client.stderr.read()


def end(clients, stop):
    """Lets the clients end; what each of them says."""
    stop.touch()
    outcomes = []
    for client in clients:
        out, err = client.communicate(timeout=240)
        assert client.returncode == 0, err[-2000:]
        outcomes.append(json.loads(out))
    return outcomes


class Client:
    def __init__(self, folder, seed):
        self.folder, self.seed, self.done = folder, seed, 0
        self.wrong = []
        self.sums, self.maps = {}, {}
        random.seed(seed)
        for name in SHARED:
            with open(f"{folder}/{name}", "rb") as file:
                copy = file.read()
                self.maps[name] = (mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), copy)
            self.sums[name] = hashlib.sha256(copy).hexdigest()

    def check(self, good, *what):
        if not good:
            self.wrong.append([*what, self.done])

    def read(self):
        for name in SHARED:
            with open(f"{self.folder}/{name}", "rb") as file:
                self.check(hashlib.sha256(file.read()).hexdigest() == self.sums[name], "bytes", name)

    def write(self):
        path = f"{self.folder}/written{self.seed}.arrow"
        frame = pd.DataFrame({"a": np.full(50_000, self.done), "b": np.arange(50_000) * 0.5})
        frame.to_feather(path, compression="uncompressed")
        self.check(pd.read_feather(path).equals(frame), "read back")

    def half(self):
        """A file that stays open for a while, written in pieces."""
        piece = random.randbytes(70_000)
        path = f"{self.folder}/half{self.seed}.bin"
        with open(path, "wb") as file:
            for _ in range(4):
                file.write(piece)
                file.flush()
                time.sleep(0.02)
        with open(path, "rb") as file:
            self.check(file.read() == piece * 4, "half")

    def names(self):
        old, new = f"{self.folder}/dir{self.seed}", f"{self.folder}/other{self.seed}"
        below = f"{new}/x.txt"
        # Lengths of all sizes from the start, also of files that are kept as images: the load itself must not grow.
        text = "x" * (self.done * 7919 % 100_003)
        os.mkdir(old)
        os.rename(old, new)
        with open(below, "w") as file:
            file.write(text)
        self.check(os.listdir(new) == ["x.txt"] and os.stat(below).st_size == len(text), "names")
        os.unlink(below)
        os.rmdir(new)

    def mapped(self):
        for name, (mapped, copy) in self.maps.items():
            for _ in range(50):
                at = random.randrange(len(copy))
                self.check(mapped[at : at + 100] == copy[at : at + 100], "map", name)
        time.sleep(0.001)


def main():
    kind, folder, stop, seed = sys.argv[1:]
    client = Client(folder, int(seed))
    times = []
    print("ready", flush=True)
    while not os.path.exists(stop):
        start = time.monotonic()
        try:
            getattr(client, kind)()
        except Exception as error:
            client.wrong.append(["error", type(error).__name__, str(error), client.done])
        times.append((start, time.monotonic() - start))
        client.done += 1
        if len(times) > 200_000:
            times = sorted(times, key=lambda each: -each[1])[:2000]
    slow = sorted(times, key=lambda each: -each[1])[:2000]
    print(json.dumps({"kind": kind, "done": client.done, "wrong": client.wrong[:20], "slow": slow}), flush=True)
    # All is said. On a busy machine pyarrow's threads now and then abort the process when the interpreter ends.
    os._exit(0)


if __name__ == "__main__":
    main()

"""usage: soak [MINUTES] [--kills]

Readers, writers, half-written files, names and memory maps, and the official client beside them, for MINUTES (10). Prints
memory, descriptors and blobs every ten seconds, and fails if they grow or a byte is wrong. With --kills the server is
killed every ten seconds, too.
"""

import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/py"))
import conftest
import load
import numpy as np

KINDS = ["read", "read", "write", "write", "half", "names", "mapped"]
STEP = 10
# What a figure may grow by between the first and the last third.
SLACK = {
    "server_anon_mib": 24, "keeper_anon_mib": 4, "server_fds": 24, "keeper_fds": 24, "server_threads": 16,
    "images_mib": 64, "staging_mib": 64, "store_mib": 16,
}


def field(pid: int, name: str) -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return 0


def sample(mount, store) -> dict:
    # On a machine that does other things, too, the server may take longer than `status` waits.
    patience = time.monotonic() + 30
    while (status := mount.status())["state"] != "ok" and time.monotonic() < patience:
        time.sleep(0.5)
    keeper, server = status["keeper"]["pid"], status["server"]["pid"]
    return {
        "server_anon_mib": field(server, "RssAnon") / 1024,
        "keeper_anon_mib": field(keeper, "RssAnon") / 1024,
        "server_fds": len(os.listdir(f"/proc/{server}/fd")),
        "keeper_fds": len(os.listdir(f"/proc/{keeper}/fd")),
        "server_threads": field(server, "Threads"),
        "images_mib": status["files"]["images"]["bytes"] / 2**20,
        "staging_mib": status["fs"]["staging"]["bytes"] / 2**20,
        "store_mib": store.usage() / 2**20,
    }


def main():
    minutes = float(next((a for a in sys.argv[1:] if not a.startswith("-")), "10"))
    kills = "--kills" in sys.argv
    with tempfile.TemporaryDirectory(prefix="vfs-") as folder:
        folder = pathlib.Path(folder)
        store = conftest.Store(folder, "2Gi")
        mount = conftest.Mount(folder / "mnt", store)
        clients, samples = [], []
        try:
            load.prepare(mount.path)
            stop = folder / "stop"
            load.start(clients, KINDS, mount.path, stop)
            end, turn = time.monotonic() + minutes * 60, 0
            while time.monotonic() < end:
                next_step = time.monotonic() + STEP
                while time.monotonic() < next_step:
                    store.put("official", np.full(100_000, turn))
                    (mount / "official.npy").read_bytes()
                    store.client.delete(store.client.get_name("official"))
                    store.client.drop_name("official")
                    turn += 1
                    time.sleep(0.2)
                samples.append(sample(mount, store))
                print("  ".join(f"{name} {value:.0f}" for name, value in samples[-1].items()), flush=True)
                if kills:
                    os.kill(mount.status()["server"]["pid"], signal.SIGKILL)
                    time.sleep(1)
            outcomes = load.end(clients, stop)
            restarts = mount.status()["server"]["restarts"]
        finally:
            for client in clients:
                client.kill()
            mount.unmount()
            store.stop()
    wrong = [outcome["wrong"] for outcome in outcomes if outcome["wrong"]]
    print(f"operations: {({o['kind'] + str(i): o['done'] for i, o in enumerate(outcomes)})}; restarts {restarts}")
    third = max(len(samples) // 3, 1)
    for name, slack in SLACK.items():
        first = statistics.median(s[name] for s in samples[:third])
        last = statistics.median(s[name] for s in samples[-third:])
        print(f"{name}: {first:.0f} in the first third, {last:.0f} in the last")
        if last > first + slack:
            wrong.append(f"{name} grows: {first:.0f} to {last:.0f}")
    if restarts and not kills:
        wrong.append(f"{restarts} restarts")
    if wrong:
        sys.exit(f"soak: {wrong}")
    print("soak: flat, and every byte right")


if __name__ == "__main__":
    main()

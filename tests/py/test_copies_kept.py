"""What a copy is for: it keeps its bytes, stands for a dataset whose instance is lost, and nothing of it is left over."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from cluster import Cluster
from conftest import BINARY, cli, freeze, settled, told_left_over, until
from test_clock import clock  # noqa: F401
from test_copies import sha, told, unnoticed, where


def begin(instance, *arguments):
    command = [str(BINARY), *arguments, "--socket", instance.socket]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_full_instance_gives_up_no_bytes_of_copies(folder):
    cluster = Cluster(folder, 2, memory="64Mi")
    try:
        here = cluster.mount(0)
        integers = np.random.default_rng(1).integers(0, 1 << 40, (250_000, 5))
        frame = pd.DataFrame(integers, columns=list("abcde"))
        frame.to_feather(here / "x.feather", compression="lz4")
        frame.to_parquet(here / "p.parquet")
        before = {name: sha(here / name) for name in ["x.feather", "p.parquet"]}
        cli("pin", "x", "p", "--socket", cluster[1].socket)
        there = cluster.mount(1)
        with pytest.raises(OSError):
            for number in range(30):
                (there / f"big{number}.bin").write_bytes(os.urandom(4 << 20))
        assert {name: sha(cluster.mount(1) / name) for name in before} == before
    finally:
        cluster.stop()


def test_an_instance_that_starts_again_on_its_port_hides_no_other(cluster):
    cluster[0].put("theirs", pa.table({"s": ["a", "b"]}))
    cluster[1].put("mine", np.arange(5.0))
    mount = cluster.mount(1, "--deadline", "5s")
    assert until(lambda: sorted(os.listdir(mount.path)) == ["mine.npy", "theirs.arrow"])
    cluster[0].kill()
    cluster[0].start()
    fresh = cluster.mount(1, "--deadline", "5s")
    assert "mine.npy" in os.listdir(mount.path)
    assert sorted(os.listdir(fresh.path)) == ["mine.npy", "theirs"]
    assert [entry["state"] for entry in told(cluster[1], "ls")][0] == "ok"
    assert "mine.npy" in cli("ls", "-l", "--socket", cluster[1].socket).stdout
    assert told(cluster[1], "info", "theirs")["state"] in ("away", "dangling")


def test_commands_go_on_with_a_copy(three, folder):
    for name in ["x", "y", "z"]:
        three[0].put(name, np.arange(10_000.0))
        cli("pin", name, "--socket", three[1].socket)
    freeze(three[0].process.pid)
    assert "is now on instance i1" in cli("migrate", "x", "--socket", three[1].socket, timeout=100).stdout
    assert where(three[1], "x") == 1
    cli("get", "y", "-o", folder / "y.npy", "--socket", three[2].socket, timeout=100)
    assert np.array_equal(np.load(folder / "y.npy"), np.arange(10_000.0))
    three[0].kill()

    def kinds():
        return {entry["name"]: entry["kind"] for entry in told(three[1], "gc", "-n")}

    assert until(lambda: kinds() == {"y": "orphaned", "z": "orphaned"}, seconds=240)
    cli("get", "y", "-o", folder / "y.npy", "-f", "--socket", three[2].socket)
    assert np.array_equal(np.load(folder / "y.npy"), np.arange(10_000.0))
    assert "has a copy on instance i2" in cli("pin", "y", "--socket", three[2].socket).stdout
    assert "removed the copy" in cli("pin", "--drop", "y", "--socket", three[1].socket).stdout
    refused = cli("pin", "--drop", "y", "--socket", three[2].socket, check=False)
    assert refused.returncode == 1 and "all that is left" in refused.stderr and "vineyard-fs gc" in refused.stderr
    assert "is now on instance i1" in cli("migrate", "z", "--socket", three[1].socket).stdout
    cli("gc", "--socket", three[1].socket)
    assert {name: where(three[1], name) for name in ["x", "y", "z"]} == {"x": 1, "y": 2, "z": 1}
    assert unnoticed(three[1]) == []


@pytest.mark.parametrize("serve", ["lazy", "auto"])
def test_a_reader_goes_on_when_its_copy_goes_or_the_dataset_moves(three, serve):
    values = np.arange(4_000_000.0)
    three[0].put("x", values)
    cli("pin", "x", "--socket", three[1].socket)

    def rest(file, at):
        file.seek(at)
        return file.read(1 << 20)

    for instance, command in [
        (1, ["pin", "--drop", "x", "--socket", three[1].socket]),
        (2, ["migrate", "x", "--to", "1", "--socket", three[2].socket]),
        (1, ["migrate", "x", "--to", "0", "--socket", three[2].socket]),
    ]:
        mount = three.mount(instance, "--serve", serve)
        with open(mount / "x.npy", "rb", buffering=0) as file:
            whole = file.read(128) + values.tobytes()
            cli(*command)
            for at in [10 << 20, 20 << 20]:
                assert rest(file, at) == whole[at : at + (1 << 20)], command
        mount.unmount()


def test_a_migration_to_a_far_instance_ends_when_it_is_told_to(three):
    three[0].put("x", np.arange(1_000_000.0))
    assert until(lambda: told(three[2], "ls"))
    os.rename(three[1].socket, three[1].socket + ".away")
    freeze(three[1].process.pid)
    process = begin(three[2], "migrate", "x", "--to", "i1")
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[0] and process.returncode == 1
    three[1].process.send_signal(signal.SIGCONT)
    freeze(three[0].process.pid)
    process = begin(three[2], "migrate", "x", "--to", "i1")
    assert "did not answer in time" in process.communicate(timeout=100)[0] and process.returncode == 1
    three[0].process.send_signal(signal.SIGCONT)
    os.rename(three[1].socket + ".away", three[1].socket)


def test_of_many_who_move_or_copy_a_dataset_nothing_is_left(three):
    for command, instances in [("migrate", [1, 2]), ("pin", [1, 1, 1])]:
        for number in range(6):
            three[0].put("x", np.arange(1000.0))
            processes = [begin(three[i], command, "x") for i in instances]
            outputs = [process.communicate(timeout=60)[0] for process in processes]
            assert any(process.returncode == 0 for process in processes), outputs
            cli("rm", "x", "--socket", three[0].socket)
            settled(lambda: [instance.usage() for instance in three.instances], [0, 0, 0])
            assert unnoticed(three[0]) == [], (command, outputs)


@pytest.mark.parametrize("command", ["pin", "migrate"])
def test_what_a_killed_command_has_left_is_removed(cluster, command):
    cluster[0].put("x", np.arange(8_000_000.0))
    assert until(lambda: told(cluster[1], "ls"))
    for tenth in range(4):
        process = begin(cluster[1], command, "x")
        time.sleep(0.05 + 0.05 * tenth)
        process.kill()
        process.communicate()
        if where(cluster[0], "x") == 1:
            cli("migrate", "x", "--to", "0", "--socket", cluster[1].socket)
        cli("pin", "--drop", "x", "--socket", cluster[1].socket)
    left = told_left_over(cli("gc", "--socket", cluster[1].socket).stderr)
    settled(cluster[1].usage, left)
    assert np.array_equal(cluster[0].client.get(name="x"), np.arange(8_000_000.0)) and unnoticed(cluster[0]) == []


def told_of(socket, *arguments):
    return json.loads(cli(*arguments, "--json", "--socket", socket).stdout)


def test_gc_finds_what_killed_commands_have_left_by_whatever_path_they_came(store, folder):
    size = 32 << 20
    (folder / "b.bin").write_bytes(os.urandom(size))
    (folder / "elsewhere").mkdir()
    link = folder / "elsewhere" / "link.sock"
    os.symlink(store.socket, link)
    for came, asked in [(link, store.socket), (store.socket, link), (link, link)]:
        command = [BINARY, "put", folder / "b.bin", "x.bin", "--socket", came]
        for _ in range(20):
            before = store.usage()
            process = subprocess.Popen([str(word) for word in command])
            while store.usage() == before and process.poll() is None:
                pass
            process.kill()
            process.wait()
            if told_of(asked, "ls") != []:
                # It was faster.
                cli("rm", "x.bin", "--socket", asked)
                continue
            assert store.usage() >= before + size
            left = told_of(asked, "gc", "--dry-run")
            assert [entry["kind"] for entry in left] == ["left"] and store.usage() >= before + size
            cleaned = cli("gc", "--json", "--socket", asked)
            assert [entry["kind"] for entry in json.loads(cleaned.stdout)] == ["left"]
            # Killed before it heard of its blobs: nobody can tell them from another client's, and gc says so.
            early = told_left_over(cleaned.stderr)
            assert store.usage() == before + early, cleaned.stderr
            assert told_of(asked, "gc", "--dry-run") == []
            if early == 0:
                break
        else:
            pytest.fail("each was killed too early, or too late")


def test_gc_finds_copies_that_nothing_leads_to(cluster, clock):
    import vineyard

    def copy_of(source):
        meta = vineyard.ObjectMeta()
        meta["typename"], meta["vineyard_fs_copy_of_"] = "vineyard::Tensor<double>", repr(source)
        made = cluster[0].client.create_metadata(meta)
        cluster[0].client.persist(made.id)
        return repr(made.id)

    source = cluster[0].put("x", np.arange(10.0))
    left, replaced = copy_of(source), copy_of(vineyard.ObjectID("o0000000000000123"))
    found = ["gc", "--json", "--socket", cluster[0].socket]
    assert json.loads(cli(*found).stdout) == [], "somebody may be about to name it"
    clock.set(3600)
    later = {"env": {**os.environ, **clock.env}}
    listed = json.loads(cli(*found, "--dry-run", **later).stdout)
    assert [(entry["kind"], entry["id"], entry["copy"]["id"]) for entry in listed] == [("unknown", repr(source), left)]
    assert len(json.loads(cli(*found, **later).stdout)) == 1 and json.loads(cli(*found, **later).stdout) == []
    assert cluster[0].client.exists(vineyard.ObjectID(replaced)) and not cluster[0].client.exists(vineyard.ObjectID(left))
    assert np.array_equal(cluster[0].client.get(name="x"), np.arange(10.0))


def test_gc_tells_of_saves_that_may_be_under_way(cluster):
    object_id = cluster[0].put("temporary", np.arange(10.0))
    cluster[0].client.put_name(object_id, f".vineyard-fs/saves/0000000000000000/{object_id!r}")
    cluster[0].client.drop_name("temporary")
    text = cli("gc", "--socket", cluster[0].socket).stdout
    assert "1 save is under way or unfinished" in text and "10 minutes" in text
    assert cluster[0].usage() == 80

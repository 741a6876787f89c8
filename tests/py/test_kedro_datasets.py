"""Kedro's own datasets save to the mount and load from it. Needs an environment with Kedro, which
`scripts/setup --kedro` makes; VINEYARD_FS_KEDRO_VENVS names the folder with it."""

import os
import pathlib
import subprocess

import pytest

VENVS = os.environ.get("VINEYARD_FS_KEDRO_VENVS")
SCRIPT = pathlib.Path(__file__).with_name("kedro_saves.py")


@pytest.mark.skipif(VENVS is None, reason="VINEYARD_FS_KEDRO_VENVS names no folder: scripts/test --full does")
def test_kedro_datasets_come_back_equal(make_mount, serving, tmp_path):
    def run(what, folder):
        python = pathlib.Path(VENVS) / "kedro1" / "bin" / "python"
        result = subprocess.run([python, SCRIPT, what, folder], capture_output=True, text=True, timeout=280, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr[-3000:]
        return result.stdout.count("equal")

    # What a local disk does not bring back either is no test of the mount.
    local = tmp_path / "local"
    local.mkdir()
    count = run("save", local)
    mount = make_mount(*serving)
    assert run("save", mount.path) == count
    second = make_mount(name="second")
    assert run("load", second.path) == count
    print(f"{count} datasets")

"""What stores tables and arrays as files, and has never heard of vineyard, works on the mount: Spark, dask, Delta Lake,
Iceberg, Zarr, HDF5, LMDB and others. They are large: `scripts/setup --libraries` makes an environment with them, and
VINEYARD_FS_LIBRARIES names its Python."""

import os
import pathlib
import subprocess

import pytest

PYTHON = os.environ.get("VINEYARD_FS_LIBRARIES")
SCRIPT = pathlib.Path(__file__).with_name("libraries.py")


@pytest.mark.skipif(PYTHON is None, reason="VINEYARD_FS_LIBRARIES names no Python: scripts/test --full does")
@pytest.mark.parametrize("name", ["spark", "dask", "fastparquet", "delta", "iceberg", "zarr", "hdf5", "memory_maps", "excel"])
def test_a_library_gets_back_what_it_stored(make_mount, serving, tmp_path, name):
    mount = make_mount(*serving)
    folder = mount / "project/data"
    folder.mkdir(parents=True)
    result = subprocess.run([PYTHON, SCRIPT, name, folder], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.endswith("every value came back\n")
    # And a mount that knows nothing of it shows the same files.
    second = make_mount(name="second")
    listed = {path.relative_to(mount.path) for path in mount.path.rglob("*") if path.is_file()}
    assert listed == {path.relative_to(second.path) for path in second.path.rglob("*") if path.is_file()}
    for path in sorted(listed)[:50]:
        assert (mount / path).read_bytes() == (second / path).read_bytes(), path

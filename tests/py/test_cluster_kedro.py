"""A Kedro pipeline, each node in a process of its own on a mount of another instance.

`VINEYARD_FS_KEDRO_VENVS` names the folder with the environments `kedro018`, `kedro019`, `kedro1` (`scripts/setup --kedro`).
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
from cluster import Cluster
from conftest import PROJECT, cli

VENVS = pathlib.Path(os.environ.get("VINEYARD_FS_KEDRO_VENVS", PROJECT / ".venv-kedro"))


@pytest.mark.parametrize("environment", ["kedro018", "kedro019", "kedro1"])
def test_iris_node_by_node_on_different_instances(folder, environment):
    bin = VENVS / environment / "bin"
    if not bin.exists():
        pytest.skip(f"no environment {bin}: scripts/setup --kedro makes it")
    project = folder / "iris"
    shutil.copytree(PROJECT / "tests/kedro/iris", project)
    version = subprocess.run([bin / "python", "-c", "import kedro; print(kedro.__version__)"], capture_output=True, text=True)
    settings = project / "pyproject.toml"
    settings.write_text(settings.read_text().replace("@KEDRO_VERSION@", version.stdout.strip()))
    subprocess.run([bin / "python", "make_data.py"], cwd=project, check=True, capture_output=True)
    variables = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "VIRTUAL_ENV": str(bin.parent)}
    variables |= {"KEDRO_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

    def accuracy(*arguments):
        command = [bin / "kedro", "run", *arguments]
        result = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        return re.findall(r"accuracy of ([0-9.]+)", result.stdout + result.stderr)

    [alone] = accuracy()
    cluster = Cluster(folder, 3)
    try:
        # Each node of Kubernetes has its own mount at the same place; here the place is a link that moves.
        mounts = [cluster.mount(number) for number in range(3)]
        place = folder / "vineyard"
        place.symlink_to(mounts[0].path)
        cli("kedro", "catalog", "create", "--mount", place, cwd=project, env=variables)
        found = []
        for number, node in enumerate(["split", "make_predictions", "report_accuracy"]):
            place.unlink()
            place.symlink_to(mounts[number].path)
            option = "--node" if environment == "kedro018" else "--nodes"
            found += accuracy("--env", "vineyard", f"{option}={node}")
        assert found == [alone]
        moved = [mount.status()["fs"]["remote"]["bytes"] for mount in mounts]
        print(f"{environment}: accuracy {alone}, bytes moved to each instance: {moved}")
        assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0
        homes = {name: cluster[0].client.get_meta(identity, True).instance_id
                 for name, identity in cluster[0].client.list_names("*", limit=100).items()}
        assert homes["X_train"] == 0 and {instance for name, instance in homes.items() if "y_pred" in name} == {1}
    finally:
        cluster.stop()

"""Lets `python -m iris` run the project."""

from pathlib import Path

from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession

if __name__ == "__main__":
    configure_project(Path(__file__).parent.name)
    with KedroSession.create(project_path=Path.cwd()) as session:
        session.run()

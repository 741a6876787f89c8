"""The project's pipelines."""

from iris.pipelines import iris, mixed


def register_pipelines():
    return {"__default__": iris.create_pipeline(), "mixed": mixed.create_pipeline()}

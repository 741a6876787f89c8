# Goes on where introspect.py ends: one program with it. What is tried out: building entries, and a run.

import tempfile


# Building entries ----------------------------------------------------------------------------------------------------

# What a dataset class imports only when it saves; building it would not show that it is missing.
NEEDED = [
    (r"^pandas\.(Feather|Parquet)", ["pandas", "pyarrow"]),
    (r"^pandas\.", ["pandas"]),
    (r"^polars\.", ["polars"]),
    (r"^ibis\.", ["ibis", "duckdb"]),
]
PACKAGES = {"ibis": "ibis-framework[duckdb]", "duckdb": "ibis-framework[duckdb]"}


def class_of_kedro(name):
    """`kedro.io` spelt `DataSet` what it calls `Dataset` since 0.18.12."""
    import kedro.io

    return getattr(kedro.io, name, None) or getattr(kedro.io, name.replace("Dataset", "DataSet"))


def check(project, request):
    """Builds each entry as Kedro will, and imports what it needs to save; what fails, and the packages to install."""
    import importlib

    imported = {}

    def usable(module):
        if module not in imported:
            try:
                importlib.import_module(module)
                imported[module] = None
            except ModuleNotFoundError as error:
                imported[module] = ("missing", one_line(error))
            except Exception as error:  # installed, but not fit for the rest: pyarrow built for another numpy
                imported[module] = ("broken", one_line(error))
        return imported[module]

    AbstractDataset = class_of_kedro("AbstractDataset")
    failures = {}
    for name, config in request["entries"].items():
        missing, error = [], None
        if version("kedro-datasets") is None and project.number >= (0, 19):
            missing.append("kedro-datasets")
        for pattern, modules in NEEDED:
            if re.match(pattern, config["type"]):
                for module in modules:
                    problem = usable(module)
                    if problem:
                        missing.append(PACKAGES.get(module, module))
                        error = problem[1] if problem[0] == "broken" else error
                break
        if not missing:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    AbstractDataset.from_config(name, json.loads(json.dumps(config)))
            except Exception as problem:
                cause, error = problem, one_line(problem)
                while cause is not None:
                    if isinstance(cause, ModuleNotFoundError) and cause.name:
                        missing.append(cause.name.split(".")[0].replace("kedro_datasets", "kedro-datasets"))
                        break
                    cause = cause.__cause__ or cause.__context__
        if missing or error:
            failures[name] = {"missing": sorted(set(missing)), "error": error}
    return {"failures": failures}


# Watching a run ------------------------------------------------------------------------------------------------------


class Nowhere(io.RawIOBase):
    """Takes what a pickler writes and keeps nothing."""

    def writable(self):
        return True

    def write(self, data):
        return len(data)


def survives(data, write, read):
    """Whether a frame comes back equal from its file format; None, or the reason why not."""
    import pandas

    sample = data
    if data.memory_usage(deep=False).sum() > 256 << 20:
        sample = data.head(100000)
    try:
        buffer = io.BytesIO()
        write(sample, buffer)
        buffer.seek(0)
        pandas.testing.assert_frame_equal(read(buffer), sample, check_freq=False)
    except Exception as error:
        return one_line(error)[:200]
    return None


def picklable(data):
    import pickle

    try:
        pickle.Pickler(Nowhere(), 5 if sys.version_info >= (3, 8) else 4).dump(data)
        return None
    except Exception as error:
        return one_line(error)[:200]


def observed(data):
    name = type_name(type(data))
    found = {"type": name, "feather": None, "parquet": None, "pickle": None, "chunks": False}
    if name == "pandas.DataFrame":
        import pandas

        found["feather"] = survives(data, lambda frame, file: frame.to_feather(file), pandas.read_feather)
        if found["feather"] or numbers(pandas.__version__) < (2, 1):
            found["parquet"] = survives(data, lambda frame, file: frame.to_parquet(file), pandas.read_parquet)
    elif name == "polars.DataFrame":
        try:
            import polars

            buffer = io.BytesIO()
            data.write_ipc(buffer)
            buffer.seek(0)
            found["feather"] = None if polars.read_ipc(buffer).equals(data) else "comes back different"
        except Exception as error:
            found["feather"] = one_line(error)[:200]
    if name not in ("pandas.DataFrame", "polars.DataFrame") or found["feather"]:
        found["pickle"] = picklable(data)
    return found


def stand_in(name, config, folder):
    """The dataset that takes a node's output in place of the user's: one in memory.

    Where an output is read in another form than it was saved (transcodings, partitions) memory cannot take its place:
    there it is the user's dataset, with its files in a temporary folder.
    """
    key = "path" if "path" in config else "filepath"
    location = config.get(key)
    if isinstance(location, str) and ("@" in name or key == "path"):
        config = {part: value for part, value in config.items() if part != "credentials"}
        place = os.path.join(folder, re.sub(r"\W", "_", location))
        config[key] = os.path.join(place, os.path.basename(location) or "data")
        opening = config.pop("fs_args", None) or {}
        if isinstance(opening, dict):
            # The rest of them is about the file system that is not used.
            config["fs_args"] = {part: value for part, value in opening.items() if part.startswith("open_args")}
        if not config.get("fs_args"):
            config.pop("fs_args", None)
        try:
            os.makedirs(place, exist_ok=True)
            return class_of_kedro("AbstractDataset").from_config(name, config)
        except Exception as error:
            print("%s stays in memory: %s" % (name, one_line(error)))
    return class_of_kedro("MemoryDataset")()


def keep_from_files(project, pipeline, catalog, config, folder):
    """Puts something else in place of every dataset that a node makes, so that a run changes nothing of the user's."""
    # What a node confirms would be written into a file beside its input. Runners work with copies of this catalog.
    type(catalog).confirm = lambda self, name: None
    made = {strip(name) for node in pipeline.nodes for name in node.outputs}
    for name in pipeline.datasets() if hasattr(pipeline, "datasets") else pipeline.data_sets():
        if strip(name) not in made or is_parameter(name):
            continue
        known = configuration(name, config, project.factories)
        dataset = stand_in(name, (known and known[1]) or {}, folder)
        if hasattr(catalog, "add"):
            catalog.add(name, dataset, replace=True)
        else:
            catalog[name] = dataset


def observe(project, request):
    from collections.abc import Iterator
    from kedro.framework.hooks import hook_impl
    from kedro.runner import SequentialRunner

    name = request["pipeline"]
    pipeline = project.pipeline(name)
    seen, chunks = {}, set()
    with tempfile.TemporaryDirectory(prefix="vineyard-fs-observe-") as folder:

        class Watch:
            # After the project's own hooks, which may add datasets.
            @hook_impl(trylast=True)
            def after_catalog_created(self, catalog, conf_catalog):
                keep_from_files(project, pipeline, catalog, conf_catalog or {}, folder)

            @hook_impl
            def after_node_run(self, node, outputs):
                # Kedro takes the values one by one if all outputs are iterators; since 1.0 only those of generators.
                if project.number >= (1,) and not inspect.isgeneratorfunction(node.func):
                    return
                if outputs and all(isinstance(output, Iterator) for output in outputs.values()):
                    chunks.update(outputs)

            @hook_impl
            def after_dataset_saved(self, dataset_name, data):
                if dataset_name not in seen:
                    seen[dataset_name] = observed(data)
                seen[dataset_name]["chunks"] = dataset_name in chunks

        try:
            session = project.session(request.get("env"))
            with session:
                session._hook_manager.register(Watch())
                session.run(pipeline_name=name, runner=SequentialRunner())
        except (SystemExit, Exception) as error:
            raise Refused(
                "run", "the pipeline %r fails in memory: %s%s" % (name, one_line(error), where(error, project.root))
            ) from error
    return {"observed": seen}


def loads(project, request):
    """Whether the project's configuration reads a file of this name, below an environment's folder, as catalog."""
    marker = "vineyard_fs_marker"
    with tempfile.TemporaryDirectory(prefix="vineyard-fs-") as folder:
        for env in (project.base_env, request["env"]):
            os.makedirs(os.path.join(folder, env), exist_ok=True)
        file = os.path.join(folder, request["env"], request["file"])
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "w") as out:
            out.write("%s:\n  type: MemoryDataset\n" % marker)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                arguments = dict(project.settings.CONFIG_LOADER_ARGS or {})
                loader = project.settings.CONFIG_LOADER_CLASS(conf_source=folder, env=request["env"], **arguments)
                return {"loads": marker in loader["catalog"]}
        except Exception as error:
            # Nothing to load is an answer; a loader that wants more than this (0.17's, one of the project's) gives none.
            return {"loads": type(error).__name__ != "MissingConfigException"}


def main():
    project = None
    for line in REQUESTS:
        try:
            request = json.loads(line)
            if project is None:
                project = Project()
            operation = {"introspect": introspect, "check": check, "observe": observe, "loads": loads, "settings": settings}[request["op"]]
            answer = {"ok": operation(project, request)}
        except Refused as error:
            if os.environ.get("VINEYARD_FS_TRACEBACK") and error.__cause__ is not None:
                traceback.print_exception(type(error.__cause__), error.__cause__, error.__cause__.__traceback__)
            answer = {"error": {"kind": error.kind, "message": str(error)}}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": {"kind": "script", "message": one_line(error)}}
        ANSWERS.write(json.dumps(answer, default=str) + "\n")
        ANSWERS.flush()


main()

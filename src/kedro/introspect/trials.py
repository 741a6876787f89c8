# Goes on where introspect.py ends: one program with it. What is tried out: building entries, and a run.

# Building entries ----------------------------------------------------------------------------------------------------

# What a dataset class imports only when it saves; building it would not show that it is missing.
NEEDED = [
    (r"^pandas\.(Feather|Parquet)", ["pandas", "pyarrow"]),
    (r"^pandas\.", ["pandas"]),
    (r"^polars\.", ["polars"]),
    (r"^ibis\.", ["ibis", "duckdb"]),
]
PACKAGES = {"ibis": "ibis-framework[duckdb]", "duckdb": "ibis-framework[duckdb]"}


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

    try:
        from kedro.io import AbstractDataset
    except ImportError:
        from kedro.io import AbstractDataSet as AbstractDataset
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
    found = {"type": name, "feather": None, "parquet": None, "pickle": None, "saves": 1}
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


def observe(project, request):
    from kedro.framework.hooks import hook_impl

    seen = {}

    class Watch:
        @hook_impl
        def after_dataset_saved(self, dataset_name, data):
            if dataset_name in seen:
                seen[dataset_name]["saves"] += 1
            else:
                seen[dataset_name] = observed(data)

    from kedro.runner import SequentialRunner

    name = request["pipeline"]
    project.pipeline(name)
    env = request.get("env")
    try:
        session = project.session(env)
        with session:
            session._hook_manager.register(Watch())
            session.run(pipeline_name=name, runner=SequentialRunner())
    except (SystemExit, Exception) as error:
        raise Refused(
            "run", "the pipeline %r fails in memory: %s%s" % (name, one_line(error), where(error, project.root))
        ) from error
    return {"observed": seen}


def main():
    project = None
    for line in REQUESTS:
        try:
            request = json.loads(line)
            if project is None:
                project = Project()
            operation = {"introspect": introspect, "check": check, "observe": observe}[request["op"]]
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

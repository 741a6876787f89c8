"""Answers questions about a Kedro project, inside the project's own interpreter.

One JSON request a line on the standard input that the process was started with, one JSON answer a line on its
standard output. Both descriptors are moved out of reach before any code of the project runs: what Kedro (its logging
writes to standard output) or a node prints goes to standard error, and what reads standard input sees its end.

Works with Kedro 0.18, 0.19 and 1.x on Python 3.7 and later; 0.17 as far as its interfaces allow. Imports nothing
that the project does not import itself, until `check` or `observe` asks for it.
"""

import inspect
import io
import json
import os
import re
import sys
import traceback
import warnings

os.environ["DO_NOT_TRACK"] = "1"
os.environ["KEDRO_DISABLE_TELEMETRY"] = "1"
REQUESTS = os.fdopen(os.dup(0), "r", encoding="utf-8")
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
_null = os.open(os.devnull, os.O_RDONLY)
os.dup2(_null, 0)
os.close(_null)
os.dup2(2, 1)

try:
    from importlib import metadata
except ImportError:  # Python 3.7
    import importlib_metadata as metadata


class Refused(Exception):
    """An answer that is one line for the user."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


def version(package):
    try:
        return metadata.version(package)
    except Exception:  # whatever a broken installation raises, the package cannot be used
        return None


def numbers(text):
    return tuple(int(part) for part in re.findall(r"\d+", text or "")[:3])


def one_line(error):
    text = " ".join(str(error).split()) or "no message"
    return "%s: %s" % (type(error).__name__, text[:500])


def where(error, root):
    """`file:line` of the innermost frame that belongs to the project."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith("<"):
            continue
        path = os.path.abspath(frame.filename)
        if path.startswith(root + os.sep) and "site-packages" not in path:
            place = " (%s:%s)" % (os.path.relpath(path, root), frame.lineno)
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        place = " (%s:%s)" % (os.path.relpath(error.filename, root), error.lineno)
    return place


class Project:
    def __init__(self):
        self.root = os.getcwd()
        self.kedro = version("kedro")
        if self.kedro is None:
            raise Refused("kedro", "Kedro is not installed for %s" % sys.executable)
        number = numbers(self.kedro)
        if number < (0, 17):
            raise Refused("kedro", "Kedro %s is too old: 0.17 or later is needed" % self.kedro)
        if number >= (2,):
            raise Refused("kedro", "Kedro %s is newer than this program knows: 0.17 to 1.x" % self.kedro)
        self.number = number
        # Kedro knows dataset factories since then.
        self.factories = number >= (0, 18, 12)
        try:
            from kedro.framework.startup import bootstrap_project
            from pathlib import Path

            self.metadata = bootstrap_project(Path(self.root))
        except SystemExit as error:
            raise Refused("project", "the project's settings ended the interpreter: %s" % one_line(error)) from error
        except Exception as error:
            raise Refused(
                "project", "the project does not start: %s%s" % (one_line(error), where(error, self.root))
            ) from error
        from kedro.framework.project import settings

        self.settings = settings
        source = getattr(settings, "CONF_SOURCE", None) or getattr(settings, "CONF_ROOT", None) or "conf"
        self.conf_source = os.path.abspath(os.path.join(self.root, str(source)))
        arguments = getattr(settings, "CONFIG_LOADER_ARGS", None) or {}
        self.base_env = arguments.get("base_env") or "base"
        self.run_env = arguments.get("default_run_env") or "local"
        self.loaded = None
        self.warnings = []

    def pipelines(self):
        if self.loaded is not None:
            return self.loaded
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                from kedro.framework.project import pipelines

                self.loaded = {name: pipelines[name] for name in list(pipelines)}
        except (SystemExit, Exception) as error:
            raise Refused(
                "import", "the project's pipelines do not import: %s%s" % (one_line(error), where(error, self.root))
            ) from error
        for warning in caught:
            # find_pipelines turns the import error of a pipeline into a warning and goes on without it.
            text = str(warning.message)
            if "occurred while importing" in text:
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                last = [line for line in lines if re.match(r"^[\w.]+(Error|Exception|Interrupt)\b", line)]
                self.warnings.append(" ".join([lines[0]] + last[-1:]))
        return self.loaded

    def pipeline(self, name):
        known = self.pipelines()
        if name not in known:
            message = "there is no pipeline %r; the project has %s" % (name, ", ".join(sorted(known)) or "none")
            if self.warnings:
                message += " (%s)" % self.warnings[0]
            raise Refused("pipeline", message)
        if known[name] is None:
            raise Refused("pipeline", "the pipeline %r is empty" % name)
        return known[name]

    def session(self, env):
        from pathlib import Path
        from kedro.framework.session import KedroSession

        if self.number < (0, 18):
            return KedroSession.create(self.metadata.package_name, project_path=Path(self.root), env=env)
        return KedroSession.create(project_path=Path(self.root), env=env)

    def usable_env(self, env):
        """`env` if it has a folder; else the base environment, since Kedro refuses an environment without one."""
        return env if os.path.isdir(os.path.join(self.conf_source, env)) else self.base_env

    def catalog_config(self, env):
        """The catalog's configuration in an environment, interpolated by the project's own loader."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                context = self.session(env).load_context()
                loader = context.config_loader
                try:
                    if self.number < (0, 18):
                        found = loader.get("catalog*", "catalog*/**", "**/catalog*")
                    else:
                        found = loader["catalog"]
                except Exception as error:
                    if type(error).__name__ == "MissingConfigException":
                        return {}
                    raise
        except (SystemExit, Exception) as error:
            raise Refused(
                "config",
                "Kedro cannot load the catalog of the environment %r: %s%s"
                % (env, one_line(error), where(error, self.root)),
            ) from error
        return {str(key): value for key, value in dict(found or {}).items()}


# Types ---------------------------------------------------------------------------------------------------------------

ALIASES = {"pd": "pandas", "pl": "polars", "np": "numpy", "pa": "pyarrow", "ibis": "ibis"}


def type_name(kind):
    """First module and class, since pandas moved its classes: `pandas.DataFrame`."""
    module = (getattr(kind, "__module__", None) or "").split(".")[0]
    name = getattr(kind, "__qualname__", None) or getattr(kind, "__name__", None)
    if not name:
        return None
    return name if module in ("", "builtins") else "%s.%s" % (module, name)


def hint_name(hint):
    """The name of one annotated type, or None where an annotation leaves it open."""
    import typing

    if hint is None or hint is inspect.Parameter.empty or hint is typing.Any:
        return None
    if hint is type(None):
        return None
    if isinstance(hint, str):
        text = hint.strip().strip("'\"")
        text = re.sub(r"^Optional\[(.*)\]$", r"\1", re.sub(r"\s*\|\s*None$", "", text))
        head, dot, tail = text.partition(".")
        if re.match(r"^\w+\.\w+$", text):
            return "%s.%s" % (ALIASES.get(head, head), tail)
        return text if text in ("dict", "list", "str", "int", "float", "bool", "tuple", "set") else None
    origin = getattr(hint, "__origin__", None)
    if origin is not None or type(hint).__name__ == "UnionType":
        arguments = getattr(hint, "__args__", ()) or ()
        if origin is typing.Union or type(hint).__name__ == "UnionType":
            names = {hint_name(part) for part in arguments if part is not type(None)}
            return names.pop() if len(names) == 1 else None
        if type(hint).__name__ == "_AnnotatedAlias":
            return hint_name(origin)
        return type_name(origin) if origin is not None else None
    return type_name(hint) if isinstance(hint, type) else None


def unwrapped(function):
    import functools

    seen = 0
    while seen < 100:
        seen += 1
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            break
    if not inspect.isfunction(function) and not inspect.ismethod(function) and hasattr(function, "__call__"):
        call = type(function).__call__
        if inspect.isfunction(call):
            return call
    return function


def raw_hints(function):
    import typing

    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that cannot be imported: the annotations as they are written
        return dict(getattr(function, "__annotations__", None) or {})


def tuple_parts(hint):
    """The parts of `Tuple[A, B]`, also where the annotation is text."""
    if isinstance(hint, str):
        match = re.match(r"^(?:typing\.)?[Tt]uple\[(.*)\]$", hint.strip().strip("'\""))
        if not match or "[" in match.group(1):
            return None
        return [part.strip() for part in match.group(1).split(",")]
    if getattr(hint, "__origin__", None) in (tuple,):
        parts = list(getattr(hint, "__args__", ()))
        return None if Ellipsis in parts else parts
    return None


def node_hints(node):
    """What the annotations of a node's function say: (outputs, inputs), both dataset -> type name."""
    outputs, inputs = {}, {}
    try:
        function = unwrapped(node.func)
        hints = raw_hints(function)
        returned = hints.get("return")
        names = node._outputs
        if isinstance(names, str):
            outputs[names] = hint_name(returned)
        elif isinstance(names, (list, tuple)):
            parts = tuple_parts(returned)
            if parts is not None and len(parts) == len(names):
                for name, part in zip(names, parts):
                    outputs[name] = hint_name(part)
            elif len(names) == 1 and parts is None:
                # A list of one output takes a list of one value.
                outputs[names[0]] = None
        given = node._inputs
        signature = inspect.signature(node.func)
        if isinstance(given, str):
            bound = signature.bind(given)
        elif isinstance(given, dict):
            bound = signature.bind(**given)
        else:
            bound = signature.bind(*(given or []))
        for parameter, dataset in bound.arguments.items():
            if isinstance(dataset, str):
                inputs[dataset] = hint_name(hints.get(parameter))
    except Exception:  # an annotation is a hint only; anything odd about it means that there is none
        pass
    return (
        {name: hint for name, hint in outputs.items() if hint},
        {name: hint for name, hint in inputs.items() if hint},
    )


def strip(name):
    """The dataset without its transcoding: `X@pandas` is `X`."""
    return name.split("@", 1)[0]


def is_parameter(name):
    return name == "parameters" or name.startswith("params:")


def describe_pipeline(pipeline):
    nodes = list(pipeline.nodes)
    names = {}
    for node in nodes:
        names[id(node)] = node.name
    parents = {}
    order = {node.name: number for number, node in enumerate(nodes)}
    for node, above in pipeline.node_dependencies.items():
        parents[node.name] = sorted({parent.name for parent in above}, key=lambda name: order[name])
    described, datasets = [], {}

    def dataset(name):
        return datasets.setdefault(
            name, {"hint": None, "consumer_hint": None, "producers": [], "consumers": [], "generator": False}
        )

    for node in nodes:
        outputs, inputs = node_hints(node)
        function = unwrapped(node.func)
        generator = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        described.append(
            {
                "name": node.name,
                "short_name": getattr(node, "short_name", node.name),
                "named": getattr(node, "_name", None) is not None,
                "tags": sorted(node.tags),
                "namespace": node.namespace,
                "inputs": list(node.inputs),
                "outputs": list(node.outputs),
                "confirms": list(getattr(node, "confirms", None) or []),
                "parents": parents.get(node.name, []),
                "generator": generator,
            }
        )
        for name in node.inputs:
            entry = dataset(name)
            entry["consumers"].append(node.name)
            entry["consumer_hint"] = entry["consumer_hint"] or inputs.get(name)
        for name in node.outputs:
            entry = dataset(name)
            entry["producers"].append(node.name)
            entry["generator"] = generator
            entry["hint"] = outputs.get(name)
    made = {strip(name) for node in nodes for name in node.outputs}
    for name, entry in datasets.items():
        entry["parameter"] = is_parameter(name)
        entry["free_input"] = strip(name) not in made and not entry["parameter"]
    return {"nodes": described, "datasets": datasets}


# Patterns ------------------------------------------------------------------------------------------------------------


def specificity(pattern):
    return (-len(re.sub(r"\{.*?\}", "", pattern)), -pattern.count("{"), pattern)


def resolve(value, fields):
    """What Kedro makes of a factory's entry."""
    if isinstance(value, str) and "}" in value:
        try:
            return value.format_map(fields)
        except Exception:  # Kedro will refuse it, and say why, when it is used
            return value
    if isinstance(value, dict):
        return {key: resolve(item, fields) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolve(item, fields) for item in value]
    return value


def configuration(name, config, factories):
    """The factory that makes a dataset's entry (None if it has one of its own), and the entry. None if there is none.

    Kedro matches names with `parse`, which has types, and does not tell letters of different case apart.
    """
    if name in config and "{" not in name:
        return None, config[name]
    if factories:
        from parse import parse

        for pattern in sorted((key for key in config if "{" in key), key=specificity):
            found = parse(pattern, name)
            if found:
                return pattern, resolve(config[pattern], found.named)
    return None


def brief(config):
    """What a listing needs of an entry; nothing else leaves the interpreter (credentials least of all)."""
    if not isinstance(config, dict):
        return {"type": None, "filepath": None, "versioned": False, "partitions": None}
    path = config.get("filepath", config.get("path"))
    suffix = config.get("filename_suffix") or ""
    return {
        "type": str(config.get("type")) if config.get("type") is not None else None,
        "filepath": str(path) if path is not None else None,
        "versioned": bool(config.get("versioned")),
        # `path` is what Kedro calls a folder whose files, all or those with a suffix, are the dataset.
        "partitions": str(suffix) if "path" in config and "filepath" not in config else None,
    }


def configured(names, config, factories):
    """For each dataset name: its explicit entry, or the factory that makes one."""
    found = {}
    for name in names:
        known = configuration(name, config, factories)
        if known is not None:
            found[name] = dict(brief(known[1]), pattern=known[0])
    return found


def settings(project, request):
    """Where the configuration is; nothing else of the project has to import for this."""
    return {"conf_source": project.conf_source, "run_env": project.run_env}


def introspect(project, request):
    loaded = project.pipelines()
    wanted = request.get("pipelines")
    chosen = list(wanted) if wanted else sorted(loaded)
    described = {name: describe_pipeline(project.pipeline(name)) for name in chosen if loaded.get(name) is not None or wanted}
    names = sorted({name for pipeline in described.values() for name in pipeline["datasets"]})
    names = [name for name in names if not is_parameter(name)]
    factories = project.factories
    env = project.usable_env(request["env"] or project.run_env)
    base = project.catalog_config(project.base_env)
    merged = base if env == project.base_env else project.catalog_config(env)
    other = {}
    local = project.run_env
    if local != env and project.usable_env(local) == local:
        try:
            other = project.catalog_config(local)
        except Refused:
            other = {}
    return {
        "versions": {
            "python": "%d.%d.%d" % sys.version_info[:3],
            "kedro": project.kedro,
            "kedro_datasets": version("kedro-datasets"),
            "pandas": version("pandas"),
            "pyarrow": version("pyarrow"),
            "polars": version("polars"),
        },
        "executable": sys.executable,
        "package_name": project.metadata.package_name,
        "project_name": project.metadata.project_name,
        "conf_source": project.conf_source,
        "base_env": project.base_env,
        "run_env": project.run_env,
        "env": env,
        "factories": factories,
        "pipeline_names": sorted(loaded),
        "pipelines": described,
        "base": configured(names, base, factories),
        "merged": configured(names, merged, factories),
        "local": sorted(configured(names, other, factories)),
        "patterns": sorted(key for key in merged if "{" in key),
        "warnings": project.warnings,
    }

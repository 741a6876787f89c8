//! What `catalog create` takes from the project, and what it leaves alone.

use crate::project::{files, kedros, names, refused, success};
use std::collections::BTreeMap;
use std::fs;

const OUTPUTS: &str = "\
report:
  type: text.TextDataset
  filepath: data/report.txt
table@pandas:
  type: pandas.ParquetDataset
  filepath: data/table.parquet
table@polars:
  type: polars.EagerPolarsDataset
  filepath: data/table.parquet
  file_format: parquet
parts:
  type: partitions.PartitionedDataset
  path: data/parts
  dataset: pickle.PickleDataset
  filename_suffix: .pkl
news:
  type: partitions.IncrementalDataset
  path: data/news
  dataset: text.TextDataset
\"{kind}_made\":
  type: pickle.PickleDataset
  filepath: data/{kind}.pkl
";

/// A pipeline with every kind of output that a catalog can have: files, partitions, a shared file, a checkpoint.
fn with_outputs(kedro: &crate::project::Kedro) {
    kedro.pipelines(
        "def report(): return 'new'\n\
         def table(): return pd.DataFrame({'a': [1, 2, 3]})\n\
         def total(table): return int(table['a'].sum())\n\
         def parts(): return {'one': 1, 'two': 2}\n\
         def sum_parts(parts): return sum(load() for load in parts.values())\n\
         def news(news): return sorted(news)\n\
         def values(): return iter([1, 2])\n",
        "{'__default__': pipeline([\
         node(report, None, 'report', name='report'), node(table, None, 'table@pandas', name='table'), \
         node(total, 'table@polars', 'total', name='total'), node(parts, None, 'parts', name='parts'), \
         node(sum_parts, 'parts', 'sum', name='sum'), \
         node(news, 'news', 'titles', name='news', confirms='news'), \
         node(total, 'table@pandas', 'other_made', name='other'), \
         node(values, None, 'values', name='values')])}",
    );
    kedro.write("conf/base/catalog.yml", OUTPUTS);
    for (path, content) in [
        ("report.txt", "precious\n"),
        ("table.parquet", "x"),
        ("parts/one.pkl", "x"),
        ("news/a", "x"),
        ("other.pkl", "x"),
    ] {
        kedro.write(&format!("data/{path}"), content);
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn observing_changes_no_file_of_the_project() {
    for kedro in kedros() {
        with_outputs(&kedro);
        let before = files(&kedro.project);
        let said = success(kedro.ours(&["catalog", "create", "--observe", "--dry-run"]));
        let changed: BTreeMap<_, _> =
            files(&kedro.project).into_iter().filter(|(path, content)| before.get(path) != Some(content)).collect();
        assert!(changed.is_empty(), "{}: {:?}", kedro.name, changed.keys());
        for name in ["total", "sum", "titles"] {
            assert!(said.contains(&format!("/{name}.pkl")), "{}: {name}: {said}", kedro.name);
        }
        // Kedro 1 takes the values of generator functions only one by one.
        assert_eq!(said.contains("left out values"), kedro.name != "kedro1", "{}: {said}", kedro.name);
        assert!(fs::read(kedro.project.join("data/report.txt")).unwrap() == b"precious\n");
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn factories_match_as_they_do_in_kedro() {
    for kedro in kedros() {
        kedro.pipelines(
            "def make() -> pd.DataFrame: return pd.DataFrame({'a': [1]})\n",
            "{'__default__': pipeline([node(make, None, name, name='n%d' % number) \
             for number, name in enumerate(['sales_RAW', 'run_abc', 'run_12', 'x-y#csv'])])}",
        );
        // Kedro 0.19 and later want the placeholder of the path spelt as in the pattern.
        let number = if kedro.name == "kedro018" { "{n}" } else { "{n:d}" };
        kedro.write(
            "conf/base/catalog.yml",
            &format!(
                "\"{{name}}_raw\":\n  type: pickle.PickleDataset\n  filepath: data/{{name}}_raw.pkl\n\
                 \"run_{{n:d}}\":\n  type: pickle.PickleDataset\n  filepath: data/run_{number}.pkl\n\
                 \"{{data-name}}#csv\":\n  type: pandas.CSVDataset\n  filepath: data/{{data-name}}.csv\n"
            ),
        );
        success(kedro.ours(&["catalog", "create"]));
        let written: serde_yaml::Mapping =
            serde_yaml::from_str(&fs::read_to_string(kedro.catalog_file("__default__")).unwrap()).unwrap();
        let keys: Vec<&str> = written.keys().map(|key| key.as_str().unwrap()).collect();
        assert_eq!(keys, ["run_abc"], "{}", kedro.name);
        kedro.kedro_run(&["--env", "vineyard"]);
        let listed = kedro.ours(&["catalog", "list", "--json"]);
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
        for row in listed["pipelines"]["__default__"].as_array().unwrap() {
            assert_eq!(row["exists"], true, "{}: {row}", kedro.name);
        }
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn what_has_to_stay_in_memory_is_kept_from_factories() {
    for kedro in kedros() {
        kedro.pipelines(
            "import threading\n\
             class Connection:\n    \
                 def __init__(self): self.lock = threading.Lock()\n    \
                 def __deepcopy__(self, memo): return self\n\
             def connect(): return Connection()\n\
             def use(connection): return connection is not None\n",
            "{'__default__': pipeline([node(connect, None, 'connection', name='connect'), \
             node(use, 'connection', 'ok', name='use')])}",
        );
        let said = success(kedro.ours(&["catalog", "create", "--observe", "--catch-all"]));
        assert!(said.contains("left out connection"), "{said}");
        let written = kedro.read("conf/vineyard/catalog/__default__.yml");
        assert!(written.contains("connection:\n  type: MemoryDataset\n"), "{written}");
        assert_eq!(written.contains("ParallelRunner refuses"), kedro.name != "kedro1", "{written}");
        kedro.kedro_run(&["--env", "vineyard"]);
        success(kedro.ours(&["catalog", "create", "--observe", "--catch-all"]));
        assert_eq!(kedro.read("conf/vineyard/catalog/__default__.yml"), written);
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn a_new_transcoding_of_an_entry_that_was_moved_is_left_to_its_owner() {
    for kedro in kedros() {
        let pipelines = |more: &str| {
            kedro.pipelines(
                "import polars as pl\n\
                 def make() -> pd.DataFrame: return pd.DataFrame({'a': [1, 2, 3]})\n\
                 def use(x: pd.DataFrame) -> int: return int(x['a'].sum())\n\
                 def more(x: pl.DataFrame) -> int: return int(x['a'].sum())\n",
                &format!(
                    "{{'__default__': pipeline([node(make, None, 'X@pandas', name='make'), \
                     node(use, 'X@pandas', 'total', name='use'){more}])}}"
                ),
            );
        };
        pipelines("");
        success(kedro.ours(&["catalog", "create"]));
        let file = "conf/vineyard/catalog/__default__.yml";
        let moved = kedro.read(file).replace("pandas.Feather", "pandas.Parquet").replace("X.arrow", "X.parquet");
        let moved = moved.replace("compression: uncompressed", "compression: snappy");
        kedro.write(file, &moved);
        pipelines(", node(more, 'X@polars', 'sum', name='more')");
        let said = success(kedro.ours(&["catalog", "create"]));
        assert!(said.contains("left out X@polars: the catalog has X@pandas"), "{}: {said}", kedro.name);
        let written = kedro.read(file);
        assert!(written.starts_with(&moved) && !written.contains("X@polars:"), "{}: {written}", kedro.name);

        success(kedro.ours(&["catalog", "create", "--force"]));
        kedro.kedro_run(&["--env", "vineyard"]);
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn inputs_that_a_run_will_not_find_are_told() {
    for kedro in kedros() {
        kedro.pipelines(
            "def make(a, b) -> pd.DataFrame: return pd.DataFrame({'a': [1]})\n",
            "{'__default__': pipeline([node(make, ['raw', 'nowhere'], 'X', name='make')])}",
        );
        kedro.write("conf/local/catalog.yml", "raw:\n  type: pickle.PickleDataset\n  filepath: data/raw.pkl\n");
        for arguments in [&["catalog", "create"][..], &["argo", "generate", "-i", "x", "-o", "-"]] {
            let said = success(kedro.ours(arguments));
            assert!(said.contains("warning: raw has an entry in conf/local"), "{}: {said}", kedro.name);
            assert!(said.contains("warning: the input nowhere is in no catalog"), "{}: {said}", kedro.name);
        }
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn messages_fit_the_environment() {
    for kedro in kedros() {
        let said = success(kedro.ours(&["catalog", "create", "--env", "local"]));
        assert!(said.contains("`kedro run` shares through") && !said.contains("as before"), "{}: {said}", kedro.name);
        let written = kedro.read("conf/local/catalog/__default__.yml");
        assert!(written.contains("# Used by `kedro run`, which loads conf/base and conf/local.\n"), "{written}");
        for arguments in [&["catalog", "list"][..], &["clean"]] {
            refused(&kedro, &[arguments, &["--env", "typo"]].concat(), "no environment \"typo\"");
        }
        kedro.write("src/iris/pipeline_registry.py", "exec('import no_such_module')\n");
        let said = kedro.ours(&["catalog", "list"]);
        assert!(
            !String::from_utf8_lossy(&said.stderr).contains("<string>"),
            "{}",
            String::from_utf8_lossy(&said.stderr)
        );
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn cleaning_leaves_what_is_somebody_elses() {
    for kedro in kedros() {
        kedro.pipelines(
            "def parts(): return {'one': pd.DataFrame({'a': [1]}), 'two': pd.DataFrame({'a': [2]})}\n",
            "{'__default__': pipeline([node(parts, None, 'parts', name='parts')])}",
        );
        kedro.write(
            "conf/vineyard/catalog.yml",
            &format!(
                "parts:\n  type: partitions.PartitionedDataset\n  path: {}/shared\n  \
                 dataset: pandas.ParquetDataset\n  filename_suffix: .parquet\n",
                kedro.mount.display()
            ),
        );
        kedro.kedro_run(&["--env", "vineyard"]);
        let folder = kedro.mount.join("shared");
        fs::write(folder.join("theirs.pkl"), "x").unwrap();
        assert_eq!(names(&folder), ["one.parquet", "theirs.pkl", "two.parquet"], "{}", kedro.name);
        success(kedro.ours(&["clean"]));
        assert_eq!(names(&folder), ["theirs.pkl"], "{}", kedro.name);
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn an_image_has_the_folder_that_kedro_wants() {
    for kedro in kedros() {
        fs::create_dir(kedro.project.join("settings")).unwrap();
        fs::rename(kedro.project.join("conf"), kedro.project.join("settings/kedro conf")).unwrap();
        kedro.write("src/iris/settings.py", "CONF_SOURCE = \"settings/kedro conf\"\n");
        success(kedro.ours(&["docker", "init"]));
        let file = kedro.read("Dockerfile");
        assert!(file.contains("RUN mkdir -p 'settings/kedro conf/local' && chown"), "{}: {file}", kedro.name);
    }
}

//! What `catalog create` takes from the project, and what it leaves alone.

use crate::project::{files, kedros, success};
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

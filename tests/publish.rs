//! Files that Python writes, published into a real vineyardd, and what the official client gets.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use arrow::compute::concat_batches;
use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use common::vineyardd::Vineyardd;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use vineyard_fs::dataset::FileAttributes;
use vineyard_fs::dataset::publish::{Limits, Outcome, Published, Staged, plan, publish};
use vineyard_fs::dataset::recipe::{Written, recipe_of};
use vineyard_fs::dataset::{Dataset, decode, materialize};
use vineyard_fs::vineyard::store::NameQuery;
use vineyard_fs::vineyard::{Client, Store};

/// The Python of `$VIRTUAL_ENV` or of the project's `.venv`, which `scripts/setup` fills.
fn python() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv");
    std::env::var_os("VIRTUAL_ENV").map_or(own, PathBuf::from).join("bin/python")
}

fn official(arguments: &[&std::ffi::OsStr]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/py/official.py");
    let output = Command::new(python()).arg(script).args(arguments).output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The schema and batches of a file, as the Arrow crates read it.
fn read(bytes: &[u8]) -> (SchemaRef, Vec<RecordBatch>) {
    use arrow_ipc::reader::{FileReader, StreamReader};
    let cursor = std::io::Cursor::new(bytes);
    if bytes.starts_with(b"PAR1") {
        let bytes = bytes::Bytes::copy_from_slice(bytes);
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap();
        let schema = reader.schema().clone();
        return (schema, reader.build().unwrap().map(|b| b.unwrap()).collect());
    }
    if bytes.starts_with(b"ARROW1") {
        let reader = FileReader::try_new(cursor, None).unwrap();
        return (reader.schema(), reader.map(|b| b.unwrap()).collect());
    }
    let reader = StreamReader::try_new(cursor, None).unwrap();
    (reader.schema(), reader.map(|b| b.unwrap()).collect())
}

fn put(client: &Client, path: &Path) -> Published {
    let bytes = std::fs::read(path).unwrap();
    let file = File::open(path).unwrap();
    let staged = Staged { bytes: &bytes, file: &file };
    let view = Written::from_extension(path.extension().unwrap().to_str().unwrap()).unwrap();
    let plan = plan(&staged, view, &FileAttributes::default(), Limits::default()).unwrap();
    let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
    let published = publish(client, &|_| name.clone(), &plan, &staged, None).unwrap();
    assert_eq!(published.warnings, Vec::<String>::new(), "{path:?}");
    // The view that was written reads back byte for byte.
    let meta = client.metas(&[published.id], false).unwrap().remove(&published.id).unwrap().unwrap();
    let recipe = recipe_of(&meta).unwrap().unwrap();
    let back: Vec<u8> = recipe.spans.iter().flat_map(|span| span.to_vec(client).unwrap()).collect();
    assert!(back == bytes, "{path:?} reads back differently");
    match (decode(&meta, client).unwrap(), published.outcome) {
        (Dataset::Table(table), Outcome::Frame | Outcome::Table) => {
            table.validate(client).unwrap();
            let batches = table.batches.iter().map(|batch| {
                let columns = batch.columns.iter().map(|column| materialize(column, client).unwrap()).collect();
                RecordBatch::try_new(table.schema.clone(), columns).unwrap()
            });
            let actual = concat_batches(&table.schema, &batches.collect::<Vec<_>>()).unwrap();
            let (schema, expected) = read(&bytes);
            assert_eq!(table.schema, schema, "{path:?}");
            assert_eq!(actual, concat_batches(&schema, &expected).unwrap(), "{path:?}");
        }
        (Dataset::Tensor(_), Outcome::Tensor) | (Dataset::Pickle(_), Outcome::Pickle) => {}
        (dataset, outcome) => panic!("{path:?} is {outcome:?} and decodes as {dataset:?}"),
    }
    published
}

#[test]
fn the_official_client_gets_equal_values() {
    let server = Vineyardd::start("256Mi");
    let client = server.client(Duration::from_secs(10)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    official(&["write".as_ref(), folder.path().as_os_str()]);
    let mut published = Vec::new();
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        published.push(put(&client, &entry.unwrap().path()));
    }
    assert!(published.len() > 40);
    official(&["check".as_ref(), folder.path().as_os_str(), server.socket().as_os_str()]);
    // Deleting takes everything with it, recipes and kept files included.
    client.delete(&published.iter().map(|p| p.id).collect::<Vec<_>>()).unwrap();
    assert_eq!(client.status().unwrap().memory_usage, 0);
    let left = client.metas(&published.iter().map(|p| p.id).collect::<Vec<_>>(), false).unwrap();
    assert!(left.is_empty());
    let names = client.names(&[NameQuery::Prefix { prefix: String::new(), limit: None }]).unwrap();
    assert_eq!(names[0].len(), published.len(), "names outlive their objects");
}

//! Other programs' readers against images: pyarrow, polars, DuckDB through `tests/py/images.py`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use super::arrow::{self, Counts};
use super::parquet;
use super::testing::{Memory, batches, bytes, flat_types, table, tables};

/// The Python that `VINEYARD_FS_PYTHON` names, as scripts/test does, or that of the project's environment, if it is there.
fn python() -> Option<PathBuf> {
    let named = std::env::var_os("VINEYARD_FS_PYTHON").map(PathBuf::from);
    named.or_else(|| Some(Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python")).filter(|path| path.exists()))
}

/// Whether it has a Parquet view.
fn write(dir: &Path, number: usize, schema: &Arc<Schema>, batches: &[RecordBatch]) -> bool {
    let path = dir.join(format!("{number:04}.expected"));
    let mut writer = StreamWriter::try_new(std::fs::File::create(&path).unwrap(), schema).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    show(&path, schema, batches, number.is_multiple_of(2))
}

/// Writes the views of a table beside it. Whether there is one as Parquet.
fn show(path: &Path, schema: &Arc<Schema>, batches: &[RecordBatch], counted: bool) -> bool {
    let memory = Memory::default();
    let table = table(schema.clone(), batches, &memory, counted);
    let image = arrow::image(&table, Counts::From(&memory)).unwrap();
    std::fs::write(path.with_extension("arrow"), bytes(&image, &memory)).unwrap();
    let has_parquet = parquet::supports(&table).is_ok();
    if has_parquet {
        let image = parquet::image(&table, Counts::From(&memory)).unwrap();
        std::fs::write(path.with_extension("parquet"), bytes(&image, &memory)).unwrap();
    }
    has_parquet
}

/// Runs the script; what it printed.
fn run(python: &Path, task: &str, dir: &Path) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/py/images.py");
    let output = Command::new(python).arg(script).arg(task).arg(dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let last: Vec<&str> = errors.lines().rev().take(12).collect();
    assert!(output.status.success(), "{text}\n{last:#?}");
    text.into_owned()
}

#[test]
fn other_readers_see_equal_tables() {
    let Some(python) = python() else {
        println!("left out: VINEYARD_FS_PYTHON names no Python, and there is no .venv (scripts/setup makes it)");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (mut number, mut parquets) = (0, 0);
    // Every type alone, with and without nulls, in several batches.
    for data_type in flat_types() {
        for nullable in [false, true] {
            let nullable = nullable || data_type == DataType::Null;
            let schema = Arc::new(Schema::new(vec![Field::new("c", data_type.clone(), nullable)]));
            let has_parquet = write(dir.path(), number, &schema, &batches(&schema, &[900, 0, 333], number as u64));
            parquets += usize::from(has_parquet);
            number += 1;
        }
    }
    // More tables: IMAGE_CASES=300.
    let cases = std::env::var("IMAGE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(40);
    let mut runner = TestRunner::deterministic();
    for all in [true, false] {
        for _ in 0..cases {
            let (schema, batches) = tables(all).new_tree(&mut runner).unwrap().current();
            parquets += usize::from(write(dir.path(), number, &schema, &batches));
            number += 1;
        }
    }
    run(&python, "make", dir.path());
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains("pandas-") && path.extension().is_some_and(|e| e == "expected") {
            let reader = StreamReader::try_new(std::fs::File::open(&path).unwrap(), None).unwrap();
            let schema = reader.schema();
            let batches: Vec<RecordBatch> = reader.map(|batch| batch.unwrap()).collect();
            parquets += usize::from(show(&path, &schema, &batches, true));
            number += 1;
        }
    }
    let text = run(&python, "check", dir.path());
    println!("{text}");
    let checked = format!("checked {number} arrow, {parquets} parquet; ");
    assert!(text.contains(&checked), "{text}");
    if std::env::var_os("IMAGE_CASES").is_none() {
        // The tables are always the same ones, and so are those that pyarrow, polars and DuckDB can read at all.
        assert!(text.ends_with("; 0 not by pyarrow, 85 also by polars, 99 by DuckDB\n"), "{text}");
    }
}

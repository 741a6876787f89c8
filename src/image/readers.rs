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

/// The Python of the active or the project's environment, if it has pyarrow.
fn python() -> Result<PathBuf, String> {
    let candidates = [std::env::var("VIRTUAL_ENV").ok(), Some(format!("{}/.venv", env!("CARGO_MANIFEST_DIR")))];
    let python = candidates.into_iter().flatten().map(|dir| Path::new(&dir).join("bin/python")).find(|p| p.exists());
    let python = python.ok_or("no VIRTUAL_ENV and no .venv in the project")?;
    let probe = Command::new(&python).args(["-c", "import pyarrow"]).output().map_err(|e| e.to_string())?;
    if probe.status.success() { Ok(python) } else { Err(format!("{} has no pyarrow", python.display())) }
}

fn write(dir: &Path, number: usize, schema: &Arc<Schema>, batches: &[RecordBatch]) {
    let path = dir.join(format!("{number:04}.expected"));
    let mut writer = StreamWriter::try_new(std::fs::File::create(&path).unwrap(), schema).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    show(&path, schema, batches, number.is_multiple_of(2));
}

/// Writes the views of a table beside it.
fn show(path: &Path, schema: &Arc<Schema>, batches: &[RecordBatch], counted: bool) {
    let memory = Memory::default();
    let table = table(schema.clone(), batches, &memory, counted);
    let image = arrow::image(&table, Counts::From(&memory)).unwrap();
    std::fs::write(path.with_extension("arrow"), bytes(&image, &memory)).unwrap();
    if parquet::supports(&table).is_ok() {
        let image = parquet::image(&table, Counts::From(&memory)).unwrap();
        std::fs::write(path.with_extension("parquet"), bytes(&image, &memory)).unwrap();
    }
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
    let python = match python() {
        Ok(python) => python,
        Err(reason) => {
            println!("not checked with pyarrow: {reason}");
            return;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let mut number = 0;
    // Every type alone, with and without nulls, in several batches.
    for data_type in flat_types() {
        for nullable in [false, true] {
            let nullable = nullable || data_type == DataType::Null;
            let schema = Arc::new(Schema::new(vec![Field::new("c", data_type.clone(), nullable)]));
            write(dir.path(), number, &schema, &batches(&schema, &[900, 0, 333], number as u64));
            number += 1;
        }
    }
    // More tables: IMAGE_CASES=300.
    let cases = std::env::var("IMAGE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(40);
    let mut runner = TestRunner::deterministic();
    for all in [true, false] {
        for _ in 0..cases {
            let (schema, batches) = tables(all).new_tree(&mut runner).unwrap().current();
            write(dir.path(), number, &schema, &batches);
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
            show(&path, &schema, &batches, true);
            number += 1;
        }
    }
    let text = run(&python, "check", dir.path());
    assert!(text.contains(&format!("checked {number} arrow")), "{text}");
    println!("{text}");
}

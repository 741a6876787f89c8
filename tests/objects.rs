//! Objects as the official client wrote them (see `tests/py/objects.py`) decode to the tables that they mean.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use arrow_array::{RecordBatch, RecordBatchOptions};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use proptest::prelude::*;
use serde_json::Value;
use vineyard_fs::dataset::{self, Dataset, Table};
use vineyard_fs::vineyard::{BlobKey, BlobSource, InstanceId, Meta, ObjectId};
use vineyard_fs::{Error, Kind, Result};

/// Blobs in this process. Reading outside of one is a failed test, not an error.
#[derive(Default)]
struct Blobs(HashMap<BlobKey, Vec<u8>>);

impl BlobSource for Blobs {
    fn size(&self, key: BlobKey) -> Result<u64> {
        assert!(key.id.is_stored_blob(), "the size of blob {key} was asked for");
        self.0.get(&key).map(|b| b.len() as u64).ok_or_else(|| Error::stale(format!("no blob {key}")))
    }

    fn read(&self, key: BlobKey, offset: u64, out: &mut [u8]) -> Result<()> {
        let blob = self.0.get(&key).ok_or_else(|| Error::stale(format!("no blob {key}")))?;
        let end = offset.checked_add(out.len() as u64).filter(|end| *end <= blob.len() as u64);
        let end = end.unwrap_or_else(|| panic!("{} bytes at {offset} of a blob of {}", out.len(), blob.len()));
        out.copy_from_slice(&blob[offset as usize..end as usize]);
        Ok(())
    }

    fn verify(&self, _: &[BlobKey]) -> Result<()> {
        Ok(())
    }
}

struct Fixture {
    name: String,
    meta: Value,
    blobs: Blobs,
    table: Option<(arrow_schema::SchemaRef, Vec<RecordBatch>)>,
}

fn load(path: &Path) -> Fixture {
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let decode = |text: &Value| BASE64_STANDARD.decode(text.as_str().unwrap()).unwrap();
    let meta = json["meta"].clone();
    let instance = InstanceId(meta["instance_id"].as_u64().unwrap());
    let blobs = json["blobs"].as_object().unwrap().iter();
    let blobs = blobs.map(|(id, bytes)| (BlobKey { instance, id: id.parse().unwrap() }, decode(bytes))).collect();
    let table = json.get("table").map(|text| {
        let reader = arrow_ipc::reader::StreamReader::try_new(std::io::Cursor::new(decode(text)), None).unwrap();
        (reader.schema(), reader.map(|batch| batch.unwrap()).collect())
    });
    Fixture { name: path.file_stem().unwrap().to_string_lossy().into(), meta, blobs: Blobs(blobs), table }
}

fn fixtures() -> Vec<Fixture> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/objects");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| load(path)).collect()
}

fn fixture(name: &str) -> Fixture {
    load(&Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/objects/{name}.json")))
}

fn decode(fixture: &Fixture) -> Dataset {
    let meta = Meta::new(fixture.meta.clone()).unwrap();
    let dataset = dataset::decode(&meta, &fixture.blobs).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));
    dataset.validate(&fixture.blobs).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));
    dataset.check(&fixture.blobs).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));
    dataset
}

fn batches(table: &Table, blobs: &Blobs) -> Result<Vec<RecordBatch>> {
    let batch = |batch: &dataset::Batch| {
        let columns = batch.columns.iter().map(|c| dataset::materialize(c, blobs)).collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(batch.rows as usize));
        RecordBatch::try_new_with_options(table.schema.clone(), columns, &options)
            .map_err(|e| Error::new(Kind::Internal, e.to_string()))
    };
    table.batches.iter().map(batch).collect()
}

/// All rows in one batch, or none if there is no batch.
fn joined(schema: &arrow_schema::SchemaRef, batches: &[RecordBatch]) -> RecordBatch {
    arrow::compute::concat_batches(schema, batches).unwrap()
}

#[test]
fn tables_mean_what_was_put() {
    let mut compared = 0;
    for fixture in fixtures() {
        let dataset = decode(&fixture);
        let Some((schema, expected)) = &fixture.table else { continue };
        let table = dataset.table().unwrap_or_else(|| panic!("{} is no table", fixture.name));
        let found = batches(table, &fixture.blobs).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));
        let names = |s: &arrow_schema::Schema| s.fields().iter().map(|f| f.name().clone()).collect::<Vec<_>>();
        assert_eq!(names(&table.schema), names(schema), "{}", fixture.name);
        let (found, expected) = (joined(&table.schema, &found), joined(schema, expected));
        if !expected.columns().is_empty() {
            assert_eq!(found.num_rows(), expected.num_rows(), "{}", fixture.name);
        }
        for (i, (a, b)) in found.columns().iter().zip(expected.columns()).enumerate() {
            let name = &names(schema)[i];
            assert_eq!(a.data_type(), b.data_type(), "{}: {name}", fixture.name);
            // Two dictionaries may list the same values in different places.
            let flat = |array: &arrow_array::ArrayRef| match array.data_type() {
                arrow_schema::DataType::Dictionary(_, values) => arrow::compute::cast(array, values).unwrap(),
                _ => array.clone(),
            };
            assert_eq!(&flat(a), &flat(b), "{}: {name}", fixture.name);
        }
        compared += 1;
    }
    assert!(compared > 50, "{compared}");
}

#[test]
fn reads_of_any_range_equal_the_whole() {
    fn spans(layout: &dataset::ArrayLayout, out: &mut Vec<dataset::Span>) {
        out.extend(layout.buffers.iter().cloned());
        layout.children.iter().for_each(|child| spans(child, out));
        layout.dictionary.iter().for_each(|values| spans(values, out));
    }
    for fixture in fixtures() {
        let dataset = decode(&fixture);
        let Some(table) = dataset.table() else { continue };
        let mut all = Vec::new();
        table.batches.iter().flat_map(|b| &b.columns).for_each(|column| spans(column, &mut all));
        for span in all {
            let whole = span.to_vec(&fixture.blobs).unwrap();
            let ends = [0, 1, 2, 3, 5, 7, 8, 9, 13, 17, whole.len() / 2, whole.len().saturating_sub(1), whole.len()];
            for from in ends {
                for to in ends {
                    if from <= to && to <= whole.len() {
                        let mut part = vec![0xaa; to - from];
                        span.read(&fixture.blobs, from as u64, &mut part).unwrap();
                        assert_eq!(part, whole[from..to], "{}: {span:?} at {from}..{to}", fixture.name);
                    }
                }
            }
        }
    }
}

#[test]
fn lost_and_opaque_columns_say_so() {
    use arrow_array::cast::AsArray;
    let column = |name: &str| {
        let fixture = fixture(name);
        let dataset = decode(&fixture);
        let table = dataset.table().unwrap().clone();
        let batch = batches(&table, &fixture.blobs).unwrap().remove(0);
        assert_eq!(batch.column(0).as_primitive::<arrow_array::types::Int64Type>().values(), &[1, 2], "{name}");
        (table.schema.field(1).metadata().get(dataset::NOTE).cloned().unwrap(), batch.column(1).clone())
    };
    for name in ["frame_lost_str", "frame_lost_category"] {
        let (note, values) = column(name);
        assert!(note.contains("only the first cell"), "{note}");
        let values = values.as_string::<i64>();
        assert_eq!(values.iter().collect::<Vec<_>>(), [Some("x"), None]);
    }
    let (note, values) = column("frame_lost_int64");
    assert!(note.contains("only the first cell"), "{note}");
    let values = values.as_primitive::<arrow_array::types::Int64Type>();
    assert_eq!(values.iter().collect::<Vec<_>>(), [Some(5), None]);
    let (note, values) = column("frame_mixed_objects");
    assert!(note.contains("several types"), "{note}");
    let values = values.as_binary::<i64>();
    assert!(values.value(0).starts_with(b"\x80\x05") && values.value(0).ends_with(b"."));
    assert_eq!(values.null_count(), 1);
    use arrow_array::Array;
}

#[test]
fn other_values() {
    let is = |name: &str| decode(&fixture(name));
    let Dataset::Tensor(zero) = is("tensor_0d") else { panic!() };
    assert_eq!((zero.shape.len(), zero.data.len(), zero.descr.as_str()), (0, 8, "<f8"));
    let Dataset::Tensor(cube) = is("tensor_3d") else { panic!() };
    assert_eq!((cube.shape.as_slice(), cube.table.is_none()), (&[2, 2, 2][..], true));
    let Dataset::Tensor(fortran) = is("tensor_fortran") else { panic!() };
    assert!(fortran.fortran);
    assert!(matches!(is("tensor_mixed"), Dataset::Table(_) | Dataset::Pickle(_)));
    let Dataset::Json(seven) = is("scalar_int") else { panic!() };
    assert_eq!(seven, 7);
    let Dataset::Json(list) = is("sequence") else { panic!() };
    assert_eq!(list[0], 1);
    assert_eq!(list[3], serde_json::json!([null, {"k": [true]}]));
    assert_eq!(list[4]["typename"], "vineyard::Tensor<int64>");
    assert!(matches!(is("pickle_dict"), Dataset::Pickle(span) if !span.is_empty()));
    assert!(matches!(is("bytes"), Dataset::Blob(span) if span.len() == 9));
    assert!(matches!(is("bytes_empty"), Dataset::Blob(span) if span.is_empty()));
    assert_eq!(is("frame_no_columns").rows(), Some(3));
}

/// Writes every table as an Arrow file and has pandas compare it with the value that was put.
#[test]
fn pandas_reads_back_what_was_put() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The one that scripts/test names must be there.
    let named = std::env::var_os("VINEYARD_FS_PYTHON").map(PathBuf::from);
    let Some(python) = named.or_else(|| Some(root.join(".venv/bin/python")).filter(|path| path.exists())) else {
        println!("left out: VINEYARD_FS_PYTHON names no Python, and there is no .venv (scripts/setup makes it)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for fixture in fixtures() {
        let dataset = decode(&fixture);
        let Some(table) = dataset.table() else { continue };
        let file = std::fs::File::create(folder.path().join(format!("{}.arrow", fixture.name))).unwrap();
        let mut writer = arrow_ipc::writer::FileWriter::try_new(file, &table.schema).unwrap();
        for batch in batches(table, &fixture.blobs).unwrap() {
            writer.write(&batch).unwrap();
        }
        writer.finish().unwrap();
    }
    let script = root.join("tests/py/objects.py");
    let output = std::process::Command::new(python).arg(script).arg("--check").arg(folder.path()).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Everything a file would be made of. Errors are fine; panics and reads outside of blobs are not.
fn exercise(meta: Value, blobs: &Blobs) {
    let Ok(meta) = Meta::new(meta) else { return };
    let Ok(dataset) = dataset::decode(&meta, blobs) else { return };
    if dataset.validate(blobs).is_err() || dataset.check(blobs).is_err() {
        return;
    }
    let small = |span: &dataset::Span| span.len() < 1 << 22;
    fn fits(layout: &dataset::ArrayLayout, small: &dyn Fn(&dataset::Span) -> bool) -> bool {
        layout.len < 1 << 20
            && layout.buffers.iter().all(small)
            && layout.children.iter().all(|c| fits(c, small))
            && layout.dictionary.iter().all(|d| fits(d, small))
    }
    if let Some(table) = dataset.table()
        && table.batches.iter().flat_map(|b| &b.columns).all(|c| fits(c, &small))
    {
        let _ = batches(table, blobs);
    }
    match dataset {
        Dataset::Tensor(tensor) if small(&tensor.data) => drop(tensor.data.to_vec(blobs)),
        Dataset::Pickle(span) | Dataset::Blob(span) if small(&span) => drop(span.to_vec(blobs)),
        _ => {}
    }
}

/// Paths of all values in a JSON tree, as JSON pointers.
fn paths(value: &Value, at: String, out: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, v)| {
            out.push(format!("{at}/{key}"));
            paths(v, format!("{at}/{key}"), out);
        }),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| paths(v, format!("{at}/{i}"), out)),
        _ => {}
    }
}

fn hostile() -> impl Strategy<Value = Value> {
    use serde_json::json;
    prop_oneof![
        Just(json!(null)),
        Just(json!(-1)),
        Just(json!(u64::MAX)),
        Just(json!(i64::MAX)),
        Just(json!(1u64 << 61)),
        Just(json!(1u64 << 32)),
        (0u64..40).prop_map(|n| json!(n)),
        Just(json!("")),
        Just(json!("[-1]")),
        Just(json!("[2305843009213693952, 1]")),
        Just(json!("[3, 0]")),
        Just(json!("[1000000000000, 0]")),
        Just(json!("[3, 1, 1, 1]")),
        Just(json!("[[[[]]]]")),
        Just(json!("null")),
        Just(json!("\"index_\"")),
        Just(json!("|V0")),
        Just(json!("<M8[ns]")),
        Just(json!("<U4000000000")),
        Just(json!(">c16")),
        Just(json!("|O")),
        Just(json!("str")),
        Just(json!("vineyard::Blob")),
        Just(json!("vineyard::PickleBuffer")),
        Just(json!("vineyard::NumericArray<decimal>")),
        Just(json!("vineyard::Tensor<double>")),
        Just(json!("vineyard::LargeListArray")),
        Just(json!("vineyard::BaseBinaryArray<arrow::StringArray>")),
        Just(json!("o8000000000000000")),
        Just(json!("offffffffffffffff")),
        Just(json!("{\"bytes\": [1, 2, 300]}")),
        Just(json!({})),
        Just(json!([])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// One to three values of real metadata are replaced, removed or swapped for another object's.
    #[test]
    fn hostile_metadata(which in any::<prop::sample::Index>(), edits in
        prop::collection::vec((any::<prop::sample::Index>(), prop::option::of(hostile()), any::<prop::sample::Index>()), 1..4))
    {
        let all = cached();
        let fixture = &all[which.index(all.len())];
        let mut meta = fixture.meta.clone();
        for (place, value, other) in edits {
            let mut all = Vec::new();
            paths(&meta, String::new(), &mut all);
            let path = &all[place.index(all.len())];
            let donor = meta.pointer(&all[other.index(all.len())]).cloned();
            let (parent, key) = path.rsplit_once('/').unwrap();
            match (value, meta.pointer_mut(parent)) {
                (Some(value), Some(Value::Object(map))) => drop(map.insert(key.into(), value)),
                (None, Some(Value::Object(map))) => match donor {
                    Some(donor) if !parent.starts_with(&all[other.index(all.len())]) => {
                        map.insert(key.into(), donor);
                    }
                    _ => drop(map.remove(key)),
                },
                _ => {}
            }
        }
        exercise(meta, &fixture.blobs);
    }

    /// Bytes of blobs are changed and cut off.
    #[test]
    fn hostile_blobs(which in any::<prop::sample::Index>(), edits in
        prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..6))
    {
        let all = cached();
        let fixture = &all[which.index(all.len())];
        let mut blobs = Blobs(fixture.blobs.0.clone());
        let mut keys: Vec<BlobKey> = blobs.0.keys().copied().collect();
        keys.sort();
        if keys.is_empty() {
            return Ok(());
        }
        for (blob, place, byte, how) in edits {
            let bytes = blobs.0.get_mut(&keys[blob.index(keys.len())]).unwrap();
            if bytes.is_empty() {
                continue;
            }
            let at = place.index(bytes.len());
            match how {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << (byte % 8),
                2 => bytes.insert(at, byte),
                _ => bytes[at] = byte,
            }
        }
        exercise(fixture.meta.clone(), &blobs);
    }
}

fn cached() -> &'static [Fixture] {
    static ALL: std::sync::OnceLock<Vec<Fixture>> = std::sync::OnceLock::new();
    ALL.get_or_init(fixtures)
}

/// Parts of two instances, one of them a C++ frame that keeps its index among the columns.
#[test]
fn frames_of_several_parts() {
    use serde_json::json;
    let one = fixture("frame_shuffled");
    let blob = |id: &str, instance: u64| json!({"id": id, "typename": "vineyard::Blob", "instance_id": instance});
    let tensor = |name: &str, id: &str| {
        json!({"id": "o0000000000000007", "typename": format!("vineyard::Tensor<{name}>"), "instance_id": 5,
            "value_type_": name, "shape_": "[2]", "buffer_": blob(id, 5)})
    };
    let native = json!({"id": "o0000000000000009", "typename": "vineyard::DataFrame", "instance_id": 5,
        "columns_": "[\"a\"]", "__values_-size": 2,
        "__values_-key-0": "\"index_\"", "__values_-value-0": tensor("int64", "o8000000000000100"),
        "__values_-key-1": "\"a\"", "__values_-value-1": tensor("double", "o8000000000000200")});
    let mut blobs = Blobs(one.blobs.0.clone());
    let mut add =
        |id: u64, bytes: Vec<u8>| blobs.0.insert(BlobKey { instance: InstanceId(5), id: ObjectId(id) }, bytes);
    add(0x8000_0000_0000_0100, [70i64, 71].iter().flat_map(|n| n.to_le_bytes()).collect());
    add(0x8000_0000_0000_0200, [0.5f64, 1.5].iter().flat_map(|n| n.to_le_bytes()).collect());
    let mut parts = json!({"id": "o0000000000000010", "typename": "vineyard::GlobalDataFrame", "global": true,
        "instance_id": u64::MAX, "partitions_-size": 2, "partitions_-0": one.meta, "partitions_-1": native});
    let dataset = dataset::decode(&Meta::new(parts.clone()).unwrap(), &blobs).unwrap();
    dataset.validate(&blobs).unwrap();
    let table = dataset.table().unwrap();
    assert_eq!((dataset.rows(), table.batches.len()), (Some(8), 2));
    let names: Vec<_> = table.schema.fields().iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names, ["a", "__index_level_0__"]);
    let last = batches(table, &blobs).unwrap().pop().unwrap();
    let index: &arrow_array::Int64Array = last.column(1).as_any().downcast_ref().unwrap();
    assert_eq!(index.values(), &[70, 71]);

    parts["partitions_-1"]["__values_-key-1"] = json!("\"b\"");
    assert!(dataset::decode(&Meta::new(parts).unwrap(), &blobs).is_err());
}

#[test]
fn empty_blobs_are_never_asked_for() {
    let meta = Meta::new(serde_json::json!({"id": ObjectId::EMPTY_BLOB.to_string(), "typename": "vineyard::Blob"}));
    let dataset = dataset::decode(&meta.unwrap(), &Blobs::default()).unwrap();
    assert!(matches!(dataset, Dataset::Blob(span) if span.is_empty()));
}

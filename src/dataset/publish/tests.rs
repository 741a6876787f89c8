#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;

use arrow_array::builder::*;
use arrow_array::types::*;
use arrow_array::*;
use arrow_schema::{DataType, Field as ArrowField, Fields, Schema, UnionFields};

use super::*;
use crate::dataset::recipe::recipe_of;
use crate::vineyard::fake::FakeStore;
use crate::vineyard::{Meta, ObjectId, Store};

/// A staged file of these bytes.
pub(super) struct Temp {
    file: File,
    bytes: Vec<u8>,
}

impl Temp {
    pub(super) fn new(bytes: Vec<u8>) -> Temp {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        Temp { file, bytes }
    }

    pub(super) fn staged(&self) -> Staged<'_> {
        Staged { bytes: &self.bytes, file: &self.file }
    }
}

pub(super) fn attrs() -> FileAttributes {
    FileAttributes { mode: Some(0o640), uid: Some(1), gid: Some(2), mtime: Some(-4), ..Default::default() }
}

pub(super) fn arrow_bytes(batches: &[RecordBatch], options: arrow_ipc::writer::IpcWriteOptions) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer =
        arrow_ipc::writer::FileWriter::try_new_with_options(&mut bytes, &batches[0].schema(), options).unwrap();
    batches.iter().for_each(|b| writer.write(b).unwrap());
    writer.finish().unwrap();
    drop(writer);
    bytes
}

/// A stream of two batches.
pub(super) fn stream_bytes(batch: &RecordBatch) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(&mut bytes, &batch.schema()).unwrap();
    let half = batch.num_rows() / 3;
    writer.write(&batch.slice(0, half)).unwrap();
    writer.write(&batch.slice(half, batch.num_rows() - half)).unwrap();
    writer.finish().unwrap();
    drop(writer);
    bytes
}

pub(super) fn meta_of(store: &FakeStore, id: ObjectId) -> Meta {
    store.metas(&[id], false).unwrap().remove(&id).unwrap().unwrap()
}

/// The bytes that the recipe of an object gives.
pub(super) fn bytes_back(store: &FakeStore, meta: &Meta) -> Vec<u8> {
    let recipe = recipe_of(meta).unwrap().unwrap();
    let mut bytes = Vec::new();
    for span in &recipe.spans {
        span.validate(store).unwrap();
        bytes.extend(span.to_vec(store).unwrap());
    }
    assert_eq!(bytes.len() as u64, recipe.size);
    bytes
}

/// Plans and executes, checks the recipe and that deleting leaves nothing, and returns the plan's outcome.
fn round_trip(bytes: Vec<u8>, view: Written) -> (FakeStore, Meta, Plan) {
    let store = FakeStore::new(64 << 20);
    let temp = Temp::new(bytes);
    let plan = plan(&temp.staged(), view, &attrs(), Limits::default()).unwrap();
    assert_eq!(plan.warnings, Vec::<String>::new());
    let published = execute(&store, &plan, &temp.staged()).unwrap();
    let meta = meta_of(&store, published.id);
    assert_eq!(bytes_back(&store, &meta), temp.bytes);
    assert_eq!(FileAttributes::of(&meta), Some(attrs()));
    (store, meta, plan)
}

/// Decodes the object and compares it with what was written.
pub(super) fn same_table(store: &FakeStore, meta: &Meta, expected: &[RecordBatch]) {
    let super::super::Dataset::Table(table) = super::super::decode(meta, store).unwrap() else { panic!("no table") };
    table.validate(store).unwrap();
    assert_eq!(table.schema, expected[0].schema());
    let expected = arrow::compute::concat_batches(&expected[0].schema(), expected).unwrap();
    let batches: Vec<RecordBatch> = table
        .batches
        .iter()
        .map(|batch| {
            let columns = batch.columns.iter().map(|c| {
                super::super::check(c, store).unwrap();
                super::super::materialize(c, store).unwrap()
            });
            let options = RecordBatchOptions::new().with_row_count(Some(batch.rows as usize));
            RecordBatch::try_new_with_options(table.schema.clone(), columns.collect(), &options).unwrap()
        })
        .collect();
    let actual = arrow::compute::concat_batches(&table.schema, &batches).unwrap();
    assert_eq!(actual, expected);
}

/// One column of every Arrow type, with and without nulls.
pub(super) fn all_types(rows: usize) -> RecordBatch {
    let valid = |i: usize| i % 5 != 3;
    let ints = |i: usize| valid(i).then_some(i as i64 * 7 - 20);
    let text =
        |i: usize| valid(i).then(|| if i.is_multiple_of(2) { format!("grün {i}") } else { "long ".repeat(i % 9) });
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        ("i8", Arc::new((0..rows).map(|i| ints(i).map(|v| v as i8)).collect::<Int8Array>())),
        ("u16", Arc::new((0..rows).map(|i| i as u16).collect::<UInt16Array>())),
        ("i64", Arc::new((0..rows).map(ints).collect::<Int64Array>())),
        ("f64", Arc::new((0..rows).map(|i| i as f64 / 3.0).collect::<Float64Array>())),
        ("bool", Arc::new((0..rows).map(|i| valid(i).then_some(i % 3 == 0)).collect::<BooleanArray>())),
        ("utf8", Arc::new((0..rows).map(text).collect::<StringArray>())),
        ("large", Arc::new((0..rows).map(text).collect::<LargeStringArray>())),
        ("view", Arc::new((0..rows).map(text).collect::<StringViewArray>())),
        ("binary", Arc::new((0..rows).map(|i| text(i).map(String::into_bytes)).collect::<BinaryArray>())),
        ("binview", Arc::new((0..rows).map(|i| text(i).map(String::into_bytes)).collect::<BinaryViewArray>())),
        ("null", Arc::new(NullArray::new(rows))),
        ("ts", Arc::new((0..rows).map(ints).collect::<TimestampMicrosecondArray>().with_timezone("Europe/Berlin"))),
        ("dec", Arc::new((0..rows).map(|i| ints(i).map(i128::from)).collect::<Decimal128Array>())),
        (
            "iv",
            Arc::new(
                (0..rows)
                    .map(|i| ints(i).map(|v| IntervalMonthDayNano::new(1, 2, v)))
                    .collect::<IntervalMonthDayNanoArray>(),
            ),
        ),
        (
            "dict",
            Arc::new(
                (0..rows).map(|i| valid(i).then_some(["a", "bb", "ccc"][i % 3])).collect::<DictionaryArray<Int8Type>>(),
            ),
        ),
    ];
    let mut fsb = FixedSizeBinaryBuilder::new(3);
    let mut list = ListBuilder::new(StringBuilder::new());
    let mut large_list = LargeListBuilder::new(Int32Builder::new());
    let mut decimals = ListBuilder::new(Decimal128Builder::new());
    let mut fsl = FixedSizeListBuilder::new(Float32Builder::new(), 2);
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int64Builder::new());
    let mut ree = PrimitiveRunBuilder::<Int32Type, Int64Type>::new();
    let mut list_view = ListViewBuilder::new(Int16Builder::new());
    for i in 0..rows {
        if valid(i) {
            fsb.append_value([i as u8; 3]).unwrap()
        } else {
            fsb.append_null()
        }
        (0..i % 4).for_each(|k| list.values().append_option(text(i + k)));
        list.append(valid(i));
        (0..i % 3).for_each(|k| large_list.values().append_value(k as i32));
        large_list.append(true);
        (0..i % 2).for_each(|k| decimals.values().append_value(k as i128));
        decimals.append(valid(i));
        fsl.values().append_slice(&[i as f32, 0.5]);
        fsl.append(valid(i));
        map.keys().append_value(format!("k{i}"));
        map.values().append_option(ints(i));
        map.append(true).unwrap();
        ree.append_option(ints(i / 4));
        (0..i % 3).for_each(|k| list_view.values().append_value(k as i16));
        list_view.append(valid(i));
    }
    columns.push(("fsb", Arc::new(fsb.finish())));
    columns.push(("list", Arc::new(list.finish())));
    columns.push(("large_list", Arc::new(large_list.finish())));
    columns.push(("fsl", Arc::new(fsl.finish())));
    columns.push(("map", Arc::new(map.finish())));
    columns.push(("ree", Arc::new(ree.finish())));
    columns.push(("list_view", Arc::new(list_view.finish())));
    let a: ArrayRef = Arc::new((0..rows).map(ints).collect::<Int64Array>());
    let b: ArrayRef = Arc::new((0..rows).map(text).collect::<StringArray>());
    let fields =
        Fields::from(vec![ArrowField::new("a", DataType::Int64, true), ArrowField::new("b", DataType::Utf8, true)]);
    columns.push(("struct", Arc::new(StructArray::new(fields.clone(), vec![a.clone(), b.clone()], None))));
    let ids: Vec<i8> = (0..rows).map(|i| [4, 9][i % 2]).collect();
    let union_fields: UnionFields = [4i8, 9].into_iter().zip(fields.iter().cloned()).collect();
    let sparse =
        UnionArray::try_new(union_fields.clone(), ids.clone().into(), None, vec![a.clone(), b.clone()]).unwrap();
    columns.push(("sparse", Arc::new(sparse)));
    let offsets: Vec<i32> = (0..rows as i32).collect();
    let dense = UnionArray::try_new(union_fields, ids.into(), Some(offsets.into()), vec![a, b]).unwrap();
    columns.push(("dense", Arc::new(dense)));
    // A list of vineyard's, whose values are not.
    columns.push(("decimals", Arc::new(decimals.finish())));
    let fields: Vec<ArrowField> = columns
        .iter()
        .map(|(name, array)| {
            let nullable = array.is_nullable() || *name == "null";
            ArrowField::new(*name, array.data_type().clone(), nullable)
                .with_metadata(std::collections::HashMap::from([("k".to_string(), format!("of {name}"))]))
        })
        .collect();
    let schema = Schema::new_with_metadata(
        fields,
        std::collections::HashMap::from([("origin".to_string(), "test".to_string())]),
    );
    RecordBatch::try_new(Arc::new(schema), columns.into_iter().map(|c| c.1).collect()).unwrap()
}

#[test]
fn arrow_file_of_all_types_reads_back_byte_for_byte() {
    for (rows, cut) in [(1000, 300), (7, 0), (0, 0), (1, 1)] {
        let batch = all_types(rows);
        let batches = [batch.slice(0, cut), batch.slice(cut, rows - cut)];
        for alignment in [8, 64] {
            let options = arrow_ipc::writer::IpcWriteOptions::try_new(alignment, false, arrow_ipc::MetadataVersion::V5);
            let (store, meta, plan) = round_trip(arrow_bytes(&batches, options.unwrap()), Written::Arrow);
            assert_eq!(plan.outcome, Outcome::Table);
            assert_eq!(meta.unsigned("num_rows_").unwrap(), rows as u64);
            same_table(&store, &meta, &batches);
        }
    }
}

#[test]
fn zero_copy_stores_column_bytes_once() {
    let batch = RecordBatch::try_from_iter([
        ("a", Arc::new(Int64Array::from_iter_values(0..100_000)) as ArrayRef),
        ("s", Arc::new(StringArray::from_iter_values((0..100_000).map(|i| i.to_string())))),
    ])
    .unwrap();
    let bytes = arrow_bytes(&[batch], Default::default());
    let size = bytes.len() as u64;
    let (_, _, plan) = round_trip(bytes, Written::Arrow);
    // The 32-bit offsets became 64-bit ones, and a bitmap says that nothing is null; nothing else is there twice.
    assert!(plan.size() < size + 400_004 + 12_500 + 2048, "{} of {size}", plan.size());
}

#[test]
fn columns_without_nulls_share_few_bitmaps_and_never_the_empty_blob() {
    let column = |rows: usize| Arc::new(Int64Array::from_iter_values(0..rows as i64)) as ArrayRef;
    for (rows, columns) in [(1000, 200), (9, 3), (1, 65)] {
        let named = (0..columns).map(|i| (format!("c{i}"), column(rows)));
        let batch = RecordBatch::try_from_iter(named).unwrap();
        let (store, meta, plan) =
            round_trip(arrow_bytes(std::slice::from_ref(&batch), Default::default()), Written::Arrow);
        let bitmap = |field: &(String, Field)| (field.0 == "null_bitmap_").then(|| field.1.clone());
        let bitmaps: Vec<Field> = plan.objects.iter().flat_map(|o| o.fields.iter().filter_map(bitmap)).collect();
        assert_eq!(bitmaps.len(), columns);
        let mut owners: HashMap<usize, usize> = HashMap::new();
        for bitmap in bitmaps {
            let Field::Blob(index) = bitmap else { panic!("{bitmap:?}") };
            assert_eq!(plan.blobs[index].size(), rows.div_ceil(8) as u64);
            *owners.entry(index).or_default() += 1;
        }
        assert_eq!(owners.len(), columns.div_ceil(64));
        assert!(owners.values().all(|&n| n <= 64), "{owners:?}");
        same_table(&store, &meta, &[batch]);
    }
}

#[test]
fn more_columns_than_vineyard_makes_in_time_stay_a_file() {
    let column = Arc::new(Int64Array::from_iter_values(0..2)) as ArrayRef;
    for (columns, outcome) in [(8000, Outcome::Table), (9000, Outcome::File)] {
        let batch = RecordBatch::try_from_iter((0..columns).map(|i| (format!("c{i}"), column.clone()))).unwrap();
        let arrow = Temp::new(arrow_bytes(std::slice::from_ref(&batch), Default::default()));
        let mut parquet = Vec::new();
        let mut writer = parquet::arrow::ArrowWriter::try_new(&mut parquet, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let parquet = Temp::new(parquet);
        for (file, view) in [(&arrow, Written::Arrow), (&parquet, Written::Parquet)] {
            let plan = plan(&file.staged(), view, &attrs(), Limits::default()).unwrap();
            assert_eq!(plan.outcome, outcome, "{columns} {view:?}");
            assert_eq!(plan.warnings.len(), usize::from(outcome == Outcome::File), "{:?}", plan.warnings);
        }
    }
}

#[test]
fn streams_and_compressed_files() {
    let batch = all_types(500);
    let (store, meta, _) = round_trip(stream_bytes(&batch), Written::Arrow);
    same_table(&store, &meta, std::slice::from_ref(&batch));
    for codec in [arrow_ipc::CompressionType::LZ4_FRAME, arrow_ipc::CompressionType::ZSTD] {
        let options = arrow_ipc::writer::IpcWriteOptions::default().try_with_compression(Some(codec)).unwrap();
        let (store, meta, plan) = round_trip(arrow_bytes(std::slice::from_ref(&batch), options), Written::Feather);
        same_table(&store, &meta, std::slice::from_ref(&batch));
        assert!(plan.fallback.is_some());
    }
}

#[test]
fn npy_pickle_and_plain() {
    let npy = |order: &str, shape: &str, data: &[u8]| {
        let header = format!("{{'descr': '<i2', 'fortran_order': {order}, 'shape': {shape}, }}");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    };
    let data: Vec<u8> = (0..12u16).flat_map(u16::to_le_bytes).collect();
    let (store, meta, _) = round_trip(npy("False", "(2, 6)", &data), Written::Npy);
    assert_eq!(meta.typename(), "vineyard::Tensor<int16>");
    assert_eq!(meta.shape("shape_").unwrap(), [2, 6]);
    let buffer = |store: &FakeStore, meta: &Meta| {
        let key = meta.blob("buffer_").unwrap();
        crate::dataset::Span::blob(key, 24).to_vec(store).unwrap()
    };
    assert_eq!(buffer(&store, &meta), data);
    let (store, meta, _) = round_trip(npy("True", "(2, 3, 2)", &data), Written::Npy);
    // Row-major order of a column-major array: element (i, j, k) lies at i + 2 j + 6 k.
    let expected: Vec<u8> = [0u16, 6, 2, 8, 4, 10, 1, 7, 3, 9, 5, 11].into_iter().flat_map(u16::to_le_bytes).collect();
    assert_eq!(buffer(&store, &meta), expected);
    round_trip(npy("False", "()", &data[..2]), Written::Npy);
    round_trip(npy("False", "(0, 3)", &[]), Written::Npy);
    let (_, meta, _) = round_trip(b"\x80\x05K\x01.".to_vec(), Written::Pickle);
    assert_eq!(meta.typename(), "vineyard::PickleBuffer");

    let store = FakeStore::new(1 << 20);
    for (bytes, view) in
        [(b"a,b\n1,2\n".to_vec(), Written::Plain), (b"not arrow".to_vec(), Written::Arrow), (vec![], Written::Plain)]
    {
        let temp = Temp::new(bytes);
        let plan = plan(&temp.staged(), view, &attrs(), Limits::default()).unwrap();
        assert_eq!((plan.outcome, plan.warnings.len()), (Outcome::File, usize::from(view == Written::Arrow)));
        let published = execute(&store, &plan, &temp.staged()).unwrap();
        let super::super::Dataset::File(span) =
            super::super::native::decode_file(&meta_of(&store, published.id)).unwrap()
        else {
            panic!("no file")
        };
        assert_eq!(span.to_vec(&store).unwrap(), temp.bytes);
    }
}

/// A table as pandas writes it: floats with NaN under nulls, strings, booleans, an index column.
pub(super) fn pandas_table(rows: usize, index: bool) -> RecordBatch {
    let values: Vec<f64> = (0..rows).map(|i| if i % 7 == 1 { f64::NAN } else { i as f64 / 3.0 }).collect();
    let nulls = values.iter().map(|v| !v.is_nan()).collect::<Vec<bool>>().into();
    let floats = Float64Array::new(values.into(), Some(nulls));
    let strings: LargeStringArray = (0..rows).map(|i| (i % 4 != 2).then(|| format!("wört {i}"))).collect();
    let narrow: StringArray = (0..rows).map(|i| Some(format!("n{i}"))).collect();
    let mut columns: Vec<(&str, ArrayRef, &str, &str)> = vec![
        ("i", Arc::new(Int32Array::from_iter_values((0..rows).map(|i| i as i32 * 3))), "int32", "int32"),
        ("f", Arc::new(floats), "float64", "float64"),
        ("s", Arc::new(strings), "unicode", "object"),
        ("n", Arc::new(narrow), "unicode", "object"),
        ("b", Arc::new(BooleanArray::from_iter((0..rows).map(|i| Some(i % 3 == 0)))), "bool", "bool"),
    ];
    if index {
        let labels = Int64Array::from_iter_values((0..rows as i64).map(|i| 100 - i));
        columns.push(("__index_level_0__", Arc::new(labels), "int64", "int64"));
    }
    let described: Vec<serde_json::Value> = columns
        .iter()
        .map(|(name, _, pandas_type, numpy_type)| {
            let label = (!name.starts_with("__")).then_some(name);
            serde_json::json!({"name": label, "field_name": name, "pandas_type": pandas_type, "numpy_type": numpy_type, "metadata": null})
        })
        .collect();
    let index = if index {
        serde_json::json!("__index_level_0__")
    } else {
        serde_json::json!({"kind": "range", "name": null, "start": 0, "stop": rows, "step": 1})
    };
    let pandas = serde_json::json!({"index_columns": [index], "columns": described, "attributes": {},
        "column_indexes": [{"name": null, "field_name": null, "pandas_type": "unicode", "numpy_type": "object", "metadata": null}]});
    let fields: Vec<ArrowField> = columns.iter().map(|c| ArrowField::new(c.0, c.1.data_type().clone(), true)).collect();
    let metadata =
        std::collections::HashMap::from([("pandas".to_string(), pandas.to_string()), ("k".into(), "v".into())]);
    let schema = Schema::new_with_metadata(fields, metadata);
    RecordBatch::try_new(Arc::new(schema), columns.into_iter().map(|c| c.1).collect()).unwrap()
}

#[test]
fn pandas_tables_become_frames() {
    for (rows, step) in [(100, 100), (100, 33), (100, 8), (1, 1), (0, 1)] {
        for index in [false, true] {
            let batch = pandas_table(rows, index);
            let batches: Vec<RecordBatch> =
                (0..rows.max(1)).step_by(step).map(|i| batch.slice(i, step.min(rows - i))).collect();
            for codec in [None, Some(arrow_ipc::CompressionType::LZ4_FRAME)] {
                let options = arrow_ipc::writer::IpcWriteOptions::default().try_with_compression(codec).unwrap();
                let (store, meta, plan) = round_trip(arrow_bytes(&batches, options), Written::Feather);
                assert_eq!(plan.outcome, Outcome::Frame);
                assert_eq!(meta.typename(), "vineyard::DataFrame");
                same_table(&store, &meta, &batches);
            }
        }
    }
}

#[test]
fn small_batches_are_merged() {
    let batch = all_types(1000);
    let keep: Vec<usize> = (0..batch.num_columns())
        .filter(|&i| {
            !matches!(
                batch.column(i).data_type(),
                DataType::Union(..)
                    | DataType::RunEndEncoded(..)
                    | DataType::Map(..)
                    | DataType::Struct(_)
                    | DataType::ListView(_)
                    | DataType::FixedSizeList(..)
                    | DataType::Utf8View
                    | DataType::BinaryView
            )
        })
        .collect();
    let batch = batch.project(&keep).unwrap();
    let batches: Vec<RecordBatch> = (0..100).map(|i| batch.slice(i * 10, 10)).collect();
    for codec in [None, Some(arrow_ipc::CompressionType::ZSTD)] {
        let options = arrow_ipc::writer::IpcWriteOptions::default().try_with_compression(codec).unwrap();
        let (store, meta, _) = round_trip(arrow_bytes(&batches, options), Written::Arrow);
        assert_eq!(meta.unsigned("batch_num_").unwrap(), 1);
        same_table(&store, &meta, &batches);
    }
}

pub(super) fn parquet_bytes(batch: &RecordBatch, properties: parquet::file::properties::WriterProperties) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn parquet_files_become_tables() {
    for rows in [0, 1, 1000, 30_000] {
        let batch = all_types(rows);
        let keep: Vec<usize> = (0..batch.num_columns())
            .filter(|&i| {
                !matches!(
                    batch.column(i).data_type(),
                    DataType::Union(..) | DataType::RunEndEncoded(..) | DataType::ListView(_) | DataType::Interval(_)
                )
            })
            .collect();
        let batch = batch.project(&keep).unwrap();
        for group in [10_000, 100_000] {
            let properties = parquet::file::properties::WriterProperties::builder()
                .set_max_row_group_row_count(Some(group))
                .set_compression(parquet::basic::Compression::SNAPPY)
                .build();
            let (store, meta, plan) = round_trip(parquet_bytes(&batch, properties), Written::Parquet);
            assert_eq!((plan.outcome, meta.typename()), (Outcome::Table, "vineyard::Table"));
            assert!(recipe_of(&meta).unwrap().unwrap().droppable);
            same_table(&store, &meta, std::slice::from_ref(&batch));
        }
    }
}

#[test]
fn parquet_files_of_pandas_become_frames() {
    for (rows, index) in [(0, true), (1000, false), (1000, true)] {
        let batch = pandas_table(rows, index);
        let properties = parquet::file::properties::WriterProperties::builder().set_max_row_group_row_count(Some(300));
        let (store, meta, plan) = round_trip(parquet_bytes(&batch, properties.build()), Written::Parquet);
        assert_eq!((plan.outcome, meta.typename()), (Outcome::Frame, "vineyard::DataFrame"));
        same_table(&store, &meta, &[batch]);
    }
}

/// Everything that fails leaves nothing behind.
#[test]
fn a_failed_publish_leaves_nothing() {
    use crate::vineyard::fake::Op;
    let files = [
        (arrow_bytes(&[all_types(50)], Default::default()), Written::Arrow),
        (parquet_bytes(&pandas_table(50, false), Default::default()), Written::Parquet),
        (parquet_bytes(&all_types(50).project(&[0, 5, 14]).unwrap(), Default::default()), Written::Parquet),
    ];
    for (bytes, view) in files {
        let temp = Temp::new(bytes);
        let plan = plan(&temp.staged(), view, &attrs(), Limits::default()).unwrap();
        let steps = [Op::CreateBlobs, Op::SealBlobs, Op::CreateObjects, Op::PutName];
        let shared = steps.into_iter().chain([Op::Persist]).map(|op| (op, FakeStore::new(16 << 20)));
        for (op, store) in shared.chain(steps.into_iter().map(|op| (op, FakeStore::new(16 << 20).alone()))) {
            store.fail_next(op, 1, Kind::Unavailable);
            let name = |_: Outcome| "x".to_string();
            let error = publish(&store, &name, &plan, &temp.staged(), None).unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable);
            assert_eq!((store.blob_count(), store.object_count()), (0, 0), "{op:?}");
            // The same plan works once the store does, and replaces what the name pointed to.
            let old = publish(&store, &name, &plan, &temp.staged(), None).unwrap().id;
            let (blobs, objects) = (store.blob_count(), store.object_count());
            let new = publish(&store, &name, &plan, &temp.staged(), Some(old)).unwrap();
            assert_eq!((store.blob_count(), store.object_count()), (blobs, objects));
            store.delete(&[new.id]).unwrap();
            assert_eq!((store.blob_count(), store.object_count()), (0, 0));
        }
        let store = FakeStore::new(1 << 10);
        assert_eq!(execute(&store, &plan, &temp.staged()).unwrap_err().kind(), Kind::Full);
        assert_eq!((store.blob_count(), store.object_count()), (0, 0));
    }
}

#[test]
fn dictionaries_that_change_are_joined() {
    let batch = |values: &[&str]| {
        let column: DictionaryArray<Int8Type> = values.iter().copied().collect();
        RecordBatch::try_from_iter([("d", Arc::new(column) as ArrayRef)]).unwrap()
    };
    let batches = [batch(&["a", "b", "a"]), batch(&["a", "b", "c"]), batch(&["x", "c"])];
    // A stream may replace a dictionary.
    let mut bytes = Vec::new();
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(&mut bytes, &batches[0].schema()).unwrap();
    batches.iter().for_each(|b| writer.write(b).unwrap());
    writer.finish().unwrap();
    drop(writer);
    let (store, meta, _) = round_trip(bytes, Written::Arrow);
    same_table(&store, &meta, &batches);
    // A file may extend it.
    let options = arrow_ipc::writer::IpcWriteOptions::default()
        .with_dictionary_handling(arrow_ipc::writer::DictionaryHandling::Delta);
    let (store, meta, _) = round_trip(arrow_bytes(&batches[..2], options), Written::Arrow);
    same_table(&store, &meta, &batches[..2]);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(150))]

    /// Any columns, cut into any batches, in any of the formats, come back byte for byte and decode equal.
    #[test]
    fn any_table_comes_back(
        rows in 0usize..300,
        columns in proptest::collection::vec(0usize..26, 0..8),
        cuts in proptest::collection::vec(0usize..300, 0..9),
        codec in 0usize..3,
        wide in proptest::bool::ANY,
        format in 0..3,
    ) {
        let all = all_types(rows + 3);
        let columns: Vec<usize> = columns.into_iter().map(|c| c % all.num_columns()).collect();
        // Sliced arrays have offsets of their own.
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let sliced = all.slice(3, rows);
        let fields: Vec<_> = columns.iter().map(|&i| all.schema().field(i).clone()).collect();
        let schema = Arc::new(Schema::new_with_metadata(fields, all.schema().metadata().clone()));
        let arrays = columns.iter().map(|&i| sliced.column(i).clone()).collect();
        let batch = RecordBatch::try_new_with_options(schema, arrays, &options).unwrap();
        let mut ends: Vec<usize> = cuts.into_iter().map(|c| c.min(rows)).chain([rows]).collect();
        ends.sort_unstable();
        let mut batches = Vec::new();
        let mut start = 0;
        for end in ends {
            batches.push(batch.slice(start, end - start));
            start = end;
        }
        let codec = [None, Some(arrow_ipc::CompressionType::LZ4_FRAME), Some(arrow_ipc::CompressionType::ZSTD)][codec];
        let alignment = if wide { 64 } else { 8 };
        let options = arrow_ipc::writer::IpcWriteOptions::try_new(alignment, false, arrow_ipc::MetadataVersion::V5)
            .unwrap()
            .try_with_compression(codec)
            .unwrap();
        let unfit = |t: &DataType| matches!(t, DataType::Union(..) | DataType::RunEndEncoded(..) | DataType::ListView(_)
            | DataType::Interval(_));
        let parquet = !columns.is_empty() && !batch.schema().fields().iter().any(|f| unfit(f.data_type()));
        let (bytes, view) = match format {
            0 => {
                let mut bytes = Vec::new();
                let mut writer =
                    arrow_ipc::writer::StreamWriter::try_new_with_options(&mut bytes, &batch.schema(), options).unwrap();
                batches.iter().for_each(|b| writer.write(b).unwrap());
                writer.finish().unwrap();
                drop(writer);
                (bytes, Written::Arrow)
            }
            1 if parquet => (parquet_bytes(&batch, Default::default()), Written::Parquet),
            _ => (arrow_bytes(&batches, options), Written::Feather),
        };
        let (store, meta, _) = round_trip(bytes, view);
        same_table(&store, &meta, &batches);
    }
}

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arrow::compute::{cast, concat_batches};
use arrow_array::types::Int32Type;
use arrow_array::{Array, ArrayRef, Int32Array, RecordBatch, RunArray, StringArray};
use arrow_schema::{DataType, Field, TimeUnit};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proptest::prelude::*;

use super::super::testing::{Memory, batches, bytes, flat_types, table, tables};
use super::*;
use crate::dataset::Span;

fn read(bytes: Vec<u8>) -> (ParquetRecordBatchReaderBuilder<File>, RecordBatch) {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    let open = || ParquetRecordBatchReaderBuilder::try_new(file.try_clone().unwrap()).unwrap();
    let batches: Vec<RecordBatch> = open().build().unwrap().map(|batch| batch.unwrap()).collect();
    let batch = concat_batches(open().schema(), &batches).unwrap();
    (open(), batch)
}

/// Writes, reads, compares; returns the image for more.
fn check(schema: &Arc<Schema>, batches: &[RecordBatch], counted: bool) -> (Image, Memory) {
    let memory = Memory::default();
    let table = table(schema.clone(), batches, &memory, counted);
    let image = image(&table, Counts::From(&memory)).unwrap();
    if let Some(size) = size(&table).unwrap() {
        assert_eq!(size, image.size());
    }
    let (builder, found) = read(bytes(&image, &memory));
    let expected = concat_batches(schema, batches).unwrap();
    assert_eq!(builder.metadata().file_metadata().num_rows() as usize, expected.num_rows());
    for key in schema.metadata().keys() {
        assert!(builder.schema().metadata().contains_key(key), "{key}");
    }
    for ((field, found), expected) in schema.fields().iter().zip(found.columns()).zip(expected.columns()) {
        // Not the other way round: casts of times to dictionaries of other units keep the number.
        let expected = cast(expected, found.data_type()).unwrap();
        assert_eq!(found, &expected, "{field:?}");
    }
    (image, memory)
}

fn one_column(data_type: DataType, nullable: bool, rows: &[usize]) -> (Arc<Schema>, Vec<RecordBatch>) {
    let schema = Arc::new(Schema::new(vec![Field::new("c", data_type, nullable)]));
    let batches = batches(&schema, rows, 11);
    (schema, batches)
}

#[test]
fn every_flat_type_is_read_back() {
    for data_type in flat_types() {
        for nullable in [false, true] {
            for rows in [&[][..], &[1], &[63, 0, 65], &[1000]] {
                let (schema, batches) = one_column(data_type.clone(), nullable || data_type == DataType::Null, rows);
                check(&schema, &batches, true);
                check(&schema, &batches, false);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_tables_are_read_back((schema, batches) in tables(false), counted in any::<bool>()) {
        check(&schema, &batches, counted);
    }
}

fn shared(image: &Image) -> u64 {
    let blobs = image.extents().iter().filter(|extent| matches!(extent.span, Span::Blob { .. }));
    blobs.map(|extent| extent.span.len()).sum()
}

#[test]
fn columns_without_nulls_stay_in_their_blobs() {
    use DataType::*;
    let fixed = [Int32, Int64, UInt32, UInt64, Float16, Float32, Float64, Date32, Boolean, FixedSizeBinary(5)];
    let times = [Timestamp(TimeUnit::Nanosecond, None), Time64(TimeUnit::Microsecond), Duration(TimeUnit::Second)];
    for data_type in fixed.into_iter().chain(times).chain([Decimal32(9, 2), Decimal64(18, 2)]) {
        for nullable in [false, true] {
            // Without nulls even where the field may have them.
            let (schema, batches) = one_column(data_type.clone(), false, &[5001, 4000]);
            let schema = Arc::new(Schema::new(vec![schema.field(0).clone().with_nullable(nullable)]));
            let batches: Vec<RecordBatch> =
                batches.iter().map(|b| RecordBatch::try_new(schema.clone(), b.columns().to_vec()).unwrap()).collect();
            let (image, _) = check(&schema, &batches, true);
            assert!(image.size() - shared(&image) < 1500, "{data_type}: {} of {}", shared(&image), image.size());
        }
    }
    for data_type in [Utf8, LargeUtf8, Binary, LargeBinary] {
        let (schema, batches) = one_column(data_type.clone(), false, &[5001, 4000]);
        let (image, _) = check(&schema, &batches, true);
        assert!(shared(&image) > image.size() / 2, "{data_type}");
    }
}

#[test]
fn rows_past_one_group_are_read_back() {
    let schema = Arc::new(Schema::new(vec![
        Field::new("a", DataType::Int64, false),
        Field::new("b", DataType::Boolean, true),
        Field::new("c", DataType::LargeUtf8, false),
        Field::new("d", DataType::Int8, true),
    ]));
    let batches = batches(&schema, &[3, (2 << 20) + 7, 100, 0, 1 << 20], 4);
    let (image, memory) = check(&schema, &batches, true);
    let (builder, _) = read(bytes(&image, &memory));
    let rows: Vec<i64> = builder.metadata().row_groups().iter().map(|group| group.num_rows()).collect();
    assert_eq!(rows, [3, 1 << 20, 1 << 20, 107, 1 << 20]);
}

#[test]
fn sizes_are_known_without_data_where_they_can_be() {
    let memory = Memory::default();
    let known = |data_type, nullable, counted| {
        let (schema, batches) = one_column(data_type, nullable, &[100, 200]);
        size(&table(schema, &batches, &memory, counted)).unwrap().is_some()
    };
    assert!(known(DataType::Float64, false, true));
    assert!(known(DataType::Float64, false, false));
    assert!(!known(DataType::Utf8, false, true));
    assert!(!known(DataType::Int8, false, true));
    let (schema, batches) = one_column(DataType::Utf8, false, &[10]);
    let strings = table(schema, &batches, &memory, true);
    assert_eq!(image(&strings, Counts::Skip).unwrap_err().kind(), Kind::Unsupported);
}

fn runs(values: DataType) -> DataType {
    let ends = Field::new("run_ends", DataType::Int32, false);
    DataType::RunEndEncoded(Arc::new(ends), Arc::new(Field::new("values", values, true)))
}

#[test]
fn runs_are_read_back_as_the_values_they_stand_for() {
    for data_type in flat_types() {
        for rows in [&[][..], &[1], &[1000]] {
            let (schema, batches) = one_column(runs(data_type.clone()), false, rows);
            check(&schema, &batches, true);
            check(&schema, &batches, false);
        }
    }
}

/// A table of one column of these runs.
fn table_of_runs(ends: &[i32], values: ArrayRef) -> (Arc<Schema>, RecordBatch) {
    let array = RunArray::<Int32Type>::try_new(&Int32Array::from(ends.to_vec()), &values).unwrap();
    let schema = Arc::new(Schema::new(vec![Field::new("c", array.data_type().clone(), true)]));
    (schema.clone(), RecordBatch::try_new(schema, vec![Arc::new(array)]).unwrap())
}

#[test]
fn runs_that_go_past_a_row_group_are_cut_and_stay_small() {
    let values = Arc::new(StringArray::from(vec![Some("a"), None, Some("ccc"), Some("a")]));
    let (schema, batch) = table_of_runs(&[3, 1 << 20, (2 << 20) + 5, (2 << 20) + 6], values);
    let (image, _) = check(&schema, &[batch], true);
    assert!(image.size() < 3000, "{} bytes", image.size());
}

#[test]
fn runs_that_stand_for_too_much_are_refused() {
    let refused = |ends: &[i32], values: Vec<String>| {
        let memory = Memory::default();
        let (schema, batch) = table_of_runs(ends, Arc::new(StringArray::from(values)));
        let table = table(schema, &[batch], &memory, true);
        supports(&table).and_then(|()| image(&table, Counts::From(&memory))).map(drop).map_err(|error| error.kind())
    };
    assert_eq!(refused(&[1 << 20], vec!["x".repeat(255)]), Ok(()));
    assert_eq!(refused(&[1 << 20], vec!["x".repeat(257)]), Err(Kind::TooLarge), "too much for memory");
    let many = |count: i32| (1..=count).map(|number| format!("{number:0100}")).collect::<Vec<_>>();
    let each = |count: i32, rows: i32| (1..=count).map(|number| number * rows).collect::<Vec<_>>();
    assert_eq!(refused(&each(6000, 60), many(6000)), Ok(()));
    assert_eq!(refused(&each(6000, 70), many(6000)), Err(Kind::TooLarge), "too much for the file");
    assert_eq!(refused(&[(1 << 27) + 1], vec!["x".into()]), Err(Kind::Unsupported), "too many rows");
}

#[test]
fn types_that_parquet_lacks_are_refused_by_name() {
    let union = DataType::Union(
        arrow_schema::UnionFields::from_fields(vec![Field::new("a", DataType::Int8, true)]),
        arrow_schema::UnionMode::Dense,
    );
    let interval = DataType::Interval(arrow_schema::IntervalUnit::MonthDayNano);
    let nested = DataType::List(Arc::new(Field::new("item", interval.clone(), true)));
    let nested_runs = DataType::List(Arc::new(Field::new("item", runs(DataType::Utf8), true)));
    for data_type in [
        runs(nested.clone()),
        nested_runs,
        union,
        interval,
        nested,
        DataType::Struct(Vec::<Field>::new().into()),
        DataType::Decimal128(10, -2),
    ] {
        let schema =
            Schema::new(vec![Field::new("fine", DataType::Int8, true), Field::new("bad one", data_type, true)]);
        let error = supports(&Table { schema: Arc::new(schema), batches: Vec::new() }).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("bad one"), "{error}");
    }
}

#[test]
fn offsets_that_lie_are_refused() {
    let memory = Memory::default();
    let (schema, batches) = one_column(DataType::LargeUtf8, false, &[4]);
    let good = table(schema, &batches, &memory, true);
    let data = good.batches[0].columns[0].buffers[2].len() as i64;
    for offsets in [[0, 2, 1, 3, 3], [0, 1, 2, 3, data + 1], [-1, 0, 0, 0, 0], [0, 0, 0, 0, i64::MIN]] {
        let mut bad = good.clone();
        let raw: Vec<u8> = offsets.iter().flat_map(|offset: &i64| offset.to_le_bytes()).collect();
        bad.batches[0].columns[0].buffers[1] = memory.add(&raw);
        assert_eq!(image(&bad, Counts::From(&memory)).unwrap_err().kind(), Kind::Malformed, "{offsets:?}");
    }
    let mut gone = good.clone();
    gone.batches[0].columns[0].buffers[1] = Memory::default().add(&[0; 40]);
    assert_eq!(image(&gone, Counts::From(&Memory::default())).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn pages_of_wide_values_stay_small() {
    use crate::dataset::{ArrayLayout, Batch};
    let data_type = DataType::FixedSizeBinary(1 << 20);
    let column = ArrayLayout {
        data_type: data_type.clone(),
        len: 200,
        null_count: Some(0),
        buffers: vec![Span::EMPTY, Span::Zeros(200 << 20)],
        children: Vec::new(),
        dictionary: None,
    };
    let schema = Arc::new(Schema::new(vec![Field::new("c", data_type, true)]));
    let image =
        image(&Table { schema, batches: vec![Batch { rows: 200, columns: vec![column] }] }, Counts::Skip).unwrap();
    let pages: Vec<u64> = image.extents().iter().map(|extent| extent.span.len()).filter(|len| *len > 1 << 20).collect();
    assert_eq!(pages, [64 << 20, 64 << 20, 64 << 20, 8 << 20]);
}

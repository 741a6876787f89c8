//! Types of Parquet files that Arrow's own writers do not write.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use arrow_array::builder::*;
use arrow_array::types::*;
use arrow_array::*;
use arrow_schema::{DataType, Field as ArrowField, Schema, TimeUnit};
use parquet::data_type::{ByteArray, FixedLenByteArray, FixedLenByteArrayType, Int96, Int96Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::tests::*;
use super::*;
use crate::dataset;
use crate::vineyard::Store;
use crate::vineyard::fake::FakeStore;

/// The table that a Parquet file becomes, in one batch.
fn table_of(bytes: Vec<u8>) -> RecordBatch {
    let store = FakeStore::new(64 << 20);
    let temp = Temp::new(bytes);
    let plan = plan(&temp.staged(), Written::Parquet, &attrs(), Limits::default()).unwrap();
    let published = publish(&store, &|_| "x".into(), &plan, &temp.staged(), None).unwrap();
    assert_eq!((&published.warnings, published.outcome), (&Vec::new(), Outcome::Table));
    let meta = meta_of(&store, published.id);
    assert!(bytes_back(&store, &meta) == temp.staged().bytes);
    let dataset::Dataset::Table(table) = dataset::decode(&meta, &store).unwrap() else { panic!("no table") };
    let batches = table.batches.iter().map(|batch| {
        let columns = batch.columns.iter().map(|column| {
            dataset::check(column, &store).unwrap();
            dataset::materialize(column, &store).unwrap()
        });
        RecordBatch::try_new(table.schema.clone(), columns.collect()).unwrap()
    });
    let whole = arrow::compute::concat_batches(&table.schema, &batches.collect::<Vec<_>>()).unwrap();
    store.delete(&[published.id]).unwrap();
    whole
}

/// DuckDB's: months, days and milliseconds.
#[test]
fn intervals_keep_their_months() {
    let schema = parse_message_type(
        "message m { required fixed_len_byte_array(12) i (INTERVAL);
          optional group g { optional fixed_len_byte_array(12) j (INTERVAL); }
          required fixed_len_byte_array(12) raw; }",
    );
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, Arc::new(schema.unwrap()), Default::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let value = |months: u32, days: u32, millis: u32| {
        let bytes: Vec<u8> = [months, days, millis].iter().flat_map(|n| n.to_le_bytes()).collect();
        FixedLenByteArray::from(ByteArray::from(bytes))
    };
    let values = [value(14, 3, 4000), value(5, 0, 1)];
    for levels in [None, Some([2, 1].as_slice()), None] {
        let mut column = group.next_column().unwrap().unwrap();
        let some = if levels.is_some() { &values[..1] } else { &values[..] };
        column.typed::<FixedLenByteArrayType>().write_batch(some, levels, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.close().unwrap();
    let table = table_of(bytes);
    let first = IntervalMonthDayNano::new(14, 3, 4_000_000_000);
    let expected = IntervalMonthDayNanoArray::from(vec![first, IntervalMonthDayNano::new(5, 0, 1_000_000)]);
    assert_eq!(table.column(0).as_ref(), &expected as &dyn Array);
    let nested = table.column(1).as_any().downcast_ref::<StructArray>().unwrap();
    assert_eq!(nested.column(0).as_ref(), &IntervalMonthDayNanoArray::from(vec![Some(first), None]) as &dyn Array);
    assert_eq!(table.column(2).data_type(), &DataType::FixedSizeBinary(12));
}

/// Spark's and Impala's: years that nanoseconds do not reach.
#[test]
fn times_of_96_bits_are_microseconds() {
    let schema = parse_message_type(
        "message m { required int96 t; optional group l (LIST) { repeated group list {
        optional int96 element; } } }",
    );
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, Arc::new(schema.unwrap()), Default::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    // Julian days of 2020-01-01, 9999-12-31 and 0001-01-01, the first with 1.5 seconds.
    let time = |day: u32, nanos: u64| Int96::from(vec![nanos as u32, (nanos >> 32) as u32, day]);
    let values = [time(2_458_850, 1_500_000_000), time(5_373_484, 0), time(1_721_426, 0)];
    for levels in [None, Some(([3, 3, 3].as_slice(), [0, 0, 0].as_slice()))] {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int96Type>().write_batch(&values, levels.map(|l| l.0), levels.map(|l| l.1)).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.close().unwrap();
    let table = table_of(bytes);
    let expected = vec![1_577_836_801_500_000, 253_402_214_400_000_000, -62_135_596_800_000_000];
    let expected = TimestampMicrosecondArray::from(expected);
    assert_eq!(table.column(0).as_ref(), &expected as &dyn Array);
    let lists = table.column(1).as_any().downcast_ref::<ListArray>().unwrap();
    assert_eq!(lists.values().as_ref(), &expected as &dyn Array);
}

/// pyarrow's: seconds are stored as milliseconds, and only the Arrow schema tells the zone.
#[test]
fn times_have_the_zone_that_their_own_column_says() {
    let time = |unit, zone: &str| DataType::Timestamp(unit, Some(zone.into()));
    let fields = |unit, zones: [&str; 4]| {
        let nested = Arc::new(ArrowField::new_list_field(time(unit, zones[2]), true));
        let inside = ArrowField::new("x", time(unit, zones[3]), true);
        Schema::new(vec![
            ArrowField::new("a", time(unit, zones[0]), true),
            ArrowField::new("a", time(unit, zones[1]), true),
            ArrowField::new("l", DataType::List(nested), true),
            ArrowField::new("s", DataType::Struct(vec![inside].into()), true),
        ])
    };
    let zones = ["Europe/Berlin", "America/New_York", "Asia/Tokyo", "Africa/Cairo"];
    let said = fields(TimeUnit::Second, zones);
    let stored = Arc::new(fields(TimeUnit::Millisecond, ["UTC"; 4]));
    let times = || Arc::new(TimestampMillisecondArray::from(vec![1000, 2000]).with_timezone("UTC")) as ArrayRef;
    let DataType::List(item) = stored.field(2).data_type() else { panic!() };
    let DataType::Struct(inside) = stored.field(3).data_type() else { panic!() };
    let offsets = arrow_buffer::OffsetBuffer::from_lengths([1, 1]);
    let list = ListArray::new(item.clone(), offsets, times(), None);
    let columns: Vec<ArrayRef> =
        vec![times(), times(), Arc::new(list), Arc::new(StructArray::new(inside.clone(), vec![times()], None))];
    let batch = RecordBatch::try_new(stored, columns).unwrap();
    let hint = KeyValue::new(parquet::arrow::ARROW_SCHEMA_META_KEY.into(), parquet::arrow::encode_arrow_schema(&said));
    let properties = WriterProperties::builder().set_key_value_metadata(Some(vec![hint])).build();
    let options = parquet::arrow::arrow_writer::ArrowWriterOptions::new();
    let options = options.with_skip_arrow_metadata(true).with_properties(properties);
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new_with_options(&mut bytes, batch.schema(), options).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let table = table_of(bytes);
    let expected = fields(TimeUnit::Millisecond, zones);
    let types = |schema: &Schema| schema.fields().iter().map(|f| f.data_type().to_string()).collect::<Vec<_>>();
    assert_eq!(types(&table.schema()), types(&expected));
}

/// Each row group has its own values, and all together are more than the keys of one reach.
#[test]
fn keys_that_are_too_narrow_become_wider() {
    let word = |i: usize| format!("v{}", i % 300);
    let batch = |start: usize| {
        let mut column = StringDictionaryBuilder::<Int8Type>::new();
        for i in start..start + 100 {
            column.append_option((i % 7 != 3).then(|| word(i)));
        }
        let full: DictionaryArray<Int8Type> = (0..100).map(|i| Some(["p", "q"][i % 2])).collect();
        let columns: [(&str, ArrayRef); 2] = [("k", Arc::new(column.finish())), ("few", Arc::new(full))];
        RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true))).unwrap()
    };
    let batches: Vec<RecordBatch> = (0..4).map(|i| batch(i * 100)).collect();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batches[0].schema(), None).unwrap();
    for batch in &batches {
        writer.write(batch).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    let table = table_of(bytes);
    let keys = |key| DataType::Dictionary(Box::new(key), Box::new(DataType::Utf8));
    assert_eq!(table.schema().field(0).data_type(), &keys(DataType::Int32));
    assert_eq!(table.schema().field(1).data_type(), &keys(DataType::Int8));
    let plain = arrow::compute::cast(table.column(0), &DataType::Utf8).unwrap();
    let expected: StringArray = (0..400).map(|i| (i % 7 != 3).then(|| word(i))).collect();
    assert_eq!(plain.as_ref(), &expected as &dyn Array);
}

/// pandas takes no category twice.
#[test]
fn row_groups_with_values_in_common_have_one_dictionary() {
    let batch = |words: [&str; 4]| {
        let column: DictionaryArray<Int8Type> = words.into_iter().collect();
        RecordBatch::try_from_iter([("k", Arc::new(column) as ArrayRef)]).unwrap()
    };
    let batches = [batch(["b", "a", "b", "b"]), batch(["a", "c", "a", "b"]), batch(["c", "a", "c", "c"])];
    let mut parquet = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut parquet, batches[0].schema(), None).unwrap();
    for batch in &batches {
        writer.write(batch).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    let stream = writer.into_inner().unwrap();
    for (bytes, view) in [(parquet, Written::Parquet), (stream, Written::Arrow)] {
        let store = FakeStore::new(1 << 20);
        let temp = Temp::new(bytes);
        let plan = plan(&temp.staged(), view, &attrs(), Limits::default()).unwrap();
        let published = publish(&store, &|_| "x".into(), &plan, &temp.staged(), None).unwrap();
        let meta = meta_of(&store, published.id);
        same_table(&store, &meta, &batches);
        let dataset::Dataset::Table(table) = dataset::decode(&meta, &store).unwrap() else { panic!("no table") };
        let values = table.batches[0].columns[0].dictionary.as_ref().unwrap();
        let values = dataset::materialize(values, &store).unwrap();
        assert_eq!(values.as_ref(), &StringArray::from(vec!["b", "a", "c"]) as &dyn Array);
    }
}

/// However many columns share the buffers of a message, each byte of it counts once.
#[test]
fn replaced_dictionaries_beside_many_columns() {
    let batch = |word: &str| {
        let words: DictionaryArray<Int8Type> = std::iter::repeat_n(word, 2000).collect();
        let mut columns: Vec<(String, ArrayRef)> = vec![("d".into(), Arc::new(words))];
        let numbers = |i: i64| Arc::new(Int64Array::from_iter_values((0..2000).map(|n| n * i))) as ArrayRef;
        columns.extend((0..30).map(|i| (format!("n{i}"), numbers(i))));
        RecordBatch::try_from_iter(columns).unwrap()
    };
    let batches = ["a", "b", "c"].map(batch);
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    let temp = Temp::new(writer.into_inner().unwrap());
    let limits = |times| Limits { inflated: temp.staged().bytes.len() as u64 * times / 4 };
    let made = plan(&temp.staged(), Written::Arrow, &attrs(), limits(5)).unwrap();
    assert_eq!((made.outcome, made.warnings), (Outcome::Table, Vec::new()));
    let made = plan(&temp.staged(), Written::Arrow, &attrs(), limits(2)).unwrap();
    assert_eq!(made.outcome, Outcome::File);
}

/// What no vineyard client has is stored as it is, and the warning says what it is.
#[test]
fn arrays_of_structured_elements() {
    let header = "{'descr': [('a', '<i4'), ('b', '<f8')], 'fortran_order': False, 'shape': (2,), }";
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend([0; 24]);
    let temp = Temp::new(bytes);
    let made = plan(&temp.staged(), Written::Npy, &attrs(), Limits::default()).unwrap();
    assert_eq!(made.outcome, Outcome::File);
    assert!(made.warnings[0].contains("structured elements"), "{:?}", made.warnings);
}

/// Where only the plain form fits a store, that is what it becomes.
#[test]
fn what_the_store_takes_in_no_other_form_is_plain() {
    let batch = RecordBatch::try_from_iter([("a", Arc::new(Int64Array::from(vec![1])) as ArrayRef)]).unwrap();
    let temp = Temp::new(arrow_bytes(&[batch], Default::default()));
    let store = FakeStore::new(128 << 20);
    store.fail_next(crate::vineyard::fake::Op::CreateObjects, 1, Kind::TooLarge);
    let made = plan(&temp.staged(), Written::Arrow, &attrs(), Limits::default()).unwrap();
    let published = publish(&store, &|_| "x".into(), &made, &temp.staged(), None).unwrap();
    assert_eq!((published.outcome, published.warnings.len()), (Outcome::File, 1));
}

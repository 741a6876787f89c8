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

/// The table that a Parquet file becomes, in one batch, without a warning.
fn table_of(bytes: Vec<u8>) -> RecordBatch {
    let (table, warnings) = table_and_warnings(bytes);
    assert_eq!(warnings, Vec::<String>::new());
    table
}

fn table_and_warnings(bytes: Vec<u8>) -> (RecordBatch, Vec<String>) {
    let store = FakeStore::new(64 << 20);
    let temp = Temp::new(bytes);
    let plan = plan(&temp.staged(), Written::Parquet, &attrs(), Limits::default()).unwrap();
    let published = publish(&store, &|_| "x".into(), &plan, &temp.staged(), None).unwrap();
    assert_eq!(published.outcome, Outcome::Table);
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
    (whole, published.warnings)
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

/// Nanoseconds since 1970, which any number of them are.
fn time_of_96_bits(nanos: i128) -> Int96 {
    const DAY: i128 = 86_400_000_000_000;
    let (day, of_day) = (nanos.div_euclid(DAY) + 2_440_588, nanos.rem_euclid(DAY) as u64);
    Int96::from(vec![of_day as u32, (of_day >> 32) as u32, day as u32])
}

/// A file of columns of such times, each as a column and in lists with a null, and without an Arrow schema. Each list is a
/// row group.
pub(super) fn times_of_96_bits(groups: &[&[&[i128]]]) -> Vec<u8> {
    let columns = (0..groups[0].len()).map(|i| {
        format!(
            "required int96 t{i}; optional group l{i} (LIST) {{ repeated group list {{ optional int96 element; }} }}"
        )
    });
    let schema = parse_message_type(&format!("message m {{ {} }}", columns.collect::<String>()));
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, Arc::new(schema.unwrap()), Default::default()).unwrap();
    for columns in groups {
        let mut group = file.next_row_group().unwrap();
        for values in *columns {
            let values: Vec<Int96> = values.iter().map(|nanos| time_of_96_bits(*nanos)).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int96Type>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
            // The last row's list has a null behind the time.
            let mut levels = (vec![3; values.len()], vec![0; values.len()]);
            levels.0.push(2);
            levels.1.push(1);
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int96Type>().write_batch(&values, Some(&levels.0), Some(&levels.1)).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    file.close().unwrap();
    bytes
}

/// Column `i` of [`times_of_96_bits`], and the values of its lists without the nulls.
fn column_and_lists(table: &RecordBatch, i: usize) -> [ArrayRef; 2] {
    let lists = table.column(2 * i + 1).as_any().downcast_ref::<ListArray>().unwrap().values();
    let valid = arrow::compute::is_not_null(lists).unwrap();
    [table.column(2 * i).clone(), arrow::compute::filter(lists, &valid).unwrap()]
}

/// Spark's and Impala's: years that nanoseconds do not reach.
#[test]
fn times_of_96_bits_are_microseconds_where_nanoseconds_do_not_reach() {
    // 2020-01-01 and 1.5 seconds, 9999-12-31 and 0001-01-01.
    let seconds = [1_577_836_801_500, 253_402_214_400_000, -62_135_596_800_000].map(|millis: i128| millis * 1_000_000);
    let near = [1_577_836_801_123_456_789, 0, -1];
    let table = table_of(times_of_96_bits(&[&[&seconds, &near]]));
    let expected = vec![1_577_836_801_500_000, 253_402_214_400_000_000, -62_135_596_800_000_000];
    let expected = TimestampMicrosecondArray::from(expected);
    assert_eq!(column_and_lists(&table, 0).map(|a| a.as_ref() == &expected as &dyn Array), [true; 2]);
    // Another column keeps what it has.
    let expected = TimestampNanosecondArray::from(vec![1_577_836_801_123_456_789, 0, -1]);
    assert_eq!(column_and_lists(&table, 1).map(|a| a.as_ref() == &expected as &dyn Array), [true; 2]);
}

#[test]
fn times_of_96_bits_keep_the_last_nanosecond() {
    let ends = [i64::MAX, i64::MIN, 0].map(i128::from);
    let table = table_of(times_of_96_bits(&[&[&ends], &[&[1]]]));
    let expected = TimestampNanosecondArray::from(vec![i64::MAX, i64::MIN, 0, 1]);
    assert_eq!(column_and_lists(&table, 0).map(|a| a.as_ref() == &expected as &dyn Array), [true; 2]);
}

/// One value further, in a row group behind one of whole nanoseconds.
#[test]
fn times_of_96_bits_that_need_both_keep_the_years_and_say_so() {
    for (past, micros) in
        [(i128::from(i64::MAX) + 1, 9_223_372_036_854_775), (i128::from(i64::MIN) - 1, -9_223_372_036_854_776)]
    {
        let (table, warnings) = table_and_warnings(times_of_96_bits(&[&[&[1001, 0]], &[&[past]]]));
        let expected = TimestampMicrosecondArray::from(vec![1, 0, micros]);
        assert_eq!(column_and_lists(&table, 0).map(|a| a.as_ref() == &expected as &dyn Array), [true; 2]);
        let names = ["\"t0\"", "\"l0.list.element\""];
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings.iter().zip(names).all(|(text, name)| text.contains(name)), "{warnings:?}");
    }
    // Not even microseconds reach this one: what no column can say stays a file.
    let temp = Temp::new(times_of_96_bits(&[&[&[i128::from(i64::MAX) * 1000 + 1000]]]));
    let made = plan(&temp.staged(), Written::Parquet, &attrs(), Limits::default()).unwrap();
    assert_eq!((made.outcome, made.warnings.len()), (Outcome::File, 1));
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

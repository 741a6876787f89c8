use std::io::Cursor;

use arrow_array::RecordBatch;
use arrow_ipc::reader::FileReader;
use arrow_schema::{Field, Fields};
use proptest::prelude::*;

use super::super::testing::{Memory, Random, arrow_only_types, batches, bytes, flat_types, layout, table, tables};
use super::*;

fn read(bytes: Vec<u8>) -> (Arc<Schema>, Vec<RecordBatch>) {
    let reader = FileReader::try_new(Cursor::new(bytes), None).unwrap();
    let schema = reader.schema();
    (schema, reader.map(|batch| batch.unwrap()).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_laid_out_is_read_back((schema, batches) in tables(true), counted in any::<bool>(), cuts in any::<u64>()) {
        let memory = Memory::default();
        let table = table(schema.clone(), &batches, &memory, counted);
        let image = image(&table, Counts::From(&memory)).unwrap();
        let whole = bytes(&image, &memory);
        prop_assert_eq!(super::image(&table, Counts::Skip).unwrap().size(), image.size());
        let (read_schema, read_batches) = read(whole.clone());
        prop_assert_eq!(&read_schema, &schema);
        prop_assert_eq!(read_batches, batches);
        // Any part is that part of the whole.
        let mut random = Random(cuts);
        for _ in 0..8 {
            let start = random.below(whole.len());
            let end = start + random.below(whole.len() - start + 1);
            let mut part = vec![0xaa; end - start];
            image.read(&memory, start as u64, &mut part).unwrap();
            prop_assert_eq!(&part[..], &whole[start..end]);
        }
    }
}

fn one_column(data_type: DataType, rows: &[usize]) -> (Arc<Schema>, Vec<RecordBatch>) {
    let schema = Arc::new(Schema::new(vec![Field::new("c", data_type, true)]));
    let batches = batches(&schema, rows, 7);
    (schema, batches)
}

#[test]
fn every_flat_type_is_read_back() {
    for data_type in flat_types().into_iter().chain(arrow_only_types()) {
        for rows in [&[][..], &[0], &[1], &[63, 0, 65], &[1000]] {
            let memory = Memory::default();
            let (schema, batches) = one_column(data_type.clone(), rows);
            let image = image(&table(schema, &batches, &memory, false), Counts::From(&memory)).unwrap();
            assert_eq!(read(bytes(&image, &memory)).1, batches, "{data_type}");
        }
    }
}

#[test]
fn buffers_are_aligned_in_the_file_and_come_from_blobs() {
    let memory = Memory::default();
    let schema = Arc::new(Schema::new(vec![
        Field::new("a", DataType::Float64, false),
        Field::new("b", DataType::LargeUtf8, true),
        Field::new("c", DataType::Int8, true),
    ]));
    let batches = batches(&schema, &[1001, 999], 3);
    let image = image(&table(schema, &batches, &memory, false), Counts::From(&memory)).unwrap();
    let from_blobs: Vec<_> = image.extents().iter().filter(|extent| matches!(extent.span, Span::Blob { .. })).collect();
    assert!(from_blobs.len() >= 8);
    assert!(from_blobs.iter().all(|extent| extent.start % 64 == 0));
}

#[test]
fn rows_without_columns_are_kept() {
    let schema = Arc::new(Schema::empty());
    let table = Table { schema, batches: vec![crate::dataset::Batch { rows: 5, columns: Vec::new() }] };
    let image = image(&table, Counts::Skip).unwrap();
    let (_, batches) = read(bytes(&image, &Memory::default()));
    assert_eq!(batches[0].num_rows(), 5);
}

#[test]
fn arrays_that_do_not_fit_their_type_are_refused() {
    let (schema, batches) = one_column(DataType::Utf8, &[10]);
    let memory = Memory::default();
    let good = table(schema.clone(), &batches, &memory, true);
    let refused = |change: &dyn Fn(&mut ArrayLayout)| {
        let mut bad = good.clone();
        change(&mut bad.batches[0].columns[0]);
        image(&bad, Counts::Skip).unwrap_err().kind()
    };
    assert!(image(&good, Counts::Skip).is_ok());
    assert_eq!(refused(&|c| c.len = 11), Kind::Malformed);
    assert_eq!(refused(&|c| c.null_count = Some(11)), Kind::Malformed);
    assert_eq!(refused(&|c| c.buffers.truncate(2)), Kind::Malformed);
    assert_eq!(refused(&|c| c.buffers.push(Span::EMPTY)), Kind::Malformed);
    assert_eq!(refused(&|c| c.buffers[1] = Span::Zeros(40)), Kind::Malformed);
    assert_eq!(refused(&|c| c.data_type = DataType::Binary), Kind::Malformed);
    assert_eq!(refused(&|c| c.children.push(c.clone())), Kind::Malformed);
    assert_eq!(refused(&|c| c.dictionary = Some(Arc::new(c.clone()))), Kind::Malformed);
    let mut huge = good.clone();
    huge.batches[0].rows = u64::MAX;
    huge.batches[0].columns[0].len = u64::MAX;
    assert!(matches!(image(&huge, Counts::Skip).unwrap_err().kind(), Kind::Malformed | Kind::TooLarge));
}

#[test]
fn sums_past_what_can_be_counted_are_refused() {
    let schema =
        Arc::new(Schema::new(vec![Field::new("a", DataType::Int8, false), Field::new("b", DataType::Int8, false)]));
    let column = ArrayLayout {
        data_type: DataType::Int8,
        len: i64::MAX as u64 - 100,
        null_count: Some(0),
        buffers: vec![Span::EMPTY, Span::Zeros(i64::MAX as u64 - 100)],
        children: Vec::new(),
        dictionary: None,
    };
    let batch = crate::dataset::Batch { rows: column.len, columns: vec![column.clone(), column] };
    let error = image(&Table { schema, batches: vec![batch] }, Counts::Skip).unwrap_err();
    assert_eq!(error.kind(), Kind::TooLarge);
}

#[test]
fn dictionaries_inside_dictionaries_get_their_ids_in_order() {
    let memory = Memory::default();
    let inner = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
    let fields = Fields::from(vec![Field::new("x", inner.clone(), true), Field::new("y", DataType::Int32, true)]);
    let outer = DataType::Dictionary(Box::new(DataType::Int16), Box::new(DataType::Struct(fields)));
    let schema = Arc::new(Schema::new(vec![Field::new("a", inner, true), Field::new("b", outer, true)]));
    let batches = batches(&schema, &[40, 30], 5);
    let table = table(schema, &batches, &memory, false);
    let image = super::image(&table, Counts::From(&memory)).unwrap();
    assert_eq!(read(bytes(&image, &memory)).1, batches);
}

#[test]
fn different_dictionaries_of_one_column_are_refused() {
    let memory = Memory::default();
    let dictionary = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
    let (schema, batches) = one_column(dictionary.clone(), &[40, 30]);
    let mut table = table(schema, &batches, &memory, false);
    let other = super::super::testing::array(&mut Random(99), &DataType::Utf8, false, 3);
    table.batches[1].columns[0].dictionary = Some(Arc::new(layout(&other.to_data(), &memory, true)));
    assert_eq!(image(&table, Counts::Skip).unwrap_err().kind(), Kind::Unsupported);
    let nested = DataType::Dictionary(Box::new(DataType::Int8), Box::new(dictionary));
    let schema = Arc::new(Schema::new(vec![Field::new("c", nested, true)]));
    assert_eq!(image(&Table { schema, batches: Vec::new() }, Counts::Skip).unwrap_err().kind(), Kind::Unsupported);
}

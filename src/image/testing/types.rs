//! Random types and tables.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{DataType, Field, Fields, IntervalUnit, Schema, TimeUnit, UnionFields, UnionMode};
use proptest::prelude::*;

use super::{batches, hides_nulls};

/// The types without children.
pub fn flat_types() -> Vec<DataType> {
    use DataType::*;
    vec![
        Boolean,
        Int8,
        Int16,
        Int32,
        Int64,
        UInt8,
        UInt16,
        UInt32,
        UInt64,
        Float16,
        Float32,
        Float64,
        Date32,
        Date64,
        Time32(TimeUnit::Second),
        Time32(TimeUnit::Millisecond),
        Time64(TimeUnit::Microsecond),
        Time64(TimeUnit::Nanosecond),
        Timestamp(TimeUnit::Second, None),
        Timestamp(TimeUnit::Millisecond, None),
        Timestamp(TimeUnit::Microsecond, Some("Europe/Paris".into())),
        Timestamp(TimeUnit::Nanosecond, Some("+02:00".into())),
        Duration(TimeUnit::Second),
        Duration(TimeUnit::Nanosecond),
        Utf8,
        LargeUtf8,
        Binary,
        LargeBinary,
        Utf8View,
        BinaryView,
        FixedSizeBinary(3),
        FixedSizeBinary(16),
        Decimal32(9, 2),
        Decimal64(18, 2),
        Decimal128(38, 3),
        Decimal128(5, 1),
        Decimal256(76, 4),
        Null,
    ]
}

/// Types that Parquet lacks.
pub fn arrow_only_types() -> Vec<DataType> {
    use DataType::*;
    vec![Interval(IntervalUnit::YearMonth), Interval(IntervalUnit::DayTime), Interval(IntervalUnit::MonthDayNano)]
}

/// Random types; with `all`, those that Parquet lacks too.
pub fn types(all: bool) -> impl Strategy<Value = DataType> {
    let mut flat = flat_types();
    if all {
        flat.extend(arrow_only_types());
    }
    let leaf = proptest::sample::select(flat);
    leaf.prop_recursive(3, 12, 3, move |inner| {
        let field = (inner.clone(), any::<bool>())
            .prop_map(|(t, nullable)| Arc::new(Field::new("item", t.clone(), nullable || hides_nulls(&t))));
        let fields = proptest::collection::vec(field.clone(), 1..4).prop_map(|fields| {
            fields.iter().enumerate().map(|(i, f)| f.as_ref().clone().with_name(format!("f{i}"))).collect::<Fields>()
        });
        let keys = proptest::sample::select(vec![DataType::Int8, DataType::UInt16, DataType::Int32, DataType::UInt64]);
        let dictionary = (keys, inner.clone()).prop_filter_map("no dictionary of dictionaries", |(key, value)| {
            let flat = !value.is_nested() && !matches!(value, DataType::Dictionary(..) | DataType::Null);
            flat.then(|| DataType::Dictionary(Box::new(key), Box::new(value)))
        });
        let mut choices = vec![
            field.clone().prop_map(DataType::List).boxed(),
            field.clone().prop_map(DataType::LargeList).boxed(),
            (field.clone(), 0i32..4)
                .prop_map(move |(f, n)| DataType::FixedSizeList(f, if all { n } else { n.max(1) }))
                .boxed(),
            fields.clone().prop_map(DataType::Struct).boxed(),
            dictionary.boxed(),
            field
                .clone()
                .prop_map(|f| {
                    let entries = Fields::from(vec![
                        Field::new("key", DataType::Utf8, false),
                        f.as_ref().clone().with_name("value"),
                    ]);
                    DataType::Map(Arc::new(Field::new("entries", DataType::Struct(entries), false)), false)
                })
                .boxed(),
        ];
        if all {
            let union = |fields: Fields, mode| {
                DataType::Union(UnionFields::from_fields(fields.iter().cloned().collect::<Vec<_>>()), mode)
            };
            choices.extend([
                field.clone().prop_map(DataType::ListView).boxed(),
                field.clone().prop_map(DataType::LargeListView).boxed(),
                fields.clone().prop_map(move |f| union(f, UnionMode::Dense)).boxed(),
                fields.prop_map(move |f| union(f, UnionMode::Sparse)).boxed(),
                field
                    .prop_map(|f| {
                        let ends = Arc::new(Field::new("run_ends", DataType::Int32, false));
                        DataType::RunEndEncoded(ends, Arc::new(f.as_ref().clone().with_name("values")))
                    })
                    .boxed(),
            ]);
        }
        proptest::strategy::Union::new(choices)
    })
}

/// A schema and batches of random arrays; the batches of one column share their dictionaries.
pub fn tables(all: bool) -> impl Strategy<Value = (Arc<Schema>, Vec<RecordBatch>)> {
    let column = (types(all), any::<bool>());
    (proptest::collection::vec(column, 0..5), proptest::collection::vec(0usize..70, 0..4), any::<u64>()).prop_map(
        |(columns, rows, seed)| {
            let fields: Vec<Field> = columns
                .iter()
                .enumerate()
                .map(|(i, (t, nullable))| {
                    Field::new(format!("c{i}"), t.clone(), *nullable || hides_nulls(t)).with_metadata(
                        [(format!("key{i}"), "value".to_string())]
                            .into_iter()
                            .collect::<std::collections::HashMap<_, _>>(),
                    )
                })
                .collect();
            let metadata: std::collections::HashMap<String, String> = [("pandas".to_string(), "{}".to_string())].into();
            let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
            (schema.clone(), batches(&schema, &rows, seed))
        },
    )
}

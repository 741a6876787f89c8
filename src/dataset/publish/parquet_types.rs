//! The Arrow types of a Parquet file: as the parquet crate (60.1) reads its columns, and as they are stored.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, IntervalMonthDayNanoArray, make_array};
use arrow_buffer::IntervalMonthDayNano;
use arrow_data::ArrayData;
use arrow_schema::{DataType, Field, FieldRef, Fields, IntervalUnit, Schema, TimeUnit};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::basic::{ConvertedType, Type as Physical};
use parquet::errors::ParquetError;
use parquet::schema::types::{SchemaDescriptor, Type, TypePtr};

use super::ipc::arrow;
use crate::error::{Error, Result};

/// Most bytes that the strings of one piece may have: a dictionary of one long string can stand for any number of them.
const MAX_STRINGS: u64 = 2 << 30;
/// Arrow's type for Parquet's months, days and milliseconds. The crate reads them as days and milliseconds.
const INTERVAL: DataType = DataType::Interval(IntervalUnit::MonthDayNano);
/// How an [`INTERVAL`] is read.
const INTERVAL_BYTES: DataType = DataType::FixedSizeBinary(12);

/// The Arrow schema that a file's writer kept in its footer, if it did.
pub(super) fn said_schema(metadata: &ArrowReaderMetadata) -> Option<Schema> {
    let pairs = metadata.metadata().file_metadata().key_value_metadata()?;
    let text = pairs.iter().find(|pair| pair.key == parquet::arrow::ARROW_SCHEMA_META_KEY)?.value.as_ref()?;
    let bytes = BASE64_STANDARD.decode(text).ok()?;
    arrow_ipc::convert::try_schema_from_ipc_buffer(&bytes).ok()
}

/// The fields as they are stored. `said` is what the file's writer said of them; where that is nothing, `times` has the
/// units of leaves that are times of 96 bits.
pub(super) fn stored(metadata: &ArrowReaderMetadata, said: Option<&Schema>, times: Vec<Option<TimeUnit>>) -> Fields {
    let mut times = times.into_iter();
    let fields = metadata.schema().fields().iter().enumerate().map(|(i, field)| {
        let field = match said {
            Some(said) => with_zones(field, said.fields().get(i)),
            None => without_hints(field, &mut times),
        };
        read_field(&field, true)
    });
    fields.collect()
}

/// The same field with another type for each child, and as a whole where it has none.
fn map_leaves(field: &FieldRef, leaf: &mut dyn FnMut(&DataType) -> DataType) -> FieldRef {
    use DataType::*;
    let mut child = |f: &FieldRef| map_leaves(f, leaf);
    let data_type = match field.data_type() {
        List(f) => List(child(f)),
        LargeList(f) => LargeList(child(f)),
        ListView(f) => ListView(child(f)),
        LargeListView(f) => LargeListView(child(f)),
        FixedSizeList(f, n) => FixedSizeList(child(f), *n),
        Map(f, sorted) => Map(child(f), *sorted),
        Struct(fields) => Struct(fields.iter().map(child).collect()),
        other => leaf(other),
    };
    Arc::new(field.as_ref().clone().with_data_type(data_type))
}

/// What no Arrow schema tells: intervals have months, and times of 96 bits the unit that `times` has for each leaf.
fn without_hints(field: &FieldRef, times: &mut dyn Iterator<Item = Option<TimeUnit>>) -> FieldRef {
    map_leaves(field, &mut |leaf| match (leaf, times.next().flatten()) {
        (DataType::Timestamp(_, None), Some(unit)) => DataType::Timestamp(unit, None),
        (DataType::Interval(_), _) => INTERVAL,
        (other, _) => other.clone(),
    })
}

/// Times in the zone that the writer said. The crate takes its word only where the unit is the same too, and Parquet has
/// no seconds.
fn with_zones(field: &FieldRef, said: Option<&FieldRef>) -> FieldRef {
    use DataType::*;
    let Some(said) = said else { return field.clone() };
    let data_type = match (field.data_type(), said.data_type()) {
        (Timestamp(unit, Some(_)), Timestamp(_, Some(zone))) => Timestamp(*unit, Some(zone.clone())),
        (List(f), List(said) | LargeList(said)) => List(with_zones(f, Some(said))),
        (LargeList(f), List(said) | LargeList(said)) => LargeList(with_zones(f, Some(said))),
        (FixedSizeList(f, n), FixedSizeList(said, _)) => FixedSizeList(with_zones(f, Some(said)), *n),
        (Map(f, sorted), Map(said, _)) => Map(with_zones(f, Some(said)), *sorted),
        (Struct(fields), Struct(said)) if fields.len() == said.len() => {
            Struct(fields.iter().zip(said).map(|(f, said)| with_zones(f, Some(said))).collect())
        }
        _ => return field.clone(),
    };
    Arc::new(field.as_ref().clone().with_data_type(data_type))
}

/// The field as it is read: dictionaries are kept at the top level (batches of nested ones cannot share one dictionary
/// here), and for values that the crate reads as one: not for what is stored in fixed-length byte arrays or bits.
fn read_field(field: &FieldRef, top: bool) -> FieldRef {
    use DataType::*;
    map_leaves(field, &mut |leaf| match leaf {
        Dictionary(_, values) => match values.as_ref() {
            Boolean | Float16 | FixedSizeBinary(_) => values.as_ref().clone(),
            Decimal32(..) | Decimal64(..) | Decimal128(..) | Decimal256(..) => values.as_ref().clone(),
            _ if top && leaf == field.data_type() => leaf.clone(),
            values => values.clone(),
        },
        other => other.clone(),
    })
}

/// The Parquet schema without the annotation of intervals, whose bytes are read as they are then; `None` if it has none.
pub(super) fn without_intervals(schema: &SchemaDescriptor) -> Result<Option<SchemaDescriptor>> {
    fn plain(parquet: &Type) -> std::result::Result<Type, ParquetError> {
        let info = parquet.get_basic_info();
        let id = info.has_id().then(|| info.id());
        if parquet.is_primitive() {
            if info.converted_type() != ConvertedType::INTERVAL {
                return Ok(parquet.clone());
            }
            let builder = Type::primitive_type_builder(parquet.name(), Physical::FIXED_LEN_BYTE_ARRAY);
            return builder.with_length(12).with_repetition(info.repetition()).with_id(id).build();
        }
        let fields = parquet.get_fields().iter().map(|field| plain(field).map(Arc::new));
        let mut builder = Type::group_type_builder(parquet.name())
            .with_fields(fields.collect::<std::result::Result<Vec<TypePtr>, _>>()?)
            .with_converted_type(info.converted_type())
            .with_logical_type(info.logical_type_ref().cloned())
            .with_id(id);
        if info.has_repetition() {
            builder = builder.with_repetition(info.repetition());
        }
        builder.build()
    }
    if schema.columns().iter().all(|leaf| leaf.converted_type() != ConvertedType::INTERVAL) {
        return Ok(None);
    }
    let root = plain(schema.root_schema()).map_err(super::parquet_file::broken)?;
    Ok(Some(SchemaDescriptor::new(Arc::new(root))))
}

/// The type as the crate is to read it: with views for strings and binaries, which take no more memory than their pages
/// then, however often they repeat, and intervals as bytes.
pub(super) fn viewed(data_type: &DataType) -> DataType {
    use DataType::*;
    let child = |f: &FieldRef| Arc::new(f.as_ref().clone().with_data_type(viewed(f.data_type())));
    match data_type {
        Utf8 | LargeUtf8 => Utf8View,
        Binary | LargeBinary => BinaryView,
        List(f) => List(child(f)),
        LargeList(f) => LargeList(child(f)),
        FixedSizeList(f, n) => FixedSizeList(child(f), *n),
        Struct(fields) => Struct(fields.iter().map(child).collect::<Fields>()),
        Map(f, sorted) => Map(map_leaves(f, &mut interval_bytes), *sorted),
        other => interval_bytes(other),
    }
}

fn interval_bytes(leaf: &DataType) -> DataType {
    if *leaf == INTERVAL { INTERVAL_BYTES } else { leaf.clone() }
}

/// The array in the wanted type: views become strings, if they are not too many bytes, and bytes intervals.
pub(super) fn expand(array: ArrayRef, data_type: &DataType, most: u64) -> Result<ArrayRef> {
    if array.data_type() == data_type {
        return Ok(array);
    }
    let bytes = string_bytes(&array.to_data());
    if bytes > MAX_STRINGS.min(most) {
        return Err(Error::malformed(format!("{bytes} bytes of strings in a piece of {} rows", array.len())));
    }
    let array = make_array(intervals(array.to_data(), data_type)?);
    if array.data_type() == data_type {
        return Ok(array);
    }
    arrow::compute::cast(&array, data_type).map_err(arrow)
}

/// The array with intervals where the wanted type has them.
fn intervals(data: ArrayData, wanted: &DataType) -> Result<ArrayData> {
    use DataType::*;
    if *data.data_type() == INTERVAL_BYTES && *wanted == INTERVAL {
        let bytes = data.buffers().first().map(|b| b.as_slice()).unwrap_or_default();
        let word = |value: &[u8], i: usize| u32::from_le_bytes([value[i], value[i + 1], value[i + 2], value[i + 3]]);
        let of = |value: &[u8]| {
            let (months, days) = (word(value, 0) as i32, word(value, 4) as i32);
            IntervalMonthDayNano::new(months, days, i64::from(word(value, 8)) * 1_000_000)
        };
        let values: Vec<_> = bytes.chunks_exact(12).skip(data.offset()).take(data.len()).map(of).collect();
        let array = IntervalMonthDayNanoArray::try_new(values.into(), data.nulls().cloned()).map_err(arrow)?;
        return Ok(array.into_data());
    }
    let wanted: Vec<&DataType> = match wanted {
        List(f) | LargeList(f) | FixedSizeList(f, _) | Map(f, _) => vec![f.data_type()],
        Struct(fields) => fields.iter().map(|f| f.data_type()).collect(),
        _ => return Ok(data),
    };
    let children = data.child_data().iter().cloned().zip(wanted);
    let children = children.map(|(child, wanted)| intervals(child, wanted)).collect::<Result<Vec<_>>>()?;
    let mut types = children.iter().map(|child| child.data_type().clone());
    let mut child = |f: &FieldRef| {
        let data_type = types.next().unwrap_or(DataType::Null);
        Arc::new(Field::clone(f).with_data_type(data_type))
    };
    let data_type = match data.data_type() {
        List(f) => List(child(f)),
        LargeList(f) => LargeList(child(f)),
        FixedSizeList(f, n) => FixedSizeList(child(f), *n),
        Map(f, sorted) => Map(child(f), *sorted),
        Struct(fields) => Struct(fields.iter().map(child).collect()),
        _ => return Ok(data),
    };
    data.into_builder().data_type(data_type).child_data(children).build().map_err(arrow)
}

/// Sum of the lengths of all views in an array.
fn string_bytes(data: &ArrayData) -> u64 {
    if matches!(data.data_type(), DataType::Utf8View | DataType::BinaryView) {
        let views = data.buffers().first().map(|b| b.as_slice()).unwrap_or_default();
        return views
            .chunks_exact(16)
            .skip(data.offset())
            .take(data.len())
            .map(|view| u64::from(u32::from_le_bytes([view[0], view[1], view[2], view[3]])))
            .sum();
    }
    data.child_data().iter().map(string_bytes).sum()
}

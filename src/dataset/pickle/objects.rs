//! Columns of Python objects: strings, numbers, times, lists and tuples of one kind become Arrow arrays.

use arrow_schema::{DataType, TimeUnit};

use super::MAX_DEPTH;
use super::column::{Elements, NdArray, nd_array, resolution, time_zone};
use super::machine::{Loaded, Ref, Stop, Value, unknown};
use crate::dataset::Span;
use crate::dataset::column::{Column, item, offsets};
use crate::dataset::derive;
use crate::dataset::table::ArrayLayout;
use crate::vineyard::BlobSource;

/// Most bytes of binary cells that are copied.
const MAX_BINARY: u64 = 64 << 20;

/// What one cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Missing,
    Nan,
    Bool,
    Int,
    Float,
    Str,
    Bytes,
    List,
    Array,
    Timestamp,
    Date,
    Other,
}

fn kind(loaded: &Loaded, at: Ref) -> Kind {
    match loaded.value(at) {
        Some(Value::Float(f)) if f.is_nan() => Kind::Nan,
        _ if is_missing(loaded, at) => Kind::Missing,
        Some(Value::Bool(_)) => Kind::Bool,
        Some(Value::Int(_)) => Kind::Int,
        Some(Value::Float(_)) => Kind::Float,
        Some(Value::Str { .. }) => Kind::Str,
        Some(Value::Bytes { .. }) => Kind::Bytes,
        Some(Value::List(_)) => Kind::List,
        Some(Value::Call { .. }) => match loaded.called(at).map(|call| (call.module, call.name)) {
            Some(("pandas._libs.tslibs.timestamps", "_unpickle_timestamp")) => Kind::Timestamp,
            Some(("datetime", "date")) => Kind::Date,
            Some((module, "_frombuffer" | "_reconstruct")) if module.starts_with("numpy") => Kind::Array,
            _ => Kind::Other,
        },
        _ => Kind::Other,
    }
}

/// `None`, `pandas.NA` and `pandas.NaT`.
pub fn is_missing(loaded: &Loaded, at: Ref) -> bool {
    match loaded.value(at) {
        Some(Value::None) => true,
        Some(Value::Global { .. }) => matches!(loaded.global(at), Some((m, "NA" | "NaT")) if m.starts_with("pandas")),
        Some(Value::Call { .. }) => loaded.called(at).is_some_and(|call| {
            call.module.starts_with("pandas._libs.tslibs.nattype") && matches!(call.name, "_nat_unpickle" | "NaTType")
        }),
        _ => false,
    }
}

/// Validity bits, and how many are 0; no bits if none is.
fn validity(missing: &[bool]) -> (Span, u64) {
    let nulls = missing.iter().filter(|m| **m).count() as u64;
    if nulls == 0 {
        return (Span::EMPTY, 0);
    }
    let pack = |group: &[bool]| group.iter().enumerate().fold(0u8, |byte, (i, m)| byte | (u8::from(!m) << i));
    (Span::literal(missing.chunks(8).map(pack).collect::<Vec<u8>>()), nulls)
}

/// Objects as the narrowest fitting type.
pub fn column(loaded: &Loaded, items: &[Ref], depth: usize, source: &dyn BlobSource) -> Result<Column, Stop> {
    if depth > MAX_DEPTH {
        return unknown("lists nested too deep");
    }
    let kinds: Vec<Kind> = items.iter().map(|at| kind(loaded, *at)).collect();
    let has = |kind: Kind| kinds.contains(&kind);
    let only = |allowed: &[Kind]| kinds.iter().all(|k| allowed.contains(k));
    let len = items.len() as u64;
    // NaN among numbers is a number; among other things it is pandas' old way to say "missing".
    let numbers = has(Kind::Float) || has(Kind::Int);
    let missing: Vec<bool> = kinds.iter().map(|k| *k == Kind::Missing || (*k == Kind::Nan && !numbers)).collect();
    let (bitmap, nulls) = validity(&missing);
    let fixed = |data_type: DataType, bytes: Vec<u8>| {
        let buffers = vec![bitmap.clone(), Span::literal(bytes)];
        Ok(Column::new(ArrayLayout::flat(data_type, len, Some(nulls), buffers)).with_numpy_type("object"))
    };
    use Kind::{Array, Bool, Bytes, Date, Float, Int, List, Missing, Nan, Str, Timestamp};
    if only(&[Missing]) {
        return Ok(Column::new(ArrayLayout::null(len)));
    }
    if only(&[Missing, Nan]) {
        let bytes: Vec<u8> = kinds.iter().flat_map(|_| f64::NAN.to_le_bytes()).collect();
        let (bitmap, nulls) = validity(&kinds.iter().map(|k| *k == Missing).collect::<Vec<_>>());
        let buffers = vec![bitmap, Span::literal(bytes)];
        let layout = ArrayLayout::flat(DataType::Float64, len, Some(nulls), buffers);
        return Ok(Column::new(layout).with_numpy_type("object"));
    }
    if only(&[Missing, Nan, Str]) {
        let texts = items.iter().map(|at| loaded.text(*at).unwrap_or_default().as_bytes());
        return Ok(strings(DataType::LargeUtf8, texts, bitmap, nulls));
    }
    if only(&[Missing, Nan, Bool]) {
        let bits: Vec<bool> = items.iter().map(|at| matches!(loaded.value(*at), Some(Value::Bool(false)))).collect();
        let (data, falses) = validity(&bits);
        let data = if falses == 0 { Span::literal(vec![0xff; items.len().div_ceil(8)]) } else { data };
        let layout = ArrayLayout::flat(DataType::Boolean, len, Some(nulls), vec![bitmap, data]);
        return Ok(Column::new(layout).with_numpy_type("object"));
    }
    if only(&[Missing, Int]) {
        let value = |at: &Ref| loaded.int(*at).unwrap_or_default().to_le_bytes();
        return fixed(DataType::Int64, items.iter().flat_map(value).collect());
    }
    if only(&[Missing, Nan, Int, Float]) {
        // An integer that a float can't hold would change.
        let exact = |at: &Ref| loaded.int(*at).is_none_or(|n| n.unsigned_abs() <= 1 << 53);
        if !items.iter().all(exact) {
            return unknown("large integers among floats");
        }
        let value = |at: &Ref| match loaded.value(*at) {
            Some(Value::Float(f)) => f.to_le_bytes(),
            _ => (loaded.int(*at).unwrap_or_default() as f64).to_le_bytes(),
        };
        return fixed(DataType::Float64, items.iter().flat_map(value).collect());
    }
    if only(&[Missing, Nan, Bytes]) {
        let mut cells = Vec::new();
        let mut total = 0u64;
        for at in items {
            let span = loaded.bytes(*at).unwrap_or(Span::EMPTY);
            total = total.saturating_add(span.len());
            if total > MAX_BINARY {
                return unknown("binary cells of more than 64 MiB");
            }
            cells.push(span.to_vec(source)?);
        }
        return Ok(strings(DataType::LargeBinary, cells.iter().map(Vec::as_slice), bitmap, nulls));
    }
    if only(&[Missing, Nan, Date]) {
        let mut days = Vec::new();
        for (at, missing) in items.iter().zip(&missing) {
            let day = if *missing { Some(0) } else { date(loaded, *at, source)? };
            let Some(day) = day else { return unknown("a date in an unknown form") };
            days.extend(day.to_le_bytes());
        }
        return fixed(DataType::Date32, days);
    }
    if only(&[Missing, Nan, Timestamp]) {
        let mut values = Vec::new();
        let mut found: Option<(TimeUnit, Option<String>)> = None;
        for (at, missing) in items.iter().zip(&missing) {
            if *missing {
                values.extend([0; 8]);
                continue;
            }
            let Some((value, unit, zone)) = timestamp(loaded, *at) else { return unknown("an unknown point in time") };
            match &found {
                None => found = Some((unit, zone)),
                Some(same) if *same == (unit, zone) => {}
                Some(_) => return unknown("points in time of several units or zones"),
            }
            values.extend(value.to_le_bytes());
        }
        let Some((unit, zone)) = found else { return unknown("no points in time") };
        let data_type = DataType::Timestamp(unit, zone.map(Into::into));
        let buffers = vec![bitmap, Span::literal(values)];
        return Ok(Column::new(ArrayLayout::flat(data_type, len, Some(nulls), buffers)));
    }
    if only(&[Missing, Nan, List]) {
        let mut ends = vec![0u64];
        let mut children = Vec::new();
        for at in items {
            if let Some(Value::List(list)) = loaded.value(*at) {
                children.extend_from_slice(list);
            }
            // A pickle can refer to one long list many times.
            if children.len() > 1 << 22 {
                return unknown("lists of too many elements");
            }
            ends.push(children.len() as u64);
        }
        let child = column(loaded, &children, depth + 1, source)?;
        return Ok(lists(child, ends, bitmap, nulls));
    }
    if only(&[Missing, Nan, Array]) {
        return arrays(loaded, items, bitmap, nulls, source);
    }
    unknown("Python objects of several types")
}

fn strings<'a>(data_type: DataType, cells: impl Iterator<Item = &'a [u8]>, bitmap: Span, nulls: u64) -> Column {
    let mut ends = vec![0u64];
    let mut data = Vec::new();
    for cell in cells {
        data.extend_from_slice(cell);
        ends.push(data.len() as u64);
    }
    let len = ends.len() as u64 - 1;
    Column::new(ArrayLayout::flat(data_type, len, Some(nulls), vec![bitmap, offsets(ends), Span::literal(data)]))
}

fn lists(child: Column, ends: Vec<u64>, bitmap: Span, nulls: u64) -> Column {
    let data_type = DataType::LargeList(item(&child.layout.data_type));
    let len = ends.len() as u64 - 1;
    let mut layout = ArrayLayout::flat(data_type, len, Some(nulls), vec![bitmap, offsets(ends)]);
    layout.children = vec![child.layout];
    Column::new(layout)
}

/// Cells that are one-dimensional arrays of one type.
fn arrays(loaded: &Loaded, items: &[Ref], bitmap: Span, nulls: u64, source: &dyn BlobSource) -> Result<Column, Stop> {
    let mut ends = vec![0u64];
    let mut parts = Vec::new();
    let (mut dtype, mut total) = (None, 0u64);
    for at in items {
        if let Some(NdArray { len, elements }) = nd_array(loaded, *at, source)? {
            let Elements::Raw(one, span) = elements else { return unknown("arrays of objects in cells") };
            if dtype.get_or_insert_with(|| one.clone()) != &one {
                return unknown("arrays of several types in cells");
            }
            total = total.saturating_add(len);
            parts.push(span);
        }
        ends.push(total);
    }
    let Some(dtype) = dtype else { return unknown("no arrays in cells") };
    let child = dtype.column(derive::join(parts)?, total)?;
    Ok(lists(child, ends, bitmap, nulls))
}

/// The levels of a MultiIndex, if every object is a tuple of as many parts.
pub fn levels(loaded: &Loaded, items: &[Ref], source: &dyn BlobSource) -> Result<Option<Vec<Column>>, Stop> {
    let tuple = |at: &Ref| match loaded.value(*at) {
        Some(Value::Tuple(parts)) => Some(parts.as_slice()),
        _ => None,
    };
    let Some(rows) = items.iter().map(tuple).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let Some(width) = rows.first().map(|row| row.len()).filter(|n| (1..=64).contains(n)) else { return Ok(None) };
    if rows.iter().any(|row| row.len() != width) {
        return Ok(None);
    }
    let level = |i: usize| {
        let parts: Vec<Ref> = rows.iter().filter_map(|row| row.get(i).copied()).collect();
        let column = column(loaded, &parts, 1, source)?;
        // What pandas makes of a level: its own type, not `object`.
        let own = crate::dataset::column::PandasType::of(&column.layout.data_type);
        Ok(column.with_numpy_type(own.numpy_type))
    };
    (0..width).map(level).collect::<Result<Vec<_>, Stop>>().map(Some)
}

/// `_unpickle_timestamp(value, freq, tz, resolution)` of pandas 2 and 3; older ones count nanoseconds.
fn timestamp(loaded: &Loaded, at: Ref) -> Option<(i64, TimeUnit, Option<String>)> {
    let call = loaded.called(at)?;
    let value = loaded.int(*call.args.first()?)?;
    let zone = match call.args.get(2) {
        Some(zone) if !matches!(loaded.value(*zone), Some(Value::None)) => Some(time_zone(loaded, *zone)?),
        _ => None,
    };
    let unit = match call.args.get(3) {
        Some(number) => resolution(loaded.int(*number)?)?,
        None => TimeUnit::Nanosecond,
    };
    Some((value, unit, zone))
}

/// `datetime.date` with its four bytes (year, month, day), as days since 1970.
fn date(loaded: &Loaded, at: Ref, source: &dyn BlobSource) -> Result<Option<i32>, Stop> {
    let Some(call) = loaded.called(at) else { return Ok(None) };
    let Some(bytes) = call.args.first().and_then(|at| loaded.bytes(*at)).filter(|b| b.len() == 4) else {
        return Ok(None);
    };
    let &[high, low, month, day] = bytes.to_vec(source)?.as_slice() else { return Ok(None) };
    let year = i32::from(high) * 256 + i32::from(low);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return Ok(None);
    }
    // Days from the civil calendar, years beginning in March so that leap days come last.
    let shifted = year - i32::from(month <= 2);
    let era = shifted.div_euclid(400);
    let of_era = shifted.rem_euclid(400);
    let of_year = (153 * ((i32::from(month) + 9) % 12) + 2) / 5 + i32::from(day) - 1;
    Ok(Some(era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468))
}

//! Columns of several record batches as one, still without copying their values.

use std::borrow::Cow;
use std::sync::Arc;

use arrow_schema::DataType;

use super::check::{self, Offset};
use super::column::{Column, width};
use super::plan::Part;
use crate::error::{Error, Kind, Result};

/// The bytes of a part that is read or looked at: of offsets, bitmaps, small buffers.
pub(super) fn part_bytes<'a>(part: &Part, staged: &'a [u8]) -> Result<Cow<'a, [u8]>> {
    Ok(match part {
        Part::Staged(at) => Cow::Borrowed(
            staged
                .get(at.start as usize..at.end as usize)
                .ok_or_else(|| Error::malformed("a buffer outside the file"))?,
        ),
        Part::Owned(buffer) => Cow::Owned(buffer.to_vec()),
        Part::Zeros(n) => Cow::Owned(vec![0; *n as usize]),
        Part::Ones(n) => Cow::Owned(vec![0xff; *n as usize]),
        Part::Inflated(inflated) => Cow::Owned(inflated.to_vec(staged)?),
        Part::Shifted { .. } | Part::Unpacked { .. } | Part::Transposed(_) => {
            return Err(Error::new(Kind::Internal, "a part that was made for a blob is read"));
        }
    })
}

/// The bytes of all parts of a buffer.
pub(super) fn buffer_bytes<'a>(parts: &[Part], staged: &'a [u8]) -> Result<Cow<'a, [u8]>> {
    match parts {
        [] => Ok(Cow::Borrowed(&[])),
        [part] => part_bytes(part, staged),
        parts => {
            let mut all = Vec::new();
            for part in parts {
                all.extend_from_slice(&part_bytes(part, staged)?);
            }
            Ok(Cow::Owned(all))
        }
    }
}

/// True if [`join`] can join columns of the type.
pub(super) fn joinable(data_type: &DataType) -> bool {
    use DataType::*;
    match data_type {
        Null | Boolean | Utf8 | LargeUtf8 | Binary | LargeBinary => true,
        List(child) | LargeList(child) => joinable(child.data_type()),
        // Elements of no bytes may be more than a joined bitmap can have bits.
        other => width(other).is_some_and(|width| width > 0),
    }
}

/// One column of all the elements, in order. Offsets of strings and lists come out as 64-bit ones, whatever the type.
///
/// Returns `None` if the layouts do not allow it: types that are not [`joinable`], lists whose values have gaps, more
/// elements or bytes than the type's own offsets reach.
pub(super) fn join(columns: &[&Column], staged: &[u8]) -> Result<Option<Column>> {
    use DataType::*;
    let Some(first) = columns.first() else { return Ok(None) };
    if !joinable(&first.data_type) {
        return Ok(None);
    }
    if let [one] = columns {
        return Ok(Some((*one).clone()));
    }
    let mut joined = Column {
        data_type: first.data_type.clone(),
        len: columns.iter().map(|c| c.len).sum(),
        null_count: columns.iter().map(|c| c.null_count).sum(),
        buffers: vec![validity(columns, staged)?],
        children: Vec::new(),
        dictionary: None,
    };
    let concat = |i: usize| columns.iter().flat_map(|c| c.buffer(i)).collect::<Vec<Part>>();
    match &first.data_type {
        Null => joined.buffers.clear(),
        Boolean => joined.buffers.push(bits(columns.iter().map(|c| (c.buffer(1), c.len)), staged, true)?),
        Utf8 | Binary | LargeUtf8 | LargeBinary => {
            let narrow = matches!(first.data_type, Utf8 | Binary);
            let mut data = Vec::new();
            let mut offsets = Offsets::default();
            for column in columns {
                let Some((from, to)) = offsets.add(column, narrow, staged)? else { return Ok(None) };
                for part in column.buffer(2) {
                    data.push(part.slice(from.min(part.len())..to.min(part.len()))?);
                }
            }
            joined.buffers.extend([offsets.parts, data]);
        }
        List(_) | LargeList(_) => {
            let narrow = matches!(first.data_type, List(_));
            let mut offsets = Offsets::default();
            let mut children = Vec::new();
            for column in columns {
                let Some((from, to)) = offsets.add(column, narrow, staged)? else { return Ok(None) };
                let Some(child) = column.children.first() else { return Ok(None) };
                if from != 0 || to != child.len {
                    return Ok(None);
                }
                children.push(child);
            }
            let Some(child) = join(&children, staged)? else { return Ok(None) };
            joined.buffers.push(offsets.parts);
            joined.children.push(child);
        }
        _ => joined.buffers.push(concat(1)),
    }
    Ok(Some(joined))
}

/// Offsets of joined columns: each column's continue where the former's end.
#[derive(Default)]
struct Offsets {
    parts: Vec<Part>,
    end: i64,
}

impl Offsets {
    /// Adds a column's; returns its first and last offset, or `None` if the type is `narrow` and 32 bits are not enough
    /// for the sum: readers get offsets of that width back.
    fn add(&mut self, column: &Column, narrow: bool, staged: &[u8]) -> Result<Option<(u64, u64)>> {
        let parts = column.buffer(1);
        let bytes = buffer_bytes(&parts, staged)?;
        let (first, last) = if narrow { check::offsets::<i32>(&bytes)? } else { check::offsets::<i64>(&bytes)? };
        let shift = self.end - first as i64;
        self.end = self.end.checked_add((last - first) as i64).ok_or_else(|| Error::malformed("too many elements"))?;
        if narrow && self.end > i32::MAX.into() {
            return Ok(None);
        }
        let width = if narrow { i32::WIDTH } else { i64::WIDTH } as u64;
        // The first offset is the last one of the column before.
        let skip = if self.parts.is_empty() { 0 } else { width };
        match parts.as_slice() {
            [Part::Staged(at)] => {
                let at = at.start + skip..at.end;
                self.parts.push(match (narrow, shift) {
                    (false, 0) => Part::Staged(at),
                    _ => Part::Shifted { at, width, shift },
                });
            }
            _ => {
                let read = |b: &[u8]| if narrow { i32::from_bytes(b).into() } else { i64::from_bytes(b) };
                let values = bytes.chunks_exact(width as usize).skip((skip / width) as usize).map(read);
                self.parts.push(Part::owned(values.flat_map(|v| (v + shift).to_le_bytes()).collect()));
            }
        }
        Ok(Some((first, last)))
    }
}

/// The joined validity bitmap; empty if nothing is null.
fn validity(columns: &[&Column], staged: &[u8]) -> Result<Vec<Part>> {
    if columns.iter().all(|c| c.null_count == 0) {
        return Ok(Vec::new());
    }
    let bitmaps = columns.iter().map(|c| (if c.null_count == 0 { Vec::new() } else { c.buffer(0) }, c.len));
    bits(bitmaps, staged, true)
}

/// Joined bitmaps; an absent one is all ones (`absent`).
fn bits(bitmaps: impl Iterator<Item = (Vec<Part>, u64)>, staged: &[u8], absent: bool) -> Result<Vec<Part>> {
    let mut out = arrow_buffer::BooleanBufferBuilder::new(0);
    for (parts, len) in bitmaps {
        let len = usize::try_from(len).map_err(|_| Error::malformed("too many elements"))?;
        if parts.is_empty() {
            out.append_n(len, absent);
            continue;
        }
        let bytes = buffer_bytes(&parts, staged)?;
        if bytes.len() < len.div_ceil(8) {
            return Err(Error::malformed("a bitmap that is too short"));
        }
        out.append_packed_range(0..len, &bytes);
    }
    Ok(vec![Part::Owned(out.finish().into_inner())])
}

/// Joins neighbouring batches until each has at least `rows` rows, as far as the layouts allow.
pub(super) fn merge_batches(
    batches: Vec<(u64, Vec<Column>)>,
    rows: u64,
    staged: &[u8],
) -> Result<Vec<(u64, Vec<Column>)>> {
    let mut out = Vec::new();
    let mut group: Vec<(u64, Vec<Column>)> = Vec::new();
    let mut total = 0;
    let last = batches.len().saturating_sub(1);
    for (i, batch) in batches.into_iter().enumerate() {
        total += batch.0;
        group.push(batch);
        if total < rows && i < last {
            continue;
        }
        match join_batches(&group, staged)? {
            Some(columns) => {
                out.push((total, columns));
                group.clear();
            }
            None => out.append(&mut group),
        }
        total = 0;
    }
    Ok(out)
}

/// The columns of several batches, each joined; `None` if one can't be.
pub(super) fn join_batches(batches: &[(u64, Vec<Column>)], staged: &[u8]) -> Result<Option<Vec<Column>>> {
    let Some((_, first)) = batches.first() else { return Ok(None) };
    let mut columns = Vec::with_capacity(first.len());
    for (i, sample) in first.iter().enumerate() {
        let parts: Option<Vec<&Column>> = batches.iter().map(|(_, columns)| columns.get(i)).collect();
        let Some(parts) = parts else { return Ok(None) };
        // One dictionary for all batches: the keys are joined like any fixed-width values.
        let column = match (&sample.data_type, &sample.dictionary) {
            (DataType::Dictionary(key, _), Some(values))
                if parts.iter().all(|c| c.dictionary.as_ref().is_some_and(|d| Arc::ptr_eq(d, values))) =>
            {
                let keys: Vec<Column> = parts
                    .iter()
                    .map(|c| Column { data_type: (**key).clone(), dictionary: None, ..(*c).clone() })
                    .collect();
                let joined = join(&keys.iter().collect::<Vec<_>>(), staged)?;
                joined.map(|joined| Column {
                    data_type: sample.data_type.clone(),
                    dictionary: Some(values.clone()),
                    ..joined
                })
            }
            _ => join(&parts, staged)?,
        };
        let Some(column) = column else { return Ok(None) };
        columns.push(column);
    }
    Ok(Some(columns))
}

#[cfg(test)]
mod tests {
    use arrow_schema::Field;

    use super::*;

    /// One string of so many bytes that nobody has to hold.
    fn string(data_type: DataType, bytes: i32) -> Column {
        let offsets = match data_type {
            DataType::Utf8 => [0, bytes].iter().flat_map(|o| o.to_le_bytes()).collect(),
            _ => [0, i64::from(bytes)].iter().flat_map(|o| o.to_le_bytes()).collect(),
        };
        let buffers = vec![vec![], vec![Part::owned(offsets)], vec![Part::Zeros(bytes as u64)]];
        Column { data_type, len: 1, null_count: 0, buffers, children: Vec::new(), dictionary: None }
    }

    fn list(child: Column) -> Column {
        let field = Arc::new(Field::new_list_field(child.data_type.clone(), true));
        let offsets = Part::owned([0, child.len as i32].iter().flat_map(|o| o.to_le_bytes()).collect());
        let buffers = vec![vec![], vec![offsets]];
        let data_type = DataType::List(field);
        Column { data_type, len: 1, null_count: 0, buffers, children: vec![child], dictionary: None }
    }

    fn is_joined(columns: &[Column]) -> bool {
        let columns: Vec<&Column> = columns.iter().collect();
        join(&columns, &[]).is_ok_and(|joined| joined.is_some())
    }

    #[test]
    fn strings_are_joined_as_far_as_their_offsets_reach() {
        for (sizes, narrow) in [
            ([1 << 30, (1 << 30) - 1], true),
            ([1 << 30, 1 << 30], false),
            ([i32::MAX, 0], true),
            ([i32::MAX, 1], false),
        ] {
            assert_eq!(is_joined(&sizes.map(|size| string(DataType::Utf8, size))), narrow, "{sizes:?}");
            assert!(is_joined(&sizes.map(|size| string(DataType::LargeUtf8, size))), "{sizes:?}");
            assert_eq!(is_joined(&sizes.map(|size| list(string(DataType::Utf8, size)))), narrow, "{sizes:?}");
            let numbers = |len: i32| Column { len: len as u64, ..Column::empty(&DataType::Int8) };
            assert_eq!(is_joined(&sizes.map(|size| list(numbers(size)))), narrow, "{sizes:?}");
        }
    }

    #[test]
    fn batches_that_cannot_be_joined_stay_as_they_are() {
        let batches = [1 << 30; 5].map(|size| (1, vec![string(DataType::Utf8, size)])).to_vec();
        let merged = merge_batches(batches, 2, &[]).map(|batches| batches.iter().map(|(rows, _)| *rows).collect());
        assert_eq!(merged.unwrap_or_else(|_| Vec::new()), [1; 5]);
        let batches = [1 << 29; 5].map(|size| (1, vec![string(DataType::Utf8, size)])).to_vec();
        let merged = merge_batches(batches, 2, &[]).map(|batches| batches.iter().map(|(rows, _)| *rows).collect());
        assert_eq!(merged.unwrap_or_else(|_| Vec::new()), [2, 2, 1]);
    }
}

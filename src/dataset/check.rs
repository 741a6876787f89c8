//! Checks on data that readers of an Arrow file trust blindly: offsets, UTF-8, dictionary keys, views, type ids, run ends.

use arrow_schema::{DataType, UnionMode};

use super::derive;
use super::publish::check::{self, Offset, View};
use super::span::Span;
use super::table::{ArrayLayout, fixed_width};
use crate::error::{Error, Result};
use crate::vineyard::BlobSource;

/// Bytes that are looked at in one step.
const CHUNK: u64 = 1 << 20;
/// Bytes from which on it pays to read only the first few of a binary value.
const LONG: usize = 256;

/// Verifies that offsets ascend and stay inside the data, that strings are UTF-8 cut between characters, that dictionary
/// keys, views, list views and unions point to what is there, and that run ends rise. Reads these and strings, nothing
/// else.
///
/// # Errors
/// `Malformed` with the first element that breaks a rule; what the source says of its blobs.
pub fn check(layout: &ArrayLayout, source: &dyn BlobSource) -> Result<()> {
    let buffer = |i: usize| {
        let missing = || Error::malformed(format!("an array of {} without buffer {i}", layout.data_type));
        layout.buffers.get(i).ok_or_else(missing)
    };
    let child_len = || layout.children.first().map_or(0, |child| child.len);
    match &layout.data_type {
        DataType::Utf8 => strings(buffer(1)?, 4, layout.len, buffer(2)?, source)?,
        DataType::LargeUtf8 => strings(buffer(1)?, 8, layout.len, buffer(2)?, source)?,
        DataType::Binary => {
            offsets(buffer(1)?, 4, layout.len, buffer(2)?.len(), source)?;
        }
        DataType::LargeBinary => {
            offsets(buffer(1)?, 8, layout.len, buffer(2)?.len(), source)?;
        }
        DataType::List(_) | DataType::Map(..) => {
            offsets(buffer(1)?, 4, layout.len, child_len(), source)?;
        }
        DataType::LargeList(_) => {
            offsets(buffer(1)?, 8, layout.len, child_len(), source)?;
        }
        DataType::Dictionary(key, _) => {
            let values = layout.dictionary.as_ref().map_or(0, |values| values.len);
            keys(key, buffer(1)?, buffer(0)?, layout.len, values, source)?;
        }
        DataType::Utf8View | DataType::BinaryView => views(layout, source)?,
        DataType::ListView(_) => list_views::<i32>(buffer(1)?, buffer(2)?, layout.len, child_len(), source)?,
        DataType::LargeListView(_) => list_views::<i64>(buffer(1)?, buffer(2)?, layout.len, child_len(), source)?,
        DataType::Union(fields, mode) => {
            let children = fields.iter().map(|(id, _)| id).zip(layout.children.iter().map(|child| child.len));
            let offsets = if *mode == UnionMode::Dense { Some(buffer(1)?) } else { None };
            union(buffer(0)?, offsets, layout.len, &children.collect::<Vec<_>>(), source)?;
        }
        DataType::RunEndEncoded(..) => runs(layout, source)?,
        _ => {}
    }
    layout.children.iter().try_for_each(|child| check(child, source))?;
    layout.dictionary.iter().try_for_each(|values| check(values, source))
}

/// Offsets `first..=last` of a buffer, widened.
fn read_offsets(span: &Span, width: u64, first: u64, count: u64, source: &dyn BlobSource) -> Result<Vec<u64>> {
    let mut bytes = vec![0; (count * width) as usize];
    span.read(source, first * width, &mut bytes)?;
    // A negative offset becomes one past any buffer.
    Ok(match width {
        4 => {
            let narrow = |b: &[u8]| i32::from_le_bytes(b.try_into().unwrap_or_default());
            bytes.chunks_exact(4).map(|b| u64::try_from(narrow(b)).unwrap_or(u64::MAX)).collect()
        }
        _ => bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap_or_default())).collect(),
    })
}

/// Walks all `len + 1` offsets in pieces; `visit` gets each piece after it was checked. Pieces overlap by one offset.
fn walk(
    span: &Span,
    width: u64,
    len: u64,
    limit: u64,
    source: &dyn BlobSource,
    mut visit: impl FnMut(&[u64]) -> Result<()>,
) -> Result<()> {
    // Offsets that are computed from nothing are right by construction, and may be more than anyone can read.
    let computed = matches!(span, Span::Zeros(_) | Span::Derived { .. }) && span.blobs(0..span.len()).is_empty();
    if len == 0 || computed {
        return Ok(());
    }
    let step = CHUNK / width;
    let mut at = 0;
    while at < len {
        let count = step.min(len - at);
        let piece = read_offsets(span, width, at, count + 1, source)?;
        if !piece.is_sorted() {
            let bad = piece.windows(2).position(|w| w[0] > w[1]).unwrap_or(0);
            return Err(Error::malformed(format!("offset {} is smaller than the one before", at + bad as u64 + 1)));
        }
        if let Some(last) = piece.last().filter(|last| **last > limit) {
            return Err(Error::malformed(format!("an offset up to {last} into {limit} elements or bytes")));
        }
        visit(&piece)?;
        at += count;
    }
    Ok(())
}

fn offsets(span: &Span, width: u64, len: u64, limit: u64, source: &dyn BlobSource) -> Result<()> {
    walk(span, width, len, limit, source, |_| Ok(()))
}

/// Strings: the bytes between the first and last offset are UTF-8, and no offset lies inside a character.
fn strings(span: &Span, width: u64, len: u64, data: &Span, source: &dyn BlobSource) -> Result<()> {
    let mut bytes = Vec::new();
    walk(span, width, len, data.len(), source, |offsets| {
        let (Some(&start), Some(&end)) = (offsets.first(), offsets.last()) else { return Ok(()) };
        let mut next = offsets.iter().copied().peekable();
        let (mut at, mut carried) = (start, 0usize);
        while at < end {
            // Behind the bytes of a character that the last piece cut.
            let n = CHUNK.min(end - at) as usize;
            bytes.resize(carried + n, 0);
            data.read(source, at, &mut bytes[carried..])?;
            let first = at - carried as u64;
            at += n as u64;
            while let Some(offset) = next.next_if(|offset| *offset < at) {
                let inside = |byte: u8| byte & 0xC0 == 0x80;
                if bytes.get((offset - first) as usize).is_some_and(|byte| inside(*byte)) {
                    return Err(Error::malformed(format!("a string begins inside a character, at byte {offset}")));
                }
            }
            match std::str::from_utf8(&bytes) {
                Ok(_) => carried = 0,
                Err(error) if error.error_len().is_none() && at < end => {
                    let valid = error.valid_up_to();
                    bytes.copy_within(valid.., 0);
                    carried = bytes.len() - valid;
                    bytes.truncate(carried);
                }
                Err(error) => {
                    let place = first + error.valid_up_to() as u64;
                    return Err(Error::malformed(format!("strings that are not UTF-8, at byte {place}")));
                }
            }
        }
        Ok(())
    })
}

/// Keys of valid elements point into the dictionary.
fn keys(key: &DataType, span: &Span, validity: &Span, len: u64, values: u64, source: &dyn BlobSource) -> Result<()> {
    let width = fixed_width(key).filter(|w| matches!(w, 1 | 2 | 4 | 8)).unwrap_or(1);
    let signed = key.is_signed_integer();
    let (mut keys, mut bits) = (Vec::new(), Vec::new());
    let step = CHUNK;
    let mut at = 0;
    while at < len {
        let count = step.min(len - at);
        keys.resize((count * width) as usize, 0);
        span.read(source, at * width, &mut keys)?;
        bits.clear();
        if !validity.is_empty() {
            bits.resize(count.div_ceil(8) as usize, 0);
            // Pieces begin at whole bytes, as their length is a multiple of 8.
            derive::bit_slice(validity, at, count)?.read(source, 0, &mut bits)?;
        }
        for (i, element) in keys.chunks_exact(width as usize).enumerate() {
            let mut wide = [0; 8];
            wide[..element.len()].copy_from_slice(element);
            let negative = signed && element.last().is_some_and(|b| b & 0x80 != 0);
            if (negative || u64::from_le_bytes(wide) >= values)
                && bits.get(i / 8).is_none_or(|byte| byte >> (i % 8) & 1 == 1)
            {
                let row = at + i as u64;
                return Err(Error::malformed(format!("row {row} has a key outside a dictionary of {values}")));
            }
        }
        at += count;
    }
    Ok(())
}

/// Passes the elements of buffers on, whose widths are given, in pieces: `visit` gets the first element of each and the
/// bytes of every buffer.
fn pieces<const N: usize>(
    buffers: [(&Span, u64); N],
    len: u64,
    source: &dyn BlobSource,
    mut visit: impl FnMut(u64, [&[u8]; N]) -> Result<()>,
) -> Result<()> {
    let mut bytes = [const { Vec::new() }; N];
    let mut at = 0;
    while at < len {
        // Whole bytes of bitmaps.
        let count = (CHUNK / 16).min(len - at);
        for ((span, width), bytes) in buffers.iter().zip(&mut bytes) {
            bytes.resize((count * width) as usize, 0);
            span.read(source, at * width, bytes)?;
        }
        visit(at, bytes.each_ref().map(Vec::as_slice))?;
        at += count;
    }
    Ok(())
}

/// Views of valid elements lie in their data, begin as they say, and are UTF-8.
fn views(layout: &ArrayLayout, source: &dyn BlobSource) -> Result<()> {
    let [validity, views, data @ ..] = layout.buffers.as_slice() else {
        return Err(Error::malformed("views without buffers"));
    };
    let text = layout.data_type == DataType::Utf8View;
    let mut window = Window::default();
    pieces([(views, 16)], layout.len, source, |first, [views]| {
        let mut bits = Vec::new();
        let count = views.len() as u64 / 16;
        if !validity.is_empty() {
            bits.resize(count.div_ceil(8) as usize, 0);
            derive::bit_slice(validity, first, count)?.read(source, 0, &mut bits)?;
        }
        for (_, view) in views.chunks_exact(16).enumerate().filter(|(i, _)| check::bit(&bits, *i)) {
            match View::of(view)? {
                View::Here(value) => check::view_text(value, text)?,
                View::There { buffer, offset, len, start } => {
                    let outside = || Error::malformed("a view outside its data");
                    let span = data.get(buffer).filter(|data| (offset + len) as u64 <= data.len());
                    // Of bytes that are no text, those matter that the view repeats; short ones are read whole, as they
                    // follow one another then.
                    let looked_at = if text || len < LONG { len } else { start.len() };
                    let span = span.ok_or_else(outside)?;
                    let value = window.bytes(buffer, span, offset as u64, looked_at as u64, source)?;
                    check::view_value(value, start, text)?;
                }
            }
        }
        Ok(())
    })
}

/// Bytes of a data buffer: views mostly follow one another, and not each is worth a read of its own.
#[derive(Default)]
struct Window {
    buffer: usize,
    start: u64,
    bytes: Vec<u8>,
    /// How many bytes views took of it.
    taken: u64,
}

impl Window {
    fn bytes(&mut self, buffer: usize, span: &Span, at: u64, len: u64, source: &dyn BlobSource) -> Result<&[u8]> {
        let end = self.start + self.bytes.len() as u64;
        if buffer != self.buffer || at < self.start || at + len > end {
            // Ahead only for one that follows the last one, and no more than twice what was of use before: views that
            // jump about, in whatever order, cost little more than their own bytes.
            let follows = buffer == self.buffer && (self.start..=end).contains(&at);
            let ahead = if follows { CHUNK.min(self.taken * 2).min(span.len() - at) } else { 0 };
            self.bytes.resize(len.max(ahead) as usize, 0);
            span.read(source, at, &mut self.bytes)?;
            (self.buffer, self.start, self.taken) = (buffer, at, 0);
        }
        self.taken += len;
        let from = (at - self.start) as usize;
        self.bytes.get(from..from + len as usize).ok_or_else(|| Error::malformed("a view outside its data"))
    }
}

fn list_views<T: Offset>(starts: &Span, sizes: &Span, len: u64, child: u64, source: &dyn BlobSource) -> Result<()> {
    let width = T::WIDTH as u64;
    pieces([(starts, width), (sizes, width)], len, source, |_, [starts, sizes]| {
        check::list_views::<T>(starts, sizes, child)
    })
}

fn union(ids: &Span, offsets: Option<&Span>, len: u64, children: &[(i8, u64)], source: &dyn BlobSource) -> Result<()> {
    match offsets {
        Some(offsets) => {
            pieces([(ids, 1), (offsets, 4)], len, source, |_, [ids, offsets]| check::union(ids, offsets, children))
        }
        None => pieces([(ids, 1)], len, source, |_, [ids]| check::union(ids, &[], children)),
    }
}

/// Run ends are never null, rise, and reach the last element.
fn runs(layout: &ArrayLayout, source: &dyn BlobSource) -> Result<()> {
    let ends = layout.children.first().ok_or_else(|| Error::malformed("runs without ends"))?;
    let width = fixed_width(&ends.data_type).filter(|_| ends.null_count == Some(0));
    let width = width.ok_or_else(|| Error::malformed("run ends with nulls, or that are no integers"))?;
    let values = ends.buffers.get(1).ok_or_else(|| Error::malformed("runs without ends"))?;
    let mut last = 0;
    pieces([(values, width)], ends.len, source, |_, [ends]| {
        last = check::run_ends(ends, width as usize, last)?;
        Ok(())
    })?;
    check::runs_reach(last, layout.len)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::dataset::column;
    use crate::dataset::testing::Nothing;
    use crate::vineyard::{BlobKey, InstanceId, ObjectId};

    fn strings(offsets: &[u64], data: &[u8]) -> Result<()> {
        let buffers = vec![Span::EMPTY, column::offsets(offsets.iter().copied()), Span::literal(data)];
        check(&ArrayLayout::flat(DataType::LargeUtf8, offsets.len() as u64 - 1, Some(0), buffers), &Nothing)
    }

    #[test]
    fn strings_are_cut_between_characters() {
        assert!(strings(&[0, 1, 3, 3, 6], "hé€".as_bytes()).is_ok());
        for (offsets, data) in [
            (&[0u64, 2, 3][..], "hé€".as_bytes()),
            (&[0, 2], "hé".as_bytes()),
            (&[0, 3, 1], b"abc"),
            (&[0, 4], b"abc"),
            (&[0, u64::MAX], b"abc"),
            (&[0, 3], b"a\xffb"),
        ] {
            assert!(strings(offsets, data).is_err(), "{offsets:?} {data:?}");
        }
    }

    /// Characters that lie across the pieces in which data is read.
    #[test]
    fn long_strings() {
        let text = "€".repeat(CHUNK as usize);
        let len = text.len() as u64;
        assert!(strings(&[0, 3 * 1000, len], text.as_bytes()).is_ok());
        assert!(strings(&[0, CHUNK, len], text.as_bytes()).is_err());
        assert!(strings(&[0, len - 1], &text.as_bytes()[..text.len() - 1]).is_err());
    }

    /// A source of one blob that counts the bytes and the reads.
    #[derive(Default)]
    struct Counted {
        blob: Vec<u8>,
        bytes: AtomicU64,
        reads: AtomicU64,
    }

    impl BlobSource for Counted {
        fn size(&self, _: BlobKey) -> Result<u64> {
            Ok(self.blob.len() as u64)
        }
        fn read(&self, _: BlobKey, offset: u64, out: &mut [u8]) -> Result<()> {
            out.copy_from_slice(&self.blob[offset as usize..offset as usize + out.len()]);
            self.bytes.fetch_add(out.len() as u64, Ordering::Relaxed);
            self.reads.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn verify(&self, _: &[BlobKey]) -> Result<()> {
            Ok(())
        }
    }

    /// Checks views of so many bytes each at these places of a buffer of 4 MiB; the bytes and reads that it took.
    fn looked_at(data_type: DataType, places: &[u32], len: u32) -> (u64, u64) {
        let source = Counted { blob: vec![b'x'; 4 << 20], ..Counted::default() };
        let key = BlobKey { instance: InstanceId(0), id: ObjectId::blob_made(1, 1) };
        let data = Span::blob(key, source.blob.len() as u64);
        let view = |at: &u32| [len.to_le_bytes(), *b"xxxx", [0; 4], at.to_le_bytes()].concat();
        let views = Span::literal(places.iter().flat_map(view).collect::<Vec<u8>>());
        let buffers = vec![Span::EMPTY, views, data.clone(), data];
        check(&ArrayLayout::flat(data_type, places.len() as u64, Some(0), buffers), &source).unwrap();
        (source.bytes.into_inner(), source.reads.into_inner())
    }

    /// In whatever order views lead through a buffer, looking at them reads a few times their bytes at most.
    #[test]
    fn views_cost_what_they_are_long() {
        let count = 20_000u32;
        let orders: [(&str, &dyn Fn(u32) -> u32); 5] = [
            ("by turns the start and far away", &|i| i % 2 * (3 << 20)),
            ("by turns the start and a little further", &|i| i % 2 * 20),
            ("three in a row, and back", &|i| i % 3 * 20),
            ("one past each window", &|i| i * 40 % (3 << 20)),
            ("backwards", &|i| (count - i) * 20),
        ];
        for (name, place) in orders {
            let places: Vec<u32> = (0..count).map(place).collect();
            for data_type in [DataType::Utf8View, DataType::BinaryView] {
                let (bytes, reads) = looked_at(data_type, &places, 20);
                assert!(bytes <= 3 * 20 * u64::from(count) && reads <= count.into(), "{name}: {bytes} in {reads}");
            }
        }
        // Those that follow one another are read many at a time, long binary values hardly at all.
        let places: Vec<u32> = (0..count).map(|i| i * 20).collect();
        let (bytes, reads) = looked_at(DataType::Utf8View, &places, 20);
        assert!(bytes <= 3 * 20 * u64::from(count) && reads < 50, "{bytes} in {reads}");
        assert_eq!(looked_at(DataType::BinaryView, &places, 3 << 20), (4 * u64::from(count), count.into()));
    }

    /// Every array that the Arrow crates make passes, and none does of which an element leads astray.
    #[test]
    fn views_lists_unions_and_runs_lead_to_what_is_there() {
        use arrow_array::types::Int32Type;
        use arrow_array::*;
        use arrow_schema::Field;
        let long = |i: usize| "é".repeat(7 + i % 50);
        let strings: StringViewArray =
            (0..5000).map(|i| (i % 3 > 0).then(|| if i % 2 > 0 { long(i) } else { "kurz".into() })).collect();
        let numbers: ArrayRef = std::sync::Arc::new(Int32Array::from(vec![1, 2, 3]));
        let item = std::sync::Arc::new(Field::new_list_field(DataType::Int32, true));
        let lists = ListViewArray::new(item, vec![2, 0, 1].into(), vec![1, 3, 0].into(), numbers.clone(), None);
        let fields = [(3, Field::new("a", DataType::Int32, true)), (7, Field::new("b", DataType::Int32, true))];
        let fields = || fields.iter().map(|(id, f)| (*id, std::sync::Arc::new(f.clone()))).collect();
        let children = || vec![numbers.clone(), numbers.clone()];
        let dense = UnionArray::try_new(fields(), vec![3, 7].into(), Some(vec![2, 0].into()), children()).unwrap();
        let sparse = UnionArray::try_new(fields(), vec![3, 7, 3].into(), None, children()).unwrap();
        let runs = RunArray::try_new(&Int32Array::from(vec![2, 5, 9]), &numbers).unwrap();
        let arrays: [&dyn Array; 5] = [&strings, &lists, &dense, &sparse, &runs];
        let layout = |array: &dyn Array| crate::dataset::literal(&array.to_data()).unwrap();
        for array in arrays {
            check(&layout(array), &Nothing).unwrap();
        }
        let _: &RunArray<Int32Type> = &runs;
        // Each with other bytes in one of its buffers, or of its child's.
        let wrong = |array: &dyn Array, child: Option<usize>, buffer: usize, at: usize, bytes: &[u8]| {
            let mut layout = layout(array);
            let place = match child {
                Some(child) => &mut layout.children[child].buffers[buffer],
                None => &mut layout.buffers[buffer],
            };
            let mut all = place.to_vec(&Nothing).unwrap();
            all[at..at + bytes.len()].copy_from_slice(bytes);
            *place = Span::literal(all);
            check(&layout, &Nothing)
        };
        let far = u32::MAX.to_le_bytes();
        // View 1 is a long one: its length, prefix, buffer and offset; the text of its data; view 2 is a short one.
        for (buffer, at, bytes) in [
            (1, 16, &far[..]),
            (1, 20, b"e"),
            (1, 24, &far),
            (1, 28, &far),
            (2, 0, b"\xff"),
            (1, 36, b"\xff"),
            (1, 41, b"x"),
        ] {
            assert!(wrong(&strings, None, buffer, at, bytes).is_err(), "{buffer} {at}");
        }
        // Nobody looks at what lies under a null.
        wrong(&strings, None, 1, 0, &far).unwrap();
        for (buffer, bytes) in [(1, 3i32), (1, -1), (2, 2), (2, -1), (2, i32::MAX)] {
            assert!(wrong(&lists, None, buffer, 0, &bytes.to_le_bytes()).is_err(), "{buffer} {bytes}");
        }
        for (array, buffer, bytes) in
            [(&dense, 0, &[4][..]), (&dense, 1, &3i32.to_le_bytes()), (&dense, 1, &far), (&sparse, 0, &[4])]
        {
            assert!(wrong(array, None, buffer, 0, bytes).is_err(), "{buffer} {bytes:?}");
        }
        for (at, end) in [(0, 0i32), (0, -1), (4, 2), (8, 5), (8, 4)] {
            assert!(wrong(&runs, Some(0), 1, at, &end.to_le_bytes()).is_err(), "{at} {end}");
        }
        assert!(wrong(&runs, Some(0), 1, 8, &8i32.to_le_bytes()).is_err());
    }
}

//! Checks of column data that a reader relies on: offsets, UTF-8, dictionary keys, views, union and run layouts.
//!
//! All functions take little-endian bytes of any alignment, as they lie in a file.

use std::collections::HashSet;

use crate::error::{Error, Result};

/// Bit `i` of a bitmap (least significant first); true where the bitmap is absent.
pub(in crate::dataset) fn bit(bitmap: &[u8], i: usize) -> bool {
    bitmap.is_empty() || bitmap.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 == 1)
}

/// Number of zeros among the first `len` bits of a bitmap that has them.
pub(super) fn count_nulls(bitmap: &[u8], len: u64) -> u64 {
    let whole = (len / 8) as usize;
    let mut words = bitmap[..whole].chunks_exact(8);
    let mut ones: u64 = words
        .by_ref()
        .map(|w| u64::from_le_bytes([w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]]).count_ones() as u64)
        .sum();
    ones += words.remainder().iter().map(|b| b.count_ones() as u64).sum::<u64>();
    if !len.is_multiple_of(8) {
        ones += (bitmap[whole] & ((1 << (len % 8)) - 1)).count_ones() as u64;
    }
    len - ones
}

/// Little-endian integers of 1, 2, 4 or 8 bytes, signed or not, as `i128`.
pub(super) fn integers(bytes: &[u8], width: usize, signed: bool) -> impl Iterator<Item = i128> + '_ {
    bytes.chunks_exact(width).map(move |chunk| {
        let mut raw = [0u8; 8];
        raw[..width].copy_from_slice(chunk);
        let value = u64::from_le_bytes(raw);
        let shift = 64 - 8 * width as u32;
        if signed { ((value << shift) as i64 >> shift) as i128 } else { value as i128 }
    })
}

/// An integer type of offsets.
pub(in crate::dataset) trait Offset: Copy + PartialOrd + Into<i64> {
    /// Bytes of one.
    const WIDTH: usize;
    /// From little-endian bytes of that width.
    fn from_bytes(bytes: &[u8]) -> Self;
}

impl Offset for i32 {
    const WIDTH: usize = 4;
    fn from_bytes(b: &[u8]) -> Self {
        i32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

impl Offset for i64 {
    const WIDTH: usize = 8;
    fn from_bytes(b: &[u8]) -> Self {
        i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
    }
}

/// The first and last offset of a list of them that never falls and starts at no less than 0.
///
/// # Errors
/// `Malformed` for any other list.
pub(super) fn offsets<T: Offset>(bytes: &[u8]) -> Result<(u64, u64)> {
    let mut values = bytes.chunks_exact(T::WIDTH).map(T::from_bytes);
    let Some(first) = values.next() else { return Err(Error::malformed("no offsets")) };
    let mut last = first;
    let mut rising = true;
    for value in values {
        rising &= value >= last;
        last = value;
    }
    let (first, last): (i64, i64) = (first.into(), last.into());
    if !rising || first < 0 {
        return Err(Error::malformed("offsets that fall or are negative"));
    }
    Ok((first as u64, last as u64))
}

/// Checks that every string between two neighbouring offsets is UTF-8. The offsets passed [`offsets`], begin at `first`
/// and lie in `data`.
pub(super) fn utf8<T: Offset>(offsets: &[u8], data: &[u8], first: u64) -> Result<()> {
    let data = data.get(first as usize..).unwrap_or_default();
    let text = std::str::from_utf8(data).map_err(|e| Error::malformed("a string is not UTF-8").with_source(e))?;
    if data.is_ascii() {
        return Ok(());
    }
    let on_boundary = |offset: T| text.is_char_boundary((offset.into() as u64).saturating_sub(first) as usize);
    if !offsets.chunks_exact(T::WIDTH).map(T::from_bytes).all(on_boundary) {
        return Err(Error::malformed("a string ends inside a character"));
    }
    Ok(())
}

/// Checks dictionary keys of `width` bytes against the number of values.
///
/// Returns keys with 0 in the place of wrong ones under nulls (pandas writes -1 there, which other readers refuse), if
/// there are any.
///
/// # Errors
/// `Malformed` if a key that is not null has no value.
pub(super) fn keys(bytes: &[u8], width: usize, signed: bool, bitmap: &[u8], values: u64) -> Result<Option<Vec<u8>>> {
    let range = 0..values as i128;
    let mut cleaned: Option<Vec<u8>> = None;
    for (i, key) in integers(bytes, width, signed).enumerate() {
        if range.contains(&key) {
            continue;
        }
        if bit(bitmap, i) {
            return Err(Error::malformed(format!("key {key} of a dictionary of {values} values")));
        }
        if key != 0 {
            cleaned.get_or_insert_with(|| bytes.to_vec())[i * width..(i + 1) * width].fill(0);
        }
    }
    Ok(cleaned)
}

/// Checks views of strings or binaries against their data buffers (layout: "Variable-size Binary View Layout" of
/// Arrow's columnar format). Returns views with empty ones in the place of wrong ones under nulls, if there are any.
///
/// # Errors
/// `Malformed` if a view that is not null is wrong.
pub(super) fn views(
    bytes: &[u8],
    bitmap: &[u8],
    data: &[std::borrow::Cow<'_, [u8]>],
    text: bool,
) -> Result<Option<Vec<u8>>> {
    let mut cleaned: Option<Vec<u8>> = None;
    for (i, view) in bytes.chunks_exact(16).enumerate() {
        let Err(error) = one_view(view, data, text) else { continue };
        if bit(bitmap, i) {
            return Err(error);
        }
        cleaned.get_or_insert_with(|| bytes.to_vec())[i * 16..(i + 1) * 16].fill(0);
    }
    Ok(cleaned)
}

fn one_view(view: &[u8], data: &[std::borrow::Cow<'_, [u8]>], text: bool) -> Result<()> {
    match View::of(view)? {
        View::Here(value) => view_text(value, text),
        View::There { buffer, offset, len, start } => {
            let value = data.get(buffer).and_then(|d| d.get(offset..offset.checked_add(len)?));
            let value = value.ok_or_else(|| Error::malformed("a view outside its data"))?;
            view_value(value, start, text)
        }
    }
}

/// Where the bytes of a view are.
pub(in crate::dataset) enum View<'a> {
    /// In the view itself.
    Here(&'a [u8]),
    /// In a data buffer.
    There {
        /// Which.
        buffer: usize,
        /// First byte.
        offset: usize,
        /// Number of bytes, at least four.
        len: usize,
        /// The first four of them.
        start: &'a [u8],
    },
}

impl View<'_> {
    /// Reads a view of 16 bytes.
    ///
    /// # Errors
    /// `Malformed` for a short one with bytes after its end.
    pub(in crate::dataset) fn of(view: &[u8]) -> Result<View<'_>> {
        let word = |i: usize| u32::from_le_bytes([view[i], view[i + 1], view[i + 2], view[i + 3]]) as usize;
        let len = word(0);
        if len > 12 {
            return Ok(View::There { buffer: word(8), offset: word(12), len, start: &view[4..8] });
        }
        if view[4 + len..].iter().any(|&b| b != 0) {
            return Err(Error::malformed("a short view with bytes after its end"));
        }
        Ok(View::Here(&view[4..4 + len]))
    }
}

/// Checks the bytes that a view of more than 12 leads to.
pub(in crate::dataset) fn view_value(value: &[u8], start: &[u8], text: bool) -> Result<()> {
    if !value.starts_with(start) {
        return Err(Error::malformed("a view with another prefix than its data"));
    }
    view_text(value, text)
}

/// Checks that the bytes of a view are UTF-8, if it is one of text.
pub(in crate::dataset) fn view_text(value: &[u8], text: bool) -> Result<()> {
    if text && std::str::from_utf8(value).is_err() {
        return Err(Error::malformed("a string view is not UTF-8"));
    }
    Ok(())
}

/// Checks that places and lengths of list views lie in the child.
pub(in crate::dataset) fn list_views<T: Offset>(starts: &[u8], sizes: &[u8], child: u64) -> Result<()> {
    let pairs = starts.chunks_exact(T::WIDTH).map(T::from_bytes).zip(sizes.chunks_exact(T::WIDTH).map(T::from_bytes));
    for (start, size) in pairs {
        let (start, size): (i64, i64) = (start.into(), size.into());
        if start < 0 || size < 0 || start.checked_add(size).is_none_or(|end| end as u64 > child) {
            return Err(Error::malformed("a list view outside its values"));
        }
    }
    Ok(())
}

/// Checks a union's type ids, and a dense one's offsets (empty for a sparse one).
pub(in crate::dataset) fn union(ids: &[u8], offsets: &[u8], children: &[(i8, u64)]) -> Result<()> {
    let mut lengths = [None; 256];
    for &(id, len) in children {
        lengths[id as u8 as usize] = Some(len);
    }
    let known: HashSet<u8> = children.iter().map(|&(id, _)| id as u8).collect();
    if !ids.iter().all(|id| known.contains(id)) {
        return Err(Error::malformed("a union with an unknown type id"));
    }
    for (&id, offset) in ids.iter().zip(offsets.chunks_exact(4).map(i32::from_bytes)) {
        if offset < 0 || lengths[id as usize].is_none_or(|len| offset as u64 >= len) {
            return Err(Error::malformed("a union offset outside its child"));
        }
    }
    Ok(())
}

/// Checks that run ends rise from `last` on; the last of them.
pub(in crate::dataset) fn run_ends(bytes: &[u8], width: usize, mut last: i128) -> Result<i128> {
    for end in integers(bytes, width, true) {
        if end <= last {
            return Err(Error::malformed("run ends that do not rise"));
        }
        last = end;
    }
    Ok(last)
}

/// Checks that runs that end at `last` are enough for `len` elements.
pub(in crate::dataset) fn runs_reach(last: i128, len: u64) -> Result<()> {
    if last < len as i128 {
        return Err(Error::malformed(format!("runs that end at {last} of {len} elements")));
    }
    Ok(())
}

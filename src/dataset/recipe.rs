//! What a mount keeps beside the columns of an object that was written as a file: how to put the file's bytes together
//! again, and its attributes.
//!
//! Both are extra members of the object, which the official client ignores, migrates and deletes with it:
//!
//! - [`RECIPE`], JSON text `{"view": "arrow", "size": 1234, "extents": [...]}`. An extent is `[-1, length]` for the next
//!   bytes of the blob [`LITERAL`], `[-2, length]` for zeros, `[blob, offset, length]` for bytes of a blob of the object,
//!   or `[-3, blob, offset, count, shift]` for `count` 64-bit offsets at `offset`, each less `shift`, as 32-bit ones
//!   (`-4`: as 64-bit ones).
//!   Blobs are numbered in the order in which [`blobs_in_order`] meets them: ids change when an object migrates.
//!   Without `extents` the file's bytes are the blob [`KEPT`]; with `view` alone they were given up.
//! - [`super::attributes::ATTRIBUTES_KEY`], JSON text of [`super::FileAttributes`].

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::span::{Derive, Span};
use crate::error::{Error, Result};
use crate::vineyard::{BlobKey, BlobSource, InstanceId, Meta, ObjectId};

/// Key of the recipe.
pub const RECIPE: &str = "vineyard_fs_recipe_";
/// Key of the blob with the bytes of the file that are no column data.
pub const LITERAL: &str = "vineyard_fs_literal_";
/// Key of the blob with all bytes of a file whose columns are stored decoded. It may be given up.
pub const KEPT: &str = "vineyard_fs_kept_";
/// What all keys of this project begin with.
pub const PREFIX: &str = "vineyard_fs_";

/// Most extents that are read.
const MAX_EXTENTS: usize = 1 << 22;

/// Extent kinds other than a blob's number.
pub(super) const KIND_LITERAL: i64 = -1;
pub(super) const KIND_ZEROS: i64 = -2;
pub(super) const KIND_NARROW: i64 = -3;
pub(super) const KIND_SHIFTED: i64 = -4;

/// The format that a file was written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Written {
    /// `.arrow`
    Arrow,
    /// `.feather`
    Feather,
    /// `.parquet`
    Parquet,
    /// `.npy`
    Npy,
    /// `.pkl`
    Pickle,
    /// Any other file.
    Plain,
}

impl Written {
    /// All formats.
    pub const ALL: [Written; 6] =
        [Written::Arrow, Written::Feather, Written::Parquet, Written::Npy, Written::Pickle, Written::Plain];

    /// The file name extension, empty for a plain file.
    pub fn extension(self) -> &'static str {
        match self {
            Written::Arrow => "arrow",
            Written::Feather => "feather",
            Written::Parquet => "parquet",
            Written::Npy => "npy",
            Written::Pickle => "pkl",
            Written::Plain => "",
        }
    }

    /// The format of an extension without its dot.
    pub fn from_extension(extension: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|w| w.extension() == extension)
    }
}

/// The format that an object was written in, also where its file's bytes were given up; `None` if no file was written.
pub fn written_as(meta: &Meta) -> Option<Written> {
    let recipe = meta.json_text(RECIPE).ok()?;
    recipe.get("view").and_then(Value::as_str).and_then(Written::from_extension)
}

/// Content for a copy of an object without the bytes of the file that it was written as; `None` if it keeps none.
pub fn without_kept(meta: &Meta) -> Option<Value> {
    meta.get(KEPT)?;
    let written = written_as(meta)?;
    let mut content = content_with(meta, |key| (key == RECIPE).then(|| given_up(written).into()))?;
    content.as_object_mut()?.remove(KEPT);
    Some(content)
}

/// Content for another object with the members of this one, and some values in place of its own; `None` if a member has no
/// id.
pub fn content_with(meta: &Meta, instead: impl Fn(&str) -> Option<Value>) -> Option<Value> {
    let mut content = Map::new();
    for (key, value) in meta.iter() {
        match (key.as_str(), value) {
            // What the store says about an object, not its writer.
            ("id" | "signature" | "instance_id" | "transient" | "global", _) => {}
            ("__name" | "__timestamp" | "__labels", _) => {}
            (key, Value::Object(member)) => {
                let mut link = Map::new();
                link.insert("id".into(), member.get("id")?.clone());
                if member.get("typename").and_then(Value::as_str) == Some("vineyard::Blob") {
                    link.insert("typename".into(), "vineyard::Blob".into());
                }
                content.insert(key.into(), link.into());
            }
            (key, value) => drop(content.insert(key.into(), instead(key).unwrap_or_else(|| value.clone()))),
        }
    }
    Some(content.into())
}

/// The recipe that is left when a file's bytes are given up: what it was written as.
pub fn given_up(written: Written) -> String {
    serde_json::json!({"view": written.extension()}).to_string()
}

/// How to put a written file together again.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What it was written as.
    pub view: Written,
    /// Its size in bytes.
    pub size: u64,
    /// Its bytes, in order.
    pub spans: Vec<Span>,
    /// True if the bytes are a blob of their own, [`KEPT`], that may have been given up.
    pub droppable: bool,
}

/// The recipe of an object; `None` if it was not written as a file, or needs none.
///
/// # Errors
/// `Malformed` if the recipe is there and is none.
pub fn recipe_of(meta: &Meta) -> Result<Option<Recipe>> {
    if meta.get(RECIPE).is_none() {
        return Ok(None);
    }
    let value = meta.json_text(RECIPE)?;
    let view = value.get("view").and_then(Value::as_str).and_then(Written::from_extension);
    let view = view.ok_or_else(|| meta.error("has a recipe of no known view"))?;
    if value.get("size").is_none() && meta.get(KEPT).is_none() {
        // The bytes were given up: the view is made anew from the columns.
        return Ok(None);
    }
    let size = value.get("size").and_then(Value::as_u64).filter(|&n| n <= i64::MAX as u64);
    let size = size.ok_or_else(|| meta.error("has a recipe without a size"))?;
    let Some(extents) = value.get("extents") else {
        let spans = vec![Span::blob(meta.blob(KEPT)?, size)];
        return Ok(Some(Recipe { view, size, spans, droppable: true }));
    };
    let extents = extents.as_array().filter(|list| list.len() <= MAX_EXTENTS);
    let extents = extents.ok_or_else(|| meta.error("has a recipe without extents"))?;
    let blobs = blobs_in_order(meta);
    let literal = meta.optional_member(LITERAL)?.and_then(|m| m.as_blob());
    let mut literal_used = 0u64;
    let mut spans = Vec::with_capacity(extents.len());
    for extent in extents {
        let numbers: Option<Vec<i64>> = extent.as_array().and_then(|l| l.iter().map(Value::as_i64).collect());
        let span = numbers.and_then(|numbers| span(&numbers, &blobs, literal, &mut literal_used));
        spans.push(span.ok_or_else(|| meta.error("has a recipe with a broken extent"))?);
    }
    let total = spans.iter().try_fold(0u64, |sum, span| sum.checked_add(span.len()));
    if total != Some(size) {
        return Err(meta.error(format!("has a recipe of {size} bytes whose extents have {total:?}")));
    }
    Ok(Some(Recipe { view, size, spans, droppable: false }))
}

fn span(numbers: &[i64], blobs: &[BlobKey], literal: Option<BlobKey>, literal_used: &mut u64) -> Option<Span> {
    let length = |n: i64| u64::try_from(n).ok();
    let blob = |n: i64| usize::try_from(n).ok().and_then(|n| blobs.get(n)).copied();
    match *numbers {
        [KIND_LITERAL, len] => {
            let (offset, len) = (*literal_used, length(len)?);
            *literal_used = offset.checked_add(len)?;
            Some(Span::Blob { key: literal?, offset, len })
        }
        [KIND_ZEROS, len] => Some(Span::Zeros(length(len)?)),
        [kind @ (KIND_NARROW | KIND_SHIFTED), index, offset, count, shift] => {
            let (offset, count) = (length(offset)?, length(count)?);
            let len = count.checked_mul(8)?;
            offset.checked_add(len)?;
            Some(Span::derived(Narrow {
                from: Span::Blob { key: blob(index)?, offset, len },
                width: if kind == KIND_NARROW { 4 } else { 8 },
                shift,
            }))
        }
        [index, offset, len] => {
            let (offset, len) = (length(offset)?, length(len)?);
            offset.checked_add(len)?;
            Some(Span::Blob { key: blob(index)?, offset, len })
        }
        _ => None,
    }
}

/// The blobs with bytes of an object and its members, each once: keys in byte order, members where they are met, this
/// project's keys of the object itself left out.
pub fn blobs_in_order(meta: &Meta) -> Vec<BlobKey> {
    type Entries<'a> = Vec<(&'a String, &'a Map<String, Value>)>;
    fn walk(mut members: Entries<'_>, seen: &mut HashSet<BlobKey>, out: &mut Vec<BlobKey>) {
        members.sort_unstable_by_key(|(key, _)| *key);
        for (_, member) in members {
            if member.get("typename").and_then(Value::as_str) == Some("vineyard::Blob") {
                let id = member.get("id").and_then(Value::as_str).and_then(|text| text.parse::<ObjectId>().ok());
                let instance = member.get("instance_id").and_then(Value::as_u64);
                let instance = instance.map_or(InstanceId::UNSPECIFIED, InstanceId);
                if let Some(id) = id.filter(|id| id.is_stored_blob())
                    && seen.insert(BlobKey { instance, id })
                {
                    out.push(BlobKey { instance, id });
                }
            } else {
                walk(member.iter().filter_map(|(k, v)| v.as_object().map(|v| (k, v))).collect(), seen, out);
            }
        }
    }
    let mut out = Vec::new();
    let own = meta.iter().filter(|(key, _)| !key.starts_with(PREFIX));
    walk(own.filter_map(|(k, v)| v.as_object().map(|v| (k, v))).collect(), &mut HashSet::new(), &mut out);
    out
}

/// 64-bit offsets as they were before they were widened or joined.
#[derive(Clone, Debug)]
pub struct Narrow {
    /// The 64-bit offsets.
    pub from: Span,
    /// Bytes of one that comes out: 4 or 8.
    pub width: u64,
    /// Subtracted from each.
    pub shift: i64,
}

impl Derive for Narrow {
    fn len(&self) -> u64 {
        self.from.len() / 8 * self.width
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let width = self.width as usize;
        let mut position = offset;
        let mut rest = out;
        let mut wide = Vec::new();
        while !rest.is_empty() {
            // Whole entries around the wanted bytes, a piece at a time.
            let skip = (position % self.width) as usize;
            let count = (skip + rest.len()).div_ceil(width).min(1 << 15);
            wide.resize(count * 8, 0);
            self.from.read(source, position / self.width * 8, &mut wide)?;
            let n = rest.len().min(count * width - skip);
            let (now, later) = rest.split_at_mut(n);
            // In place: entry i moves to the front or stays.
            for i in 0..count {
                let mut entry = [0; 8];
                entry.copy_from_slice(&wide[i * 8..i * 8 + 8]);
                let value = i64::from_le_bytes(entry).wrapping_sub(self.shift).to_le_bytes();
                wide[i * width..(i + 1) * width].copy_from_slice(&value[..width]);
            }
            now.copy_from_slice(&wide[skip..skip + n]);
            rest = later;
            position += n as u64;
        }
        Ok(())
    }

    fn blobs(&self, range: std::ops::Range<u64>) -> Vec<BlobKey> {
        if range.is_empty() {
            return Vec::new();
        }
        self.from.blobs(range.start / self.width * 8..range.end.div_ceil(self.width) * 8)
    }

    fn inputs(&self) -> Vec<Span> {
        vec![self.from.clone()]
    }
}

/// 64-bit offsets as 32-bit ones.
///
/// # Errors
/// `Malformed` if the span is no whole number of offsets.
pub fn narrow(from: Span) -> Result<Span> {
    if !from.len().is_multiple_of(8) {
        return Err(Error::malformed(format!("64-bit offsets in {} bytes", from.len())));
    }
    Ok(Span::derived(Narrow { from, width: 4, shift: 0 }))
}

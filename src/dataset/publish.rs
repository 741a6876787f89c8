//! Turning a written file into vineyard objects.
//!
//! [`plan`] looks at the bytes and decides what they are; it copies no column data. [`execute`] creates the blobs and
//! objects of a plan, and [`publish`] points a name at them as well. Nothing that was written is refused because of its
//! content: what is not the format that its name says is stored as it is.

mod arrow_file;
mod arrow_stream;
pub(in crate::dataset) mod check;
mod column;
mod datetimes;
mod decode;
#[cfg(test)]
mod dictionaries;
mod frame;
#[cfg(test)]
mod hostile;
mod inflate;
mod ipc;
mod join;
mod native;
mod npy;
mod parquet_claims;
mod parquet_file;
#[cfg(test)]
mod parquet_tests;
mod parquet_times;
mod parquet_types;
mod plan;
mod proof;
mod recipe;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod thrift;

use std::fs::File;
use std::sync::Arc;

pub use self::inflate::{Codec, Inflated};
pub use self::npy::Transposed;
use self::plan::{Draft, field};
pub use self::plan::{Field, Outcome, Part, Plan, PlannedBlob, PlannedObject};
pub use self::store::{Published, execute, publish, realize};
use super::attributes::{ATTRIBUTES_KEY, FileAttributes};
use super::native::FILE;
use super::recipe::{RECIPE, Written};
use crate::error::{Error, Kind, Result};
use crate::vineyard::store::StoreStatus;

pub(super) use self::arrow_stream::schema as schema_message;
pub(super) use self::column::width as type_width;

/// Most objects that are made with one request. vineyardd takes 0.2 to 0.5 ms for each and answers nobody else meanwhile.
const MOST_OBJECTS: usize = 8192;

/// A written file: a memory file and a private mapping of it that nobody truncates or changes any more.
#[derive(Clone, Copy, Debug)]
pub struct Staged<'a> {
    /// All its bytes.
    pub bytes: &'a [u8],
    /// The file.
    pub file: &'a File,
}

/// How much of a format a file's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// Begins and ends as the format does.
    Complete,
    /// Begins as the format does, and the end is missing; or zeros are where the format begins.
    Incomplete,
    /// No bytes.
    Empty,
    /// Something else.
    Foreign,
}

/// Tells a finished file from one whose writer is not done, by its two ends. Cheap: no column data is looked at.
pub fn completeness(bytes: &[u8], view: Written) -> Completeness {
    use Completeness::*;
    if view == Written::Plain {
        return Complete;
    }
    if bytes.is_empty() {
        return Empty;
    }
    // No format begins like this. It may be a file that was made as long as it will be, before its first byte is written.
    if bytes.iter().take(8).all(|&b| b == 0) {
        return Incomplete;
    }
    let short = |magic: &[u8]| bytes.len() < magic.len() && magic.starts_with(bytes);
    let done = |complete: bool| if complete { Complete } else { Incomplete };
    match view {
        Written::Arrow | Written::Feather => {
            if bytes.starts_with(arrow_file::MAGIC) {
                return done(arrow_file::has_end(bytes));
            }
            match arrow_stream::head(bytes) {
                arrow_stream::Head::Stream => done(arrow_stream::complete(bytes)),
                arrow_stream::Head::Short => Incomplete,
                arrow_stream::Head::Other => {
                    if short(arrow_file::MAGIC) {
                        Incomplete
                    } else {
                        Foreign
                    }
                }
            }
        }
        Written::Parquet => {
            const MAGIC: &[u8] = b"PAR1";
            match bytes.starts_with(MAGIC) {
                true => done(bytes.len() >= 12 && bytes.ends_with(MAGIC)),
                false => {
                    if short(MAGIC) {
                        Incomplete
                    } else {
                        Foreign
                    }
                }
            }
        }
        Written::Npy => {
            if !bytes.starts_with(npy::MAGIC) {
                return if short(npy::MAGIC) { Incomplete } else { Foreign };
            }
            match npy::header(bytes) {
                Err(npy::Missing::Short) => Incomplete,
                Err(npy::Missing::Broken(_)) => Foreign,
                Ok(header) => match header.data_len().and_then(|n| n.checked_add(header.data)) {
                    Some(end) if end > bytes.len() as u64 => Incomplete,
                    Some(end) if end < bytes.len() as u64 => Foreign,
                    // Structured elements and Python objects: where they end is not known.
                    _ => Complete,
                },
            }
        }
        // Protocols 2 to 5 begin with their number; older ones with anything.
        Written::Pickle => match bytes {
            [0x80] => Incomplete,
            [0x80, 2..=5, .., b'.'] => Complete,
            [0x80, 2..=5, ..] => Incomplete,
            _ => Foreign,
        },
        Written::Plain => Complete,
    }
}

/// What a plan must keep to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes that compressed data may become: what the store could hold if nothing else were in it. What it has no
    /// room for now is found out when blobs are made.
    pub inflated: u64,
}

impl Limits {
    /// The limits of a store.
    pub fn of(status: StoreStatus) -> Self {
        Limits { inflated: status.memory_limit }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits { inflated: 1 << 40 }
    }
}

/// Decides what a written file becomes.
///
/// Bytes that are not what `view` says become a plain file, with a warning in the plan; the caller stores that under the
/// full file name.
///
/// # Errors
/// `Invalid` if the file begins as its format does and its end is missing: the writer is not done, or was killed.
pub fn plan(staged: &Staged<'_>, view: Written, attrs: &FileAttributes, limits: Limits) -> Result<Plan> {
    let warning = match completeness(staged.bytes, view) {
        Completeness::Complete if view == Written::Plain => return Ok(plain(staged, attrs)),
        Completeness::Complete => match native_plan(staged, view, attrs, limits) {
            Ok(plan) if plan.objects_at_once() <= MOST_OBJECTS => return Ok(plan),
            Ok(plan) => format!(
                "stored as it is: vineyard would take too long to make {} arrays (columns times record batches)",
                plan.objects_at_once()
            ),
            Err(error) if error.is_of_content() => format!("stored as it is: {error}"),
            Err(error) => return Err(error),
        },
        Completeness::Incomplete => {
            let what = view.extension();
            return Err(Error::new(Kind::Invalid, format!("incomplete: it begins as a .{what} file and has no end")));
        }
        Completeness::Empty => "stored as it is: it is empty".into(),
        Completeness::Foreign => format!("stored as it is: it is no .{} file", view.extension()),
    };
    let mut plan = plain(staged, attrs);
    plan.warnings.push(warning);
    Ok(plan)
}

/// A file as it is.
pub fn plain(staged: &Staged<'_>, attrs: &FileAttributes) -> Plan {
    let mut draft = Draft::default();
    let size = staged.bytes.len() as u64;
    let buffer = draft.blob(vec![Part::Staged(0..size)]);
    let fields = vec![
        field("size_", size),
        field("nbytes", size),
        ("buffer_".into(), buffer),
        field(ATTRIBUTES_KEY, attrs.to_text()),
    ];
    draft.object(FILE, fields);
    draft.finish(Outcome::File)
}

fn native_plan(staged: &Staged<'_>, view: Written, attrs: &FileAttributes, limits: Limits) -> Result<Plan> {
    let bytes = staged.bytes;
    let size = bytes.len() as u64;
    let mut draft = Draft::default();
    let mut decoding = None;
    let mut warnings = Vec::new();
    let (outcome, typename, mut root, exact) = match view {
        Written::Arrow | Written::Feather => {
            let read = if bytes.starts_with(arrow_file::MAGIC) { arrow_file::read } else { arrow_stream::read };
            let mut batches = read(bytes, limits.inflated)?;
            match frame::frame(&mut draft, &batches, bytes)? {
                Some(root) => (Outcome::Frame, "vineyard::DataFrame".into(), root, batches.exact),
                None => {
                    batches.merge_small(bytes)?;
                    let root = table::table(&mut draft, &batches)?;
                    (Outcome::Table, "vineyard::Table".into(), root, batches.exact)
                }
            }
        }
        Written::Npy => {
            let (typename, root, exact) = npy::tensor(&mut draft, bytes)?;
            (Outcome::Tensor, typename, root, exact)
        }
        Written::Pickle => {
            let buffer = draft.blob(vec![Part::Staged(0..size)]);
            let mut root = vec![field("size_", size), field("nbytes", size), ("buffer_".into(), buffer)];
            // The bytes of the file are the value: the recipe is its one blob.
            let recipe = serde_json::json!({"view": view.extension(), "size": size, "extents": [[0, 0, size]]});
            root.push(field(RECIPE, recipe.to_string()));
            root.push(field(ATTRIBUTES_KEY, attrs.to_text()));
            draft.object("vineyard::PickleBuffer", root);
            return Ok(draft.finish(Outcome::Pickle));
        }
        Written::Parquet => {
            let decode = parquet_file::Decode::open(staged, limits.inflated)?;
            warnings.extend_from_slice(decode.warnings());
            let frame = match decode.collect()? {
                Some(batches) => frame::frame(&mut draft, &batches, bytes)?,
                None => None,
            };
            match frame {
                Some(root) => (Outcome::Frame, "vineyard::DataFrame".into(), root, false),
                None => {
                    decoding = Some(Arc::new(decode));
                    (Outcome::Table, "vineyard::Table".into(), Vec::new(), false)
                }
            }
        }
        Written::Plain => return Ok(plain(staged, attrs)),
    };
    recipe::add(&mut draft, &mut root, view, size, exact);
    root.push(field(ATTRIBUTES_KEY, attrs.to_text()));
    draft.object(typename, root);
    let mut plan = draft.finish(outcome);
    plan.decode = decoding;
    plan.warnings = warnings;
    plan.fallback = Some(Box::new(plain(staged, attrs)));
    Ok(plan)
}

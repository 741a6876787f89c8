//! What waits until data of other instances is here.
//!
//! Offsets, dictionary keys and text are checked before readers see them. For data that is here that happens at the
//! first open; of a remote table it would bring every string column, so each column is checked when it is first read.

use std::collections::HashMap;
use std::ops::Range;

use arrow_schema::DataType;

use crate::dataset::{self, ArrayLayout, Dataset, Span};
use crate::error::{Context, Result};
use crate::sync::OnceLock;
use crate::vineyard::{BlobKey, BlobSource};

/// Parts of blobs.
type Parts = Vec<(BlobKey, Range<u64>)>;

/// One column of one batch that is to be checked.
#[derive(Debug)]
struct Check {
    batch: usize,
    column: usize,
    parts: Parts,
    done: OnceLock<()>,
}

/// The checks of a dataset that were not made when it was opened.
#[derive(Debug, Default)]
pub struct Deferred {
    checks: Vec<Check>,
    by_blob: HashMap<BlobKey, Vec<usize>>,
}

impl Deferred {
    /// All checks that the dataset needs.
    pub fn of(dataset: &Dataset) -> Self {
        let mut deferred = Deferred::default();
        let batches = dataset.table().map(|table| table.batches.as_slice()).unwrap_or_default();
        for (batch, columns) in batches.iter().enumerate() {
            for (column, layout) in columns.columns.iter().enumerate().filter(|(_, layout)| is_checked(layout)) {
                let mut parts = Parts::new();
                walk(layout, &mut |layout| layout.buffers.iter().for_each(|span| whole(span, &mut parts)));
                for (key, _) in &parts {
                    let list = deferred.by_blob.entry(*key).or_default();
                    if list.last() != Some(&deferred.checks.len()) {
                        list.push(deferred.checks.len());
                    }
                }
                deferred.checks.push(Check { batch, column, parts, done: OnceLock::new() });
            }
        }
        deferred
    }

    /// Makes the checks that these blobs have a part in, and brings what they look at.
    ///
    /// # Errors
    /// `Malformed` with the column; what the source says of its blobs.
    pub fn check(&self, blobs: &[BlobKey], dataset: &Dataset, source: &dyn BlobSource) -> Result<()> {
        let mut due: Vec<usize> = blobs.iter().filter_map(|key| self.by_blob.get(key)).flatten().copied().collect();
        due.sort_unstable();
        due.dedup();
        let due: Vec<&Check> =
            due.into_iter().filter_map(|i| self.checks.get(i)).filter(|check| check.done.get().is_none()).collect();
        let Some(table) = dataset.table().filter(|_| !due.is_empty()) else { return Ok(()) };
        // All are on their way before the first is waited for.
        due.iter().try_for_each(|check| source.want(&check.parts, false))?;
        for check in due {
            let Some(layout) = table.batches.get(check.batch).and_then(|batch| batch.columns.get(check.column)) else {
                continue;
            };
            let name = || table.schema.fields().get(check.column).map_or("", |field| field.name().as_str());
            dataset::check(layout, source).context(|| format!("column {:?}", name()))?;
            let keys: Vec<BlobKey> = check.parts.iter().map(|(key, _)| *key).collect();
            source.verify(&keys)?;
            let _ = check.done.set(());
        }
        Ok(())
    }
}

/// The parts of blobs that are looked at to count nulls that metadata does not tell.
pub fn counted(dataset: &Dataset) -> Parts {
    let mut parts = Parts::new();
    let batches = dataset.table().map(|table| table.batches.as_slice()).unwrap_or_default();
    for layout in batches.iter().flat_map(|batch| &batch.columns) {
        walk(layout, &mut |layout| {
            if layout.null_count.is_none() && layout.data_type != DataType::Null {
                layout.buffers.first().into_iter().for_each(|validity| whole(validity, &mut parts));
            }
        });
    }
    parts
}

fn whole(span: &Span, parts: &mut Parts) {
    parts.extend(span.parts(0..span.len()));
}

fn walk(layout: &ArrayLayout, visit: &mut dyn FnMut(&ArrayLayout)) {
    visit(layout);
    layout.children.iter().for_each(|child| walk(child, visit));
    layout.dictionary.iter().for_each(|values| walk(values, visit));
}

/// True if [`dataset::check`] looks at data of the array.
fn is_checked(layout: &ArrayLayout) -> bool {
    let mut checked = false;
    walk(layout, &mut |layout| {
        checked |= matches!(
            layout.data_type,
            DataType::Utf8
                | DataType::LargeUtf8
                | DataType::Binary
                | DataType::LargeBinary
                | DataType::List(_)
                | DataType::LargeList(_)
                | DataType::Map(..)
                | DataType::Dictionary(..)
                | DataType::Utf8View
                | DataType::BinaryView
                | DataType::ListView(_)
                | DataType::LargeListView(_)
                | DataType::Union(..)
                | DataType::RunEndEncoded(..)
        );
    });
    checked
}

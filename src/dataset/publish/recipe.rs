//! The recipe of a written file: which of its bytes are column data, and the rest.

use std::collections::HashSet;
use std::ops::Range;

use serde_json::json;

use super::plan::{Draft, Field, Part, PlannedObject, field};
use crate::dataset::recipe::{KEPT, KIND_LITERAL, KIND_NARROW, KIND_SHIFTED, LITERAL, PREFIX, RECIPE, Written};

/// Bytes of a column below this length are kept once more with the rest: cheaper than an extent of their own.
const SMALL: u64 = 64;

/// Most extents of column data, as they are part of the metadata. Files with more keep their smallest ones twice.
const MAX_CLAIMS: usize = 50_000;

/// Adds the recipe of a file of `size` bytes to the root's keys. With `exact` the file is put together from the blobs
/// and a blob of the remaining bytes; otherwise all its bytes are kept.
pub(super) fn add(draft: &mut Draft, root: &mut Vec<(String, Field)>, view: Written, size: u64, exact: bool) {
    if !exact {
        let kept = draft.blob(vec![Part::Staged(0..size)]);
        root.push(field(RECIPE, json!({"view": view.extension(), "size": size}).to_string()));
        root.push((KEPT.into(), kept));
        return;
    }
    let mut literal = Vec::new();
    let mut extents = Vec::new();
    let mut position = 0;
    let claims = claims(draft, root);
    let rest = |from: u64, to: u64, extents: &mut Vec<_>, literal: &mut Vec<Part>| {
        if from < to {
            extents.push(json!([KIND_LITERAL, to - from]));
            literal.push(Part::Staged(from..to));
        }
    };
    for claim in claims {
        // Buffers that share bytes: the first one has them.
        if claim.at.start < position {
            continue;
        }
        rest(position, claim.at.start, &mut extents, &mut literal);
        let length = claim.at.end - claim.at.start;
        extents.push(match claim.shift {
            None => json!([claim.blob, claim.offset, length]),
            Some((width, shift)) => {
                let kind = if width == 4 { KIND_NARROW } else { KIND_SHIFTED };
                json!([kind, claim.blob, claim.offset, length / width, shift])
            }
        });
        position = claim.at.end;
    }
    rest(position, size, &mut extents, &mut literal);
    let literal = draft.blob(literal);
    root.push(field(RECIPE, json!({"view": view.extension(), "size": size, "extents": extents}).to_string()));
    root.push((LITERAL.into(), literal));
}

/// Bytes of the file that a blob holds.
struct Claim {
    at: Range<u64>,
    /// The blob's number in the order of the tree.
    blob: usize,
    /// Where in the blob.
    offset: u64,
    /// For offsets: bytes of one in the file, and what was added.
    shift: Option<(u64, i64)>,
}

fn claims(draft: &Draft, root: &[(String, Field)]) -> Vec<Claim> {
    let mut claims = Vec::new();
    for (number, &index) in order(&draft.objects, root).iter().enumerate() {
        let Some(blob) = draft.blobs.get(index) else { continue };
        let mut offset = 0;
        for part in &blob.parts {
            let (at, shift) = match part {
                Part::Staged(at) => (at, None),
                Part::Shifted { at, width, shift } => (at, Some((*width, *shift))),
                other => {
                    offset += other.len();
                    continue;
                }
            };
            if at.end - at.start >= SMALL {
                claims.push(Claim { at: at.clone(), blob: number, offset, shift });
            }
            offset += part.len();
        }
    }
    if claims.len() > MAX_CLAIMS {
        claims.sort_unstable_by_key(|claim| std::cmp::Reverse(claim.at.end - claim.at.start));
        claims.truncate(MAX_CLAIMS);
    }
    claims.sort_by_key(|claim| (claim.at.start, std::cmp::Reverse(claim.at.end)));
    claims
}

/// Blobs by the number that [`crate::dataset::recipe::blobs_in_order`] gives them.
fn order(objects: &[PlannedObject], root: &[(String, Field)]) -> Vec<usize> {
    fn walk(
        objects: &[PlannedObject],
        mut fields: Vec<&(String, Field)>,
        met: &mut HashSet<usize>,
        seen: &mut HashSet<usize>,
        out: &mut Vec<usize>,
    ) {
        fields.sort_unstable_by_key(|(key, _)| key);
        for (_, field) in fields {
            match field {
                Field::Blob(index) if seen.insert(*index) => out.push(*index),
                // A shared object has nothing new the second time.
                Field::Object(index) if met.insert(*index) => {
                    if let Some(object) = objects.get(*index) {
                        walk(objects, object.fields.iter().collect(), met, seen, out);
                    }
                }
                _ => {}
            }
        }
    }
    let mut out = Vec::new();
    let own = root.iter().filter(|(key, _)| !key.starts_with(PREFIX)).collect();
    walk(objects, own, &mut HashSet::new(), &mut HashSet::new(), &mut out);
    out
}

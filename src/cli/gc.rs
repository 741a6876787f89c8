//! `vineyard-fs gc`: removes what names and copies have outlived.

use serde_json::{Value, json};

use super::store::{self, Place};
use crate::error::{Error, Kind, Result};
use crate::fs::copies::Copy;
use crate::fs::gc::Finding;

/// What `gc` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Tell what would be done, and do nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// As JSON: a list of objects
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Cleans up, first after commands and servers that were killed on this machine. What cannot be cleaned up does not
/// keep the rest.
///
/// # Errors
/// If something could not be cleaned up.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open()?;
    let mut done = Vec::new();
    let mut failures = 0;
    let reclaimed = if arguments.dry_run { opened.left_behind() } else { opened.reclaim() };
    let reclaimed = reclaimed.unwrap_or_else(|error| {
        failures += 1;
        eprintln!("vineyard-fs: what killed commands and servers have left: {error}");
        0
    });
    for finding in opened.fs.find_garbage()? {
        match if arguments.dry_run { Ok(true) } else { opened.fs.clean(&finding) } {
            Ok(true) => done.push(finding),
            // Somebody gave the name another value meanwhile.
            Ok(false) => {}
            Err(error) => {
                failures += 1;
                eprintln!("vineyard-fs: {}: {error}", line(&finding));
            }
        }
    }
    let young = opened.fs.young_saves()?;
    opened.warn();
    match arguments.json {
        true => {
            let left = (reclaimed > 0).then(|| json!({"kind": "left", "looked_at": reclaimed}));
            store::print_json(&left.into_iter().chain(done.iter().map(json_of)).collect())?;
        }
        false if done.is_empty() && young == 0 && reclaimed == 0 => store::print("nothing to clean up\n")?,
        false => {
            let would = if arguments.dry_run { "would be: " } else { "" };
            if reclaimed > 0 {
                let what = format!("removed what killed commands and servers have left: {reclaimed} objects and blobs");
                store::print(&format!("{would}{what} were looked at\n"))?;
            }
            if young > 0 {
                let saves = if young == 1 { "1 save is".to_owned() } else { format!("{young} saves are") };
                let when = "what an unfinished one has left is removed 10 minutes after it began";
                store::print(&format!("{saves} under way or unfinished: {when}\n"))?;
            }
            store::print(&done.iter().map(|finding| format!("{would}{}\n", line(finding))).collect::<String>())?;
        }
    }
    match failures {
        0 => Ok(()),
        n => Err(Error::new(Kind::Unavailable, format!("{n} could not be cleaned up; run it again later"))),
    }
}

fn copy_text(copy: &Copy) -> String {
    format!("copy {} of {} on instance {}", copy.object, copy.source, copy.instance)
}

fn line(finding: &Finding) -> String {
    match finding {
        Finding::Dangling { name, object, life } => {
            format!("removed the name {:?} of {object}: {life}", store::printable(name))
        }
        Finding::Orphaned { name, object, copy } => {
            let name = store::printable(name);
            format!("{name:?} is now {} on instance {}: {object} is gone", copy.object, copy.instance)
        }
        Finding::Unfinished { object, .. } => format!("removed what an unfinished save has left: {object}"),
        Finding::Needless(copy) => format!("removed the {}: no name leads to that any more", copy_text(copy)),
        Finding::Unknown(copy) => format!("removed the {}: nothing leads to it", copy_text(copy)),
        Finding::Lost(copy) => format!("forgot the {}: it is none any more", copy_text(copy)),
    }
}

fn json_of(finding: &Finding) -> Value {
    let of = |copy: &Copy| json!({"id": copy.object.to_string(), "instance": copy.instance.0});
    match finding {
        Finding::Dangling { name, object, life } => {
            json!({"kind": "dangling", "name": name, "id": object.to_string(), "reason": life.to_string()})
        }
        Finding::Orphaned { name, object, copy } => {
            json!({"kind": "orphaned", "name": name, "id": object.to_string(), "copy": of(copy)})
        }
        Finding::Unfinished { name, object, .. } => {
            json!({"kind": "unfinished", "name": name, "id": object.to_string()})
        }
        Finding::Needless(copy) => json!({"kind": "needless", "id": copy.source.to_string(), "copy": of(copy)}),
        Finding::Unknown(copy) => json!({"kind": "unknown", "id": copy.source.to_string(), "copy": of(copy)}),
        Finding::Lost(copy) => json!({"kind": "lost", "id": copy.source.to_string(), "copy": of(copy)}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::gc::Life;
    use crate::vineyard::{InstanceId, ObjectId};

    #[test]
    fn lines_and_json_tell_the_same() {
        let name = "a\u{1b}b".to_owned();
        let dangling = Finding::Dangling { name, object: ObjectId(7), life: Life::InstanceGone(InstanceId(3)) };
        assert!(line(&dangling).contains("o0000000000000007: it was on instance i3, which is gone"));
        assert!(!line(&dangling).contains('\u{1b}'));
        assert_eq!(json_of(&dangling)["kind"], "dangling");
        let copy = Copy { source: ObjectId(1), instance: InstanceId(2), object: ObjectId(9) };
        let orphaned = Finding::Orphaned { name: "x".into(), object: ObjectId(1), copy: copy.clone() };
        assert_eq!(json_of(&orphaned)["copy"], json!({"id": "o0000000000000009", "instance": 2}));
        for finding in [orphaned, Finding::Needless(copy.clone()), Finding::Unknown(copy.clone()), Finding::Lost(copy)]
        {
            assert!(line(&finding).contains("i2"), "{}", line(&finding));
        }
    }
}

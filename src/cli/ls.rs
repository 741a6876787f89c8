//! `vineyard-fs ls`: the datasets of a store, by the file names that a mount shows.

use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::store::{self, Place};
use crate::error::Result;
use crate::fs::direct::Named;
use crate::fs::gc::Life;
use crate::vineyard::InstanceId;

/// What `ls` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Only names that begin with this, or one file
    pub prefix: Option<String>,
    /// With type, rows, bytes of the listed view, instance and time
    #[arg(short, long)]
    pub long: bool,
    /// As JSON: a list of objects
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Lists.
///
/// # Errors
/// What the store answers.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open()?;
    let prefix = opened.path(arguments.prefix.as_deref().unwrap_or_default());
    let mut datasets = opened.fs.datasets(&prefix)?;
    if datasets.is_empty() && !prefix.is_empty() && !prefix.ends_with('/') {
        datasets.push(opened.fs.require(&prefix)?);
    }
    match arguments.json {
        true => store::print_json(&datasets.iter().map(json_of).collect()),
        false if arguments.long => store::print(&table(&datasets)),
        false => {
            store::print(&datasets.iter().map(|named| format!("{}{}\n", file(named), note(named))).collect::<String>())
        }
    }
}

fn file(named: &Named) -> String {
    store::printable(&named.path)
}

/// Why a name has no readable file.
fn note(named: &Named) -> String {
    match &named.summary {
        None => match named.life {
            Some(Life::Lives(instance)) => format!("  (away: instance {instance} does not answer)"),
            Some(life @ Life::InstanceGone(_)) => format!("  (dangling: object {}: {life})", named.object),
            _ => format!("  (dangling: object {} is gone)", named.object),
        },
        Some(summary) => match &summary.broken {
            Some(reason) => format!("  (broken: {})", store::printable(reason)),
            None => String::new(),
        },
    }
}

fn size(named: &Named) -> Option<u64> {
    named.summary.as_ref().filter(|summary| summary.broken.is_none()).and_then(|s| s.view(s.listed)).flatten()
}

fn json_of(named: &Named) -> Value {
    let summary = named.summary.as_deref();
    let state = match summary {
        None if matches!(named.life, Some(Life::Lives(_))) => "away",
        None => "dangling",
        Some(summary) if summary.broken.is_some() => "broken",
        Some(_) => "ok",
    };
    json!({
        "name": named.name,
        "file": named.path,
        "id": named.object.to_string(),
        "state": state,
        "reason": summary.map_or_else(|| named.life.map(|l| l.to_string()), |s| s.broken.as_deref().map(str::to_owned)),
        "type": summary.map(|s| &*s.typename),
        "rows": summary.and_then(|s| s.rows),
        "bytes": size(named),
        "instance": summary.map(|s| s.instance).filter(|id| *id != InstanceId::UNSPECIFIED).map(|id| id.0),
        "created": summary.map_or(Value::Null, |s| store::time_json(s.created)),
    })
}

fn table(datasets: &[Named]) -> String {
    let number = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
    let mut lines = vec![["TYPE", "ROWS", "BYTES", "INSTANCE", "TIME", "FILE"].map(str::to_owned)];
    lines.extend(datasets.iter().map(|named| {
        let file = format!("{}{}", file(named), note(named));
        match &named.summary {
            None => ["-".into(), "-".into(), "-".into(), "-".into(), "-".into(), file],
            Some(summary) => [
                store::type_text(&summary.typename),
                number(summary.rows),
                size(named).map_or("-".into(), |bytes| HumanBytes(bytes).to_string()),
                if summary.broken.is_some() { "-".into() } else { summary.instance_text() },
                store::time_text(summary.created),
                file,
            ],
        }
    }));
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|s| s.chars().count()).max();
    let widths: [usize; 5] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let [kind, rows, bytes, instance, time] = widths;
    let mut out = String::new();
    for [a, b, c, d, e, f] in &lines {
        out += &format!("{a:kind$}  {b:>rows$}  {c:>bytes$}  {d:>instance$}  {e:time$}  {f}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::SystemTime;

    use super::*;
    use crate::fs::objects::Summary;
    use crate::image::View;
    use crate::vineyard::ObjectId;

    fn named(broken: Option<&str>) -> Named {
        let summary = Summary {
            id: ObjectId(7),
            instance: InstanceId(3),
            signature: None,
            typename: "vineyard::Table".into(),
            created: SystemTime::UNIX_EPOCH,
            rows: Some(12),
            listed: View::Arrow,
            sizes: Box::new([(View::Arrow, Some(2048)), (View::Parquet, None)]),
            broken: broken.map(Into::into),
            attributes: None,
        };
        Named {
            name: "a\nb".into(),
            path: "a\nb.arrow".into(),
            object: ObjectId(7),
            view: View::Arrow,
            summary: Some(Arc::new(summary)),
            life: None,
        }
    }

    #[test]
    fn lines_and_json_tell_the_same() {
        let text = table(&[named(None)]);
        let line = text.lines().nth(1).unwrap_or_default();
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>(),
            ["Table", "12", "2.00", "KiB", "3", "-", "a\\nb.arrow"]
        );
        let value = json_of(&named(None));
        assert_eq!((&value["bytes"], &value["rows"], &value["state"]), (&json!(2048), &json!(12), &json!("ok")));
        let mut spread = named(None);
        let summary =
            spread.summary.take().map(|summary| Summary { instance: InstanceId::UNSPECIFIED, ..(*summary).clone() });
        spread.summary = summary.map(Arc::new);
        assert!(table(std::slice::from_ref(&spread)).contains(" several "));
        assert_eq!((&json_of(&named(None))["instance"], &json_of(&spread)["instance"]), (&json!(3), &Value::Null));
        let broken = named(Some("offset 9\u{7}"));
        assert_eq!(note(&broken), "  (broken: offset 9\\u{7})");
        assert_eq!(json_of(&broken)["bytes"], Value::Null);
        let dangling = Named { summary: None, ..broken };
        assert!(table(std::slice::from_ref(&dangling)).contains("dangling: object o0000000000000007 is gone"));
        assert_eq!(json_of(&dangling)["state"], "dangling");
    }
}

//! `vineyard-fs info`: all about one dataset.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use indicatif::{HumanBytes, HumanCount};
use serde_json::{Map, Value, json};

use super::store::{self, Opened, Place};
use crate::dataset::recipe::{self, Recipe};
use crate::dataset::{self, Dataset, FileAttributes};
use crate::error::Result;
use crate::fs::direct::Named;
use crate::fs::gc::Life;
use crate::fs::objects::Summary;
use crate::image::View;
use crate::vineyard::{InstanceId, Meta, ObjectId, Store};

/// Most members of one object, fields of a schema, and characters of a value that are shown to people; JSON has all.
const SHOWN: usize = 40;

/// What `info` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Dataset, by name or by the file name of a view
    pub name: String,
    /// As JSON, whole
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Tells.
///
/// # Errors
/// If there is no such name; what the store answers.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open()?;
    let named = opened.fs.require(&opened.path(&arguments.name))?;
    let report = report(&opened, &named)?;
    match arguments.json {
        true => store::print_json(&report),
        false => store::print(&text(&report)),
    }
}

fn report(opened: &Opened, named: &Named) -> Result<Value> {
    let mut report = json!({
        "name": named.name,
        "file": named.path,
        "id": named.object.to_string(),
        "state": if matches!(named.life, Some(Life::Lives(_))) { "away" } else { "dangling" },
        "reason": named.life.map(|life| life.to_string()),
    });
    let Some(summary) = &named.summary else { return Ok(report) };
    let mut add = |key: &str, value: Value| {
        if let (Some(report), false) = (report.as_object_mut(), value.is_null()) {
            report.insert(key.to_owned(), value);
        }
    };
    add("state", if summary.broken.is_some() { "broken" } else { "ok" }.into());
    add("reason", json!(summary.broken.as_deref()));
    add("type", json!(&*summary.typename));
    add("rows", json!(summary.rows));
    add("created", store::time_json(summary.created));
    add("signature", json!(summary.signature.map(|signature| format!("s{signature:016x}"))));
    add("views", views(named, summary));
    let meta = opened.store.metas(&[named.object], false)?.remove(&named.object);
    // Metadata that cannot be read at all has its reason in the summary.
    let Some(Ok(meta)) = meta else { return Ok(report) };
    add("instance", instance(opened, &meta)?);
    add("copies", copies(opened, named)?);
    let (here, blobs) = (opened.store.instance()?.id, meta.blobs());
    // Only an instance itself knows how large its blobs are.
    let ids: Vec<ObjectId> = blobs.iter().filter(|key| key.instance == here).map(|key| key.id).collect();
    let sizes = opened.store.blob_sizes(&ids)?;
    let bytes = (ids.len() == blobs.len()).then(|| sizes.values().sum::<u64>());
    add("blobs", json!({"count": blobs.len(), "bytes": bytes}));
    add("attributes", FileAttributes::of(&meta).map_or(Value::Null, |attributes| attributes_json(&attributes)));
    if let Ok(dataset) = dataset::decode(&meta, &*opened.store) {
        add("kind", dataset.kind().into());
        add("schema", schema(&dataset));
        add("tensor", tensor(&dataset));
    }
    if let Ok(Some(recipe)) = recipe::recipe_of(&meta) {
        add("recipe", recipe_json(&recipe));
    }
    add("tree", tree(&meta.to_json(), &sizes));
    Ok(report)
}

fn views(named: &Named, summary: &Summary) -> Value {
    if summary.broken.is_some() {
        return Value::Null;
    }
    let view = |(view, bytes): &(View, Option<u64>)| {
        let directory = named.path.rsplit_once('/').map_or(String::new(), |(directory, _)| format!("{directory}/"));
        let listed = *view == summary.listed;
        let file = if listed { named.path.clone() } else { directory + &named.file_name(*view) };
        json!({"file": file, "bytes": bytes, "listed": listed})
    };
    summary.sizes.iter().map(view).collect()
}

fn instance(opened: &Opened, meta: &Meta) -> Result<Value> {
    let here = opened.store.instance()?;
    let id = meta.instance();
    // A vineyardd without a cluster may have no such list.
    let cluster: BTreeMap<_, _> = opened.store.cluster().unwrap_or_default();
    let info = cluster.get(&id);
    // The parts of a global object tell where it is.
    let several = (id == InstanceId::UNSPECIFIED).then(|| {
        let mut parts: Vec<u64> = meta.blobs().iter().map(|blob| blob.instance.0).collect();
        parts.sort_unstable();
        parts.dedup();
        parts
    });
    Ok(json!({
        "id": several.is_none().then_some(id.0),
        "several": several,
        "here": id == here.id,
        "host": info.map(|info| &info.hostname),
        "socket": info.map(|info| &info.ipc_socket),
        "rpc_endpoint": info.map(|info| &info.rpc_endpoint),
    }))
}

/// Copies that exist; null if there are none.
fn copies(opened: &Opened, named: &Named) -> Result<Value> {
    let copies = opened.fs.copies(named.object)?;
    let lives = opened.fs.lives(&copies.iter().map(|copy| copy.object).collect::<Vec<_>>())?;
    let alive = copies.iter().filter(|copy| lives.get(&copy.object).is_some_and(|life| !life.is_over()));
    let list: Vec<Value> =
        alive.map(|copy| json!({"instance": copy.instance.0, "id": copy.object.to_string()})).collect();
    Ok(if list.is_empty() { Value::Null } else { list.into() })
}

fn attributes_json(attributes: &FileAttributes) -> Value {
    let xattrs = attributes.xattrs.iter();
    let xattrs: Map<String, Value> =
        xattrs.map(|(name, value)| (name.clone(), String::from_utf8_lossy(value).into())).collect();
    let time = |nanos: Option<i64>| nanos.map(|nanos| store::time_json(dataset::attributes::from_nanos(nanos)));
    json!({
        "mode": attributes.mode.map(|mode| format!("{mode:04o}")),
        "uid": attributes.uid,
        "gid": attributes.gid,
        "mtime": time(attributes.mtime),
        "atime": time(attributes.atime),
        "xattrs": xattrs,
    })
}

fn recipe_json(recipe: &Recipe) -> Value {
    json!({
        "written_as": recipe.view.extension(),
        "bytes": recipe.size,
        "extents": recipe.spans.len(),
        "keeps_whole_file": recipe.droppable,
    })
}

fn schema(dataset: &Dataset) -> Value {
    let Some(table) = dataset.table() else { return Value::Null };
    let field = |field: &std::sync::Arc<arrow_schema::Field>| {
        let mut out = json!({
            "name": field.name(),
            "type": field.data_type().to_string(),
            "nullable": field.is_nullable(),
        });
        if let (Some(out), false) = (out.as_object_mut(), field.metadata().is_empty()) {
            let sorted: BTreeMap<_, _> = field.metadata().iter().collect();
            out.insert("metadata".into(), json!(sorted));
        }
        out
    };
    let metadata: BTreeMap<_, _> = table.schema.metadata().iter().collect();
    json!({
        "fields": table.schema.fields().iter().map(field).collect::<Vec<_>>(),
        "batches": table.batches.len(),
        "metadata": metadata,
    })
}

fn tensor(dataset: &Dataset) -> Value {
    match dataset {
        Dataset::Tensor(tensor) => {
            json!({"dtype": tensor.descr, "shape": tensor.shape, "column_major": tensor.fortran})
        }
        _ => Value::Null,
    }
}

/// An object of metadata with its members; the depth was limited when the metadata was read.
fn tree(object: &Value, sizes: &HashMap<ObjectId, u64>) -> Value {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let size = text("id").parse::<ObjectId>().ok().and_then(|id| match id {
        ObjectId::EMPTY_BLOB => Some(0),
        id => sizes.get(&id).copied(),
    });
    let mut values = Map::new();
    let mut members = Map::new();
    for (key, value) in object.as_object().into_iter().flatten() {
        match value {
            Value::Object(_) => drop(members.insert(key.clone(), tree(value, sizes))),
            _ if matches!(key.as_str(), "id" | "typename") => {}
            _ => drop(values.insert(key.clone(), value.clone())),
        }
    }
    let mut out = json!({"type": text("typename"), "id": text("id")});
    if let Some(out) = out.as_object_mut() {
        out.extend(size.map(|size| ("bytes".to_owned(), size.into())));
        out.insert("values".into(), values.into());
        if !members.is_empty() {
            out.insert("members".into(), members.into());
        }
    }
    out
}

fn short(text: &str) -> String {
    let mut text = store::printable(text);
    if let Some((end, _)) = text.char_indices().nth(2 * SHOWN) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// For people.
fn text(report: &Value) -> String {
    let get = |path: &str| report.pointer(path).unwrap_or(&Value::Null);
    let show = |path: &str| match get(path) {
        Value::String(text) => short(text),
        Value::Null => "-".into(),
        other => other.to_string(),
    };
    let mut out = format!("{}  ({})\n", show("/name"), show("/file"));
    let mut line = |label: &str, text: String| {
        let _ = writeln!(out, "  {label:<11} {text}");
    };
    if show("/state") == "away" {
        line("state", format!("away: {}, and does not answer", show("/reason")));
        return out;
    }
    if show("/state") == "dangling" {
        line("state", format!("dangling: object {} is gone; `vineyard-fs rm` removes the name", show("/id")));
        return out;
    }
    let kind = get("/type").as_str().map(store::type_text).unwrap_or_default();
    line("type", format!("{kind}  {}", show("/id")));
    if !get("/reason").is_null() {
        line("broken", short(get("/reason").as_str().unwrap_or_default()));
    }
    if let Some(rows) = get("/rows").as_u64() {
        line("rows", HumanCount(rows).to_string());
    }
    if !get("/tensor").is_null() {
        line("tensor", format!("{} {}", show("/tensor/dtype"), show("/tensor/shape")));
    }
    let created = get("/created").as_str().and_then(|time| chrono::DateTime::parse_from_rfc3339(time).ok());
    line("created", created.map_or("-".into(), |time| store::time_text(time.into())));
    line("signature", show("/signature"));
    if !get("/instance").is_null() {
        let here = if get("/instance/here") == true { " (this one)" } else { "" };
        let several =
            get("/instance/several").as_array().map(|ids| ids.iter().map(Value::to_string).collect::<Vec<_>>());
        line(
            "instance",
            match several {
                Some(ids) => format!("several: {}", ids.join(", ")),
                None => format!("{}{here} on {}", show("/instance/id"), show("/instance/host")),
            },
        );
    }
    for copy in get("/copies").as_array().into_iter().flatten() {
        let text = |key: &str| copy.get(key).map(|value| value.as_str().map_or(value.to_string(), str::to_owned));
        line("copy", format!("{} as {}", text("instance").unwrap_or_default(), text("id").unwrap_or_default()));
    }
    let number = |value: Option<&Value>| value.and_then(Value::as_u64);
    if let Some(count) = number(report.pointer("/blobs/count")) {
        let bytes = number(report.pointer("/blobs/bytes"));
        let bytes = bytes.map_or("known where it lives".into(), |bytes| HumanBytes(bytes).to_string());
        line("memory", format!("{bytes}, blobs: {count}"));
    }
    for view in get("/views").as_array().into_iter().flatten() {
        let bytes = number(view.get("bytes"))
            .map_or("size known when it is opened".into(), |bytes| format!("{} ({bytes} bytes)", HumanBytes(bytes)));
        let listed = if view.get("listed") == Some(&Value::Bool(true)) { ", listed" } else { "" };
        let file = short(view.get("file").and_then(Value::as_str).unwrap_or_default());
        line("view", format!("{file}: {bytes}{listed}"));
    }
    if let Some(bytes) = number(report.pointer("/recipe/bytes")) {
        line("written as", format!(".{}, {bytes} bytes, read back as they were", show("/recipe/written_as")));
    }
    if !get("/attributes").is_null() {
        let owner = format!("{}:{}", show("/attributes/uid"), show("/attributes/gid"));
        line("attributes", format!("mode {}, owner {owner}", show("/attributes/mode")));
    }
    let fields = get("/schema/fields").as_array().cloned().unwrap_or_default();
    for (index, field) in fields.iter().take(SHOWN).enumerate() {
        let text = |key: &str| short(field.get(key).and_then(Value::as_str).unwrap_or_default());
        let nullable = if field.get("nullable") == Some(&Value::Bool(true)) { "" } else { " not null" };
        line(if index == 0 { "columns" } else { "" }, format!("{}: {}{nullable}", text("name"), text("type")));
    }
    if fields.len() > SHOWN {
        line("", format!("… and {} more", fields.len() - SHOWN));
    }
    if !get("/tree").is_null() {
        out.push_str("  object\n");
        branch(&mut out, "", get("/tree"), 2);
    }
    out
}

fn branch(out: &mut String, key: &str, object: &Value, depth: usize) {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let label = if key.is_empty() { String::new() } else { format!("{}: ", short(key)) };
    let size = object.get("bytes").and_then(Value::as_u64);
    let size = size.map_or(String::new(), |bytes| format!("  {}", HumanBytes(bytes)));
    let kind = short(&store::type_text(text("type")));
    let _ = writeln!(out, "{}{label}{kind}  {}{size}", "  ".repeat(depth), short(text("id")));
    let Some(members) = object.get("members").and_then(Value::as_object) else { return };
    for (key, member) in members.iter().take(SHOWN) {
        branch(out, key, member, depth + 1);
    }
    if members.len() > SHOWN {
        let _ = writeln!(out, "{}… and {} more", "  ".repeat(depth + 1), members.len() - SHOWN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_types_ids_and_sizes_of_all_members() {
        let blob = |id: &str| json!({"id": id, "typename": "vineyard::Blob", "instance_id": 1});
        let object = json!({"id": "o0000000000000010", "typename": "vineyard::Tensor<double>", "shape_": "[2]",
            "buffer_": blob("o8000000000000001"), "none_": blob("o8000000000000000")});
        let sizes = [(ObjectId(0x8000_0000_0000_0001), 16)].into();
        let tree = tree(&object, &sizes);
        assert_eq!(tree["members"]["buffer_"]["bytes"], 16);
        assert_eq!(tree["values"], json!({"shape_": "[2]"}));
        let mut text = String::new();
        branch(&mut text, "", &tree, 0);
        assert!(
            text.starts_with("Tensor<double>  o0000000000000010\n  buffer_: Blob  o8000000000000001  16 B\n"),
            "{text}"
        );
    }

    #[test]
    fn long_and_hostile_texts_are_cut_and_escaped() {
        let name = "x\u{1b}]0;".repeat(100);
        let members: Map<String, Value> =
            (0..100).map(|i| (format!("m{i}"), json!({"type": "t", "id": "o1"}))).collect();
        let report = json!({"name": name, "file": "f", "state": "ok", "type": "vineyard::Table",
            "tree": {"type": "t", "id": "o2", "members": members}});
        let text = text(&report);
        assert!(!text.contains('\u{1b}') && text.contains("… and 60 more"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() < 200));
    }
}

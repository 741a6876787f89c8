//! YAML that people also edit: written and changed as text, so that comments, order and style of the rest stay.
//!
//! Every change is checked by reading the result: our entries must be there, and everything else must mean what it
//! meant before. A document that cannot be changed that way (a flow mapping at the top, an anchor inside an entry that
//! is to be replaced) is refused.

use crate::error::{Error, Kind, Result};
use serde_json::Value;

/// The entries of a catalog file, in order, with anchors and merge keys resolved.
///
/// # Errors
/// [`Kind::Malformed`] if the text is not one YAML mapping.
pub fn parse(text: &str) -> Result<serde_yaml::Mapping> {
    let value: serde_yaml::Value = serde_yaml::from_str(text)
        .and_then(|mut value: serde_yaml::Value| value.apply_merge().map(|()| value))
        .map_err(|error| Error::malformed(format!("not valid YAML: {error}")))?;
    match value {
        serde_yaml::Value::Mapping(mapping) => Ok(mapping),
        serde_yaml::Value::Null => Ok(serde_yaml::Mapping::new()),
        _ => Err(Error::malformed("not valid YAML: a mapping of names to entries is needed")),
    }
}

/// Whether an entry that was read means the same as one that is to be written.
pub fn same(read: &serde_yaml::Value, planned: &serde_json::Map<String, Value>) -> bool {
    serde_json::to_value(read).is_ok_and(|read| read == Value::Object(planned.clone()))
}

/// An entry as text, two spaces a level.
pub fn entry(name: &str, config: &serde_json::Map<String, Value>, comment: Option<&str>) -> String {
    let mut text = String::new();
    if let Some(comment) = comment {
        text.push_str(&format!("# {comment}\n"));
    }
    mapping_item(&mut text, 0, name, &Value::Object(config.clone()));
    text
}

/// A whole document of nested mappings and lists, strings quoted unless they are plainly text.
pub fn document(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| mapping_item(&mut text, 0, key, value)),
        other => text.push_str(&format!("{}\n", scalar(other))),
    }
    text
}

fn mapping_item(text: &mut String, indent: usize, key: &str, value: &Value) {
    text.push_str(&format!("{:indent$}{}:", "", string(key)));
    block(text, indent, value);
}

/// What follows `key:` or `-`.
fn block(text: &mut String, indent: usize, value: &Value) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            map.iter().for_each(|(key, value)| mapping_item(text, indent + 2, key, value));
        }
        Value::Array(items) if !items.is_empty() => {
            text.push('\n');
            for item in items {
                list_item(text, indent + 2, item);
            }
        }
        other => text.push_str(&format!(" {}\n", scalar(other))),
    }
}

fn list_item(text: &mut String, indent: usize, item: &Value) {
    match item {
        Value::Object(map) if !map.is_empty() => {
            // The first key stands on the line of the dash.
            let mut inner = String::new();
            map.iter().for_each(|(key, value)| mapping_item(&mut inner, indent + 2, key, value));
            text.push_str(&format!("{:indent$}- {}", "", inner.trim_start_matches(' ')));
        }
        Value::Array(items) if !items.is_empty() => {
            text.push_str(&format!("{:indent$}-", ""));
            block(text, indent, item);
        }
        other => text.push_str(&format!("{:indent$}- {}\n", "", scalar(other))),
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => string(value),
        Value::Array(_) => "[]".into(),
        Value::Object(_) => "{}".into(),
    }
}

/// A string as YAML reads it back as that string, in version 1.1 (PyYAML, Go) and 1.2.
pub fn string(text: &str) -> String {
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "_./-@ ".contains(c))
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '/')
        && !text.ends_with(' ')
        && !matches!(
            text.to_ascii_lowercase().as_str(),
            "y" | "n" | "yes" | "no" | "true" | "false" | "on" | "off" | "null"
        );
    if plain {
        return text.to_owned();
    }
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            // Not printable in YAML 1.1, or a line break there.
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{85}') => {
                quoted.push_str(&format!("\\U{:08x}", u32::from(c)));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// An entry to put into a document.
#[derive(Debug, Clone)]
pub struct Put {
    /// Its key.
    pub name: String,
    /// Its content.
    pub config: serde_json::Map<String, Value>,
    /// A line above it.
    pub comment: Option<String>,
}

/// The document with entries replaced where their key exists, and appended where not.
///
/// # Errors
/// [`Kind::Malformed`] if the text is not a YAML mapping, [`Kind::Unsupported`] if it cannot be changed as text
/// without changing the meaning of something else.
pub fn put(text: &str, entries: &[Put]) -> Result<String> {
    let before = parse(text)?;
    // With their endings: those of the user's lines stay, new ones take after the first.
    let mut lines: Vec<String> = text.split_inclusive('\n').map(str::to_owned).collect();
    let ending = if lines.first().is_some_and(|line| line.ends_with("\r\n")) { "\r\n" } else { "\n" };
    let written = |text: String| text.lines().map(|line| format!("{line}{ending}")).collect::<Vec<_>>();
    let mut appended: Vec<&Put> = Vec::new();
    for put in entries {
        if !before.contains_key(put.name.as_str()) {
            appended.push(put);
            continue;
        }
        let blocks = blocks(&lines);
        let key_at = |line: usize| lines.get(line).and_then(|line| key_of(line));
        let found = blocks.iter().find(|block| key_at(block.start).as_deref() == Some(put.name.as_str()));
        let Some(found) = found.cloned() else {
            return Err(refused(&put.name));
        };
        // The comment above an entry is the user's; only the entry itself changes.
        let new = entry(&put.name, &put.config, None);
        lines.splice(found, written(new));
    }
    if let Some(last) = lines.last_mut().filter(|last| !last.ends_with('\n')) {
        last.push_str(ending);
    }
    let expected = before.len() + appended.len();
    for put in appended {
        if lines.last().is_some_and(|line| !line.trim().is_empty()) {
            lines.push(ending.to_owned());
        }
        lines.extend(written(entry(&put.name, &put.config, put.comment.as_deref())));
    }
    let result = lines.concat();
    // A piece of a replaced entry that stayed behind would be an entry of its own.
    let after = parse(&result).ok().filter(|after| after.len() == expected);
    let Some(after) = after else {
        return Err(refused(&entries.iter().map(|put| put.name.as_str()).collect::<Vec<_>>().join(", ")));
    };
    for (key, value) in &before {
        let ours = key.as_str().is_some_and(|key| entries.iter().any(|put| put.name == key));
        if !ours && after.get(key) != Some(value) {
            return Err(refused(key.as_str().unwrap_or("a key that is no string")));
        }
    }
    for put in entries {
        if !after.get(put.name.as_str()).is_some_and(|read| same(read, &put.config)) {
            return Err(refused(&put.name));
        }
    }
    Ok(result)
}

fn refused(name: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("its YAML is written in a way that cannot be changed safely ({name}): change it by hand"),
    )
}

/// The lines of each top-level entry, without the comments and blank lines that lead to the next one.
fn blocks(lines: &[String]) -> Vec<std::ops::Range<usize>> {
    let starts: Vec<usize> =
        lines.iter().enumerate().filter(|(_, line)| key_of(line).is_some()).map(|(number, _)| number).collect();
    let ends = starts.iter().skip(1).copied().chain([lines.len()]);
    starts
        .iter()
        .zip(ends)
        .map(|(&start, end)| {
            let mut last = end;
            while last > start + 1
                && lines.get(last - 1).is_some_and(|line| line.trim().is_empty() || line.starts_with('#'))
            {
                last -= 1;
            }
            start..last
        })
        .collect()
}

/// The key that a top-level line begins, if it begins one.
fn key_of(line: &str) -> Option<String> {
    if line.starts_with([' ', '\t', '#', '-', '%', '{', '}', '[', ']']) || line.trim().is_empty() {
        return None;
    }
    let end = match line.chars().next()? {
        quote @ ('"' | '\'') => {
            let mut escaped = false;
            let close = line.char_indices().skip(1).find(|&(_, c)| {
                let ends = c == quote && !escaped;
                escaped = c == '\\' && quote == '"' && !escaped;
                ends
            })?;
            close.0 + 1
        }
        _ => line.find(": ").or_else(|| line.trim_end().strip_suffix(':').map(str::len))?,
    };
    let (key, rest) = line.split_at_checked(end)?;
    rest.trim_start().starts_with(':').then_some(())?;
    match serde_yaml::from_str::<serde_yaml::Value>(key).ok()? {
        serde_yaml::Value::String(key) => Some(key),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(path: &str) -> serde_json::Map<String, Value> {
        let value =
            serde_json::json!({"type": "pandas.FeatherDataset", "filepath": path, "save_args": {"compression": null}});
        value.as_object().unwrap().clone()
    }

    fn one(name: &str, path: &str) -> Put {
        Put { name: name.into(), config: config(path), comment: Some("Why.".into()) }
    }

    #[test]
    fn an_entry_reads_well() {
        assert_eq!(
            entry("X", &config("/mnt/vineyard/X.arrow"), Some("Why.")),
            "# Why.\nX:\n  type: pandas.FeatherDataset\n  filepath: /mnt/vineyard/X.arrow\n  save_args:\n    compression: null\n"
        );
    }

    #[test]
    fn replacing_keeps_comments_order_and_style() {
        let text = "# Mine\n_anchor: &a\n  x: 1\n\n# about X\nX:\n  type: old # why\n  # inner\n  filepath: /old\n\n# about Z\n'Z':   {<<: *a, y: [1, 2]}\n";
        let result = put(text, &[one("X", "/new"), one("W w", "/w")]).unwrap();
        assert_eq!(
            result,
            "# Mine\n_anchor: &a\n  x: 1\n\n# about X\nX:\n  type: pandas.FeatherDataset\n  filepath: /new\n  save_args:\n    compression: null\n\n# about Z\n'Z':   {<<: *a, y: [1, 2]}\n\n# Why.\nW w:\n  type: pandas.FeatherDataset\n  filepath: /w\n  save_args:\n    compression: null\n"
        );
        assert_eq!(put(&result, &[one("X", "/new")]).unwrap(), result);
    }

    #[test]
    fn line_endings_stay() {
        let result = put("a:\r\n  x: 1\r\n", &[one("X", "/new")]).unwrap();
        assert!(result.lines().count() > 5 && !result.replace("\r\n", "").contains('\n'));
        let mixed = "a:\r\n  x: 1\n# one\r\nX: 1\nb: 2\n";
        let result = put(mixed, &[one("X", "/new")]).unwrap();
        assert!(result.starts_with("a:\r\n  x: 1\n# one\r\nX:\r\n  type: "), "{result:?}");
        assert!(result.ends_with("compression: null\r\nb: 2\n"), "{result:?}");
        assert!(put("a: 1", &[one("X", "/new")]).unwrap().starts_with("a: 1\n\n# Why.\nX:\n"));
    }

    #[test]
    fn what_cannot_be_changed_safely_is_refused() {
        for text in [
            "{X: {type: a}}\n",
            "X: &x\n  type: a\nY: *x\n",
            "Z: 1\n...\n",
            "Y: |\n  text\n{}\n",
            "X: {type: a,\nfilepath: /x}\n",
        ] {
            assert!(put(text, &[one("X", "/new")]).is_err(), "{text}");
        }
        assert_eq!(put("X: [\n", &[]).unwrap_err().kind(), Kind::Malformed);
        assert_eq!(put("- a\n", &[]).unwrap_err().kind(), Kind::Malformed);
    }

    #[test]
    fn an_empty_document_takes_entries() {
        for text in ["", "# only a comment\n", "\n\n"] {
            let result = put(text, &[one("X", "/new")]).unwrap();
            assert!(result.starts_with(text.trim_end()), "{result}");
            assert_eq!(parse(&result).unwrap().len(), 1);
        }
    }

    #[test]
    fn nested_lists_and_mappings() {
        let value = serde_json::json!({"a": [{"b": "1", "c": [true, {"d": []}]}, [1, 2], "no"], "e": {}});
        let read: Value = serde_yaml::from_str(&document(&value)).unwrap();
        assert_eq!(read, value, "{}", document(&value));
    }

    proptest! {
        #[test]
        fn any_string_comes_back(text in any::<String>()) {
            let read: serde_yaml::Value = serde_yaml::from_str(&string(&text)).unwrap();
            prop_assert_eq!(read.as_str(), Some(text.as_str()));
            let line = format!("{}: 1", string(&text));
            prop_assert_eq!(key_of(&line), Some(text));
        }
    }
}

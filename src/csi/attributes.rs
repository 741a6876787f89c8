//! What a pod or a PersistentVolume may ask for: `volumeAttributes`, checked against a list of what is allowed.
//!
//! In an inline volume these are written by whoever writes the pod, so nothing here names a path of the node.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::failure::{Failure, Outcome};

/// Keys that the kubelet (`podInfoOnMount`) and provisioners add; they say nothing about what to mount.
const FOREIGN: [&str; 2] = ["csi.storage.k8s.io/", "storage.kubernetes.io/"];
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
const KNOWN: &str = "vineyard, prefix, format, readOnly";
const PREFIX_MAX: usize = 1024;
const COMPONENT_MAX: usize = 255;

/// A vineyardd of the cluster: a namespace, and the name of the `Vineyardd` resource or of the chart's own one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Instance {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl std::str::FromStr for Instance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if is_label(namespace, 63) && is_label(name, 253) => {
                Ok(Instance { namespace: namespace.into(), name: name.into() })
            }
            _ => Err(format!("{text:?} is not NAMESPACE/NAME of a vineyardd, such as vineyard-system/vineyardd")),
        }
    }
}

/// Names of Kubernetes (RFC 1123): so neither `..` nor a slash can be part of one.
fn is_label(text: &str, longest: usize) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.len() <= longest && text.split('.').all(part)
}

/// Which view of a table listings show, if it was not saved as a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The usual one.
    #[default]
    Arrow,
    /// `.feather`.
    Feather,
    /// `.parquet`.
    Parquet,
}

impl Format {
    /// As attributes and options spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Arrow => "arrow",
            Format::Feather => "feather",
            Format::Parquet => "parquet",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Format::Arrow, Format::Feather, Format::Parquet].into_iter().find(|format| format.as_str() == text)
    }
}

/// The checked attributes of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Whose datasets.
    pub vineyard: Instance,
    /// Show only what is below this name, without it: parts with slashes between them.
    pub prefix: Option<String>,
    /// How tables are listed.
    pub format: Format,
    /// Refuse writing.
    pub read_only: bool,
    /// The volume lives and ends with its pod.
    pub ephemeral: bool,
}

/// Checks the attributes of a volume. `default` is the vineyardd of volumes that name none.
///
/// # Errors
/// `INVALID_ARGUMENT` that names the attribute.
pub fn parse(context: &HashMap<String, String>, default: Option<&Instance>) -> Outcome<Attributes> {
    // In order, so that the same mistake gives the same message.
    let context: BTreeMap<&str, &str> = context.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let unknown = context.keys().find(|key| {
        !["vineyard", "prefix", "format", "readOnly"].contains(*key) && !FOREIGN.iter().any(|f| key.starts_with(f))
    });
    if let Some(key) = unknown {
        return Err(Failure::invalid(format!("volume attribute {key:?} is not known; there are {KNOWN}")));
    }
    let vineyard = match (context.get("vineyard"), default) {
        (Some(text), _) => {
            text.parse().map_err(|what| Failure::invalid(format!("volume attribute vineyard: {what}")))?
        }
        (None, Some(default)) => default.clone(),
        (None, None) => {
            return Err(Failure::invalid(
                "volume attribute vineyard is missing: give NAMESPACE/NAME of a vineyardd, such as \
                 vineyard-system/vineyardd",
            ));
        }
    };
    let prefix = context.get("prefix").map(|text| prefix(text)).transpose()?.flatten();
    let format = match context.get("format") {
        None => Format::default(),
        Some(text) => Format::parse(text).ok_or_else(|| {
            Failure::invalid(format!("volume attribute format: {text:?} is none of arrow, feather, parquet"))
        })?,
    };
    let flag = |key: &str| match context.get(key).copied() {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(Failure::invalid(format!("volume attribute {key}: {other:?} is not true or false"))),
    };
    Ok(Attributes { vineyard, prefix, format, read_only: flag("readOnly")?, ephemeral: flag(EPHEMERAL)? })
}

/// A prefix becomes a path below a mount, so it must stay below it. An empty one is none.
fn prefix(text: &str) -> Outcome<Option<String>> {
    let refuse = |what: &str| {
        Err(Failure::invalid(format!(
            "volume attribute prefix: {text:?} {what}; it is a name such as run-7 or team/run-7"
        )))
    };
    if text.is_empty() {
        return Ok(None);
    }
    if text.len() > PREFIX_MAX {
        return refuse("is longer than 1024 bytes");
    }
    if text.chars().any(char::is_control) {
        return refuse("has control characters");
    }
    // What a workflow engine was to fill in and did not; as a name it would be shared by all runs.
    if text.contains("{{") {
        return refuse("still has a variable that was not filled in");
    }
    for part in text.split('/') {
        match part {
            "" => return refuse("has an empty part"),
            "." | ".." => return refuse("has a part that is . or .."),
            part if part.len() > COMPONENT_MAX => return refuse("has a part of more than 255 bytes"),
            _ => {}
        }
    }
    Ok(Some(text.to_owned()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tonic::Code;

    use super::*;

    fn context(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_is_allowed_is_read() {
        let attributes = parse(
            &context(&[
                ("vineyard", "vineyard-system/vineyardd-sample"),
                ("prefix", "team/run 7"),
                ("format", "parquet"),
                ("readOnly", "true"),
                ("csi.storage.k8s.io/ephemeral", "true"),
                ("csi.storage.k8s.io/pod.name", "p"),
                ("storage.kubernetes.io/csiProvisionerIdentity", "x"),
            ]),
            None,
        )
        .unwrap();
        assert_eq!(attributes.vineyard.to_string(), "vineyard-system/vineyardd-sample");
        assert_eq!(attributes.prefix.as_deref(), Some("team/run 7"));
        assert!(attributes.read_only && attributes.ephemeral);
        assert_eq!(attributes.format, Format::Parquet);
        let default = "a/b".parse().unwrap();
        let plain = parse(&context(&[("prefix", "")]), Some(&default)).unwrap();
        assert_eq!(
            plain,
            Attributes { vineyard: default, prefix: None, format: Format::Arrow, read_only: false, ephemeral: false }
        );
    }

    #[test]
    fn what_is_not_allowed_is_named() {
        let long = "x/".repeat(600) + "x";
        for (key, value, what) in [
            ("socket", "/run/docker.sock", "socket"),
            ("readonly", "true", "readonly"),
            ("vineyard", "../../etc", "NAMESPACE/NAME"),
            ("vineyard", "a", "NAMESPACE/NAME"),
            ("vineyard", "a/b/c", "NAMESPACE/NAME"),
            ("vineyard", "a/..", "NAMESPACE/NAME"),
            ("vineyard", "A/b", "NAMESPACE/NAME"),
            ("prefix", "../x", ".."),
            ("prefix", "a/./b", ". or .."),
            ("prefix", "/a", "empty part"),
            ("prefix", "a//b", "empty part"),
            ("prefix", "a/", "empty part"),
            ("prefix", "a\0b", "control"),
            ("prefix", "{{workflow.name}}", "not filled in"),
            ("prefix", long.as_str(), "1024"),
            ("format", "csv", "parquet"),
            ("readOnly", "yes", "true or false"),
        ] {
            let mut pairs = vec![(key, value)];
            if key != "vineyard" {
                pairs.push(("vineyard", "a/b"));
            }
            let failure = parse(&context(&pairs), None).unwrap_err();
            assert_eq!(failure.code, Code::InvalidArgument, "{key}={value}");
            assert!(failure.message.contains(what), "{key}={value}: {}", failure.message);
        }
        assert!(parse(&context(&[]), None).unwrap_err().message.contains("missing"));
    }
}

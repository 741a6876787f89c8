//! `argo generate`: an Argo workflow whose pods share a pipeline's data through the mount.
//!
//! One DAG task a node (or group of nodes), each a pod that runs `kedro run` for its nodes with the vineyard volume at
//! the mount's path. Every run has a namespace of its own below the volume, removed by the exit handler.

mod tasks;

pub use tasks::{Per, Task, dns_label, tasks};

use super::introspect::{Facts, Pipeline};
use super::list::{below, local_path};
use crate::error::{Error, Kind, Result};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tasks::LABEL_LENGTH;

/// How the pods reach vineyard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Volume {
    /// The inline volume of this project's CSI driver.
    Csi,
    /// The folder where the node's mount is, for clusters without the driver.
    HostPath,
    /// An existing claim.
    Claim(String),
}

impl std::str::FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Volume, String> {
        match text.split_once(':') {
            None if text == "csi" => Ok(Volume::Csi),
            None if text == "hostpath" => Ok(Volume::HostPath),
            Some(("pvc", name)) if is_dns_name(name, 253) => Ok(Volume::Claim(name.to_owned())),
            Some(("pvc", name)) => Err(format!("{name:?} cannot be the name of a claim")),
            _ => Err("one of csi, hostpath, pvc:NAME".into()),
        }
    }
}

/// What `argo generate` is asked to do.
#[derive(Debug, Clone)]
pub struct Generate {
    /// Container image with the project.
    pub image: String,
    /// Pipeline.
    pub pipeline: String,
    /// Kedro environment with the shared catalog.
    pub env: String,
    /// Where the catalog expects the mount.
    pub mount: String,
    /// How pods reach it.
    pub volume: Volume,
    /// The vineyard instance, `NAMESPACE/NAME`; the CSI driver has one of its own for those that name none.
    pub vineyard: Option<String>,
    /// What makes a pod.
    pub per: Per,
    /// Kubernetes quantity, request and limit.
    pub memory: Option<String>,
    /// Kubernetes quantity, request.
    pub cpu: Option<String>,
    /// Namespace of the workflow.
    pub namespace: Option<String>,
    /// Service account of its pods.
    pub service_account: Option<String>,
    /// Retries of a pod.
    pub retries: u32,
    /// Seconds that a run may take.
    pub deadline: Option<u32>,
    /// Seconds that a finished workflow is kept.
    pub ttl: Option<u32>,
    /// Default of the workflow's `params` parameter, for `kedro run --params`.
    pub params: String,
    /// Leave the run's datasets where they are.
    pub keep: bool,
}

/// A label of RFC 1123, which a namespace is.
fn is_label(name: &str) -> bool {
    !name.contains('.') && is_dns_name(name, LABEL_LENGTH)
}

fn is_dns_name(name: &str, length: usize) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    name.len() <= length && name.split('.').all(part)
}

/// A label's value: letters, digits, `-`, `_` and `.`, at both ends a letter or digit.
fn label_value(text: &str) -> String {
    let safe: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    let safe: String = safe.trim_matches(|c: char| !c.is_ascii_alphanumeric()).chars().take(LABEL_LENGTH).collect();
    safe.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// A Kubernetes quantity such as `500m`, `2`, `1.5Gi`.
fn is_quantity(text: &str) -> bool {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = text.get(digits.len()..).unwrap_or_default();
    digits.parse::<f64>().is_ok_and(|value| value > 0.0 && value.is_finite())
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
        && ["", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].contains(&suffix)
}

impl Generate {
    /// Checks what can be checked without the project.
    ///
    /// # Errors
    /// [`Kind::Invalid`], one line.
    pub fn validate(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::new(Kind::Invalid, message));
        if self.image.is_empty() || self.image.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return refuse(format!("--image {:?} is not an image reference", self.image));
        }
        for (flag, value) in [("--memory", &self.memory), ("--cpu", &self.cpu)] {
            if let Some(value) = value.as_ref().filter(|value| !is_quantity(value)) {
                return refuse(format!("{flag} {value:?} is not a Kubernetes quantity, such as 500m or 2Gi"));
            }
        }
        if let Some(namespace) = self.namespace.as_ref().filter(|namespace| !is_label(namespace)) {
            return refuse(format!("--namespace {namespace:?} cannot be a namespace in Kubernetes"));
        }
        if let Some(account) = self.service_account.as_ref().filter(|account| !is_dns_name(account, 253)) {
            return refuse(format!("--service-account {account:?} cannot be a name in Kubernetes"));
        }
        if let Some(vineyard) = &self.vineyard {
            let instance = vineyard.split_once('/');
            if !instance.is_some_and(|(namespace, name)| is_label(namespace) && is_dns_name(name, 253)) {
                return refuse(format!("--vineyard {vineyard:?} must be NAMESPACE/NAME of a vineyard instance"));
            }
        } else if self.volume == Volume::HostPath {
            return refuse("--volume hostpath needs --vineyard NAMESPACE/NAME, which is the place on the nodes".into());
        }
        let words = [
            ("--image", &self.image),
            ("--pipeline", &self.pipeline),
            ("--env", &self.env),
            ("--mount", &self.mount),
            ("--params", &self.params),
        ];
        match words.iter().find(|(_, word)| word.contains("{{")) {
            Some((flag, word)) => refuse(format!("{flag} {word:?} has {{{{, which Argo would replace")),
            None => Ok(()),
        }
    }
}

fn stem(name: &str) -> &str {
    super::entries::stripped(name)
}

/// Datasets that one task makes and another reads must be somewhere that both see. Returns warnings.
///
/// # Errors
/// [`Kind::Invalid`] if one of them lives in memory.
pub fn check_shared(
    facts: &Facts,
    pipeline: &Pipeline,
    tasks: &[Task],
    root: &Path,
    ask: &Generate,
) -> Result<Vec<String>> {
    let task_of: BTreeMap<&str, &str> =
        tasks.iter().flat_map(|task| task.nodes.iter().map(|node| (node.as_str(), task.name.as_str()))).collect();
    let maker: BTreeMap<&str, &str> = pipeline
        .nodes
        .iter()
        .flat_map(|node| node.outputs.iter().map(|output| (stem(output), node.name.as_str())))
        .collect();
    let (mut in_memory, mut private) = (BTreeSet::new(), BTreeSet::new());
    for node in &pipeline.nodes {
        for input in &node.inputs {
            let Some(maker) = maker.get(stem(input)) else { continue };
            if task_of.get(*maker) == task_of.get(node.name.as_str()) {
                continue;
            }
            // The producer writes under its own transcoding.
            let written = pipeline
                .nodes
                .iter()
                .filter(|node| node.name == *maker)
                .flat_map(|node| &node.outputs)
                .find(|output| stem(output) == stem(input))
                .unwrap_or(input);
            for name in [input, written] {
                match facts.merged.get(name) {
                    None => {
                        in_memory.insert(name.clone());
                    }
                    Some(entry) if entry.in_memory() => {
                        in_memory.insert(name.clone());
                    }
                    Some(entry) => {
                        let local = entry.filepath.as_deref().and_then(|path| local_path(path, root));
                        if local.is_some_and(|path| !below(&path, &ask.mount)) {
                            private.insert(name.clone());
                        }
                    }
                }
            }
        }
    }
    if !in_memory.is_empty() {
        let chunks = in_memory.iter().any(|name| pipeline.datasets.get(name).is_some_and(|dataset| dataset.generator));
        let names: Vec<String> = in_memory.into_iter().collect();
        let verb = if names.len() == 1 { "lives" } else { "live" };
        let advice = if chunks {
            "what a node yields in chunks cannot be stored, so keep the nodes in one pod with --per tag or --per namespace"
                .to_owned()
        } else {
            format!(
                "run `vineyard-fs kedro catalog create -p {} --env {}` first, or keep the nodes in one pod with \
                 --per namespace or --per tag",
                ask.pipeline, ask.env
            )
        };
        return Err(Error::new(
            Kind::Invalid,
            format!("{} would be passed from pod to pod but {verb} in memory: {advice}", names.join(", ")),
        ));
    }
    Ok(private
        .into_iter()
        .map(|name| format!("{name} is a file outside {}: pods see it only if another volume is there", ask.mount))
        .collect())
}

/// The workflow as YAML.
pub fn workflow(slug: &str, tasks: &[Task], ask: &Generate, facts: &Facts) -> String {
    let slug: String = slug.chars().take(40).collect();
    let slug = slug.trim_end_matches('-');
    let mut labels = json!({
        "app.kubernetes.io/name": slug,
        "app.kubernetes.io/component": "kedro",
        "app.kubernetes.io/managed-by": "vineyard-fs",
    });
    let pipeline_label = label_value(&ask.pipeline);
    if let (Some(labels), false) = (labels.as_object_mut(), pipeline_label.is_empty()) {
        labels.insert("fs.vineyard.v6d.io/kedro-pipeline".into(), pipeline_label.into());
    }
    let mut metadata = Map::new();
    metadata.insert("generateName".into(), format!("{slug}-").into());
    if let Some(namespace) = &ask.namespace {
        metadata.insert("namespace".into(), namespace.as_str().into());
    }
    metadata.insert("labels".into(), labels.clone());
    let mut spec = Map::new();
    let mut set = |key: &str, value: Value| spec.insert(key.to_owned(), value);
    set("entrypoint", "pipeline".into());
    if !ask.keep {
        set("onExit", "clean".into());
    }
    set(
        "arguments",
        json!({"parameters": [
            {"name": "image", "value": ask.image},
            {"name": "env", "value": ask.env},
            {"name": "params", "value": ask.params},
        ]}),
    );
    set("podMetadata", json!({"labels": labels}));
    if let Some(account) = &ask.service_account {
        set("serviceAccountName", account.as_str().into());
    }
    if let Some(deadline) = ask.deadline {
        set("activeDeadlineSeconds", deadline.into());
    }
    if let Some(ttl) = ask.ttl {
        set("ttlStrategy", json!({"secondsAfterCompletion": ttl}));
    }
    set(
        "securityContext",
        json!({
            "runAsNonRoot": true, "runAsUser": super::docker::USER, "runAsGroup": super::docker::USER,
            "fsGroup": super::docker::USER, "seccompProfile": {"type": "RuntimeDefault"},
        }),
    );
    set("volumes", json!([volume(ask)]));
    let mut templates = vec![dag(tasks)];
    if tasks.iter().any(|task| task.dependencies.is_empty()) {
        templates.push(node_template("node", false, ask, facts));
    }
    if tasks.iter().any(|task| !task.dependencies.is_empty()) {
        templates.push(node_template("node-near", true, ask, facts));
    }
    if !ask.keep {
        let command = match ask.volume {
            Volume::Csi => json!(["find", ask.mount, "-mindepth", "1", "-delete"]),
            // Seen from above the run's folder, so that the folder goes too.
            _ => json!(["find", format!("{}/{{{{workflow.name}}}}", ask.mount), "-delete"]),
        };
        let mut container = json!({"image": "{{workflow.parameters.image}}", "command": command});
        add_container_rest(&mut container, ask, false);
        templates.push(json!({"name": "clean", "container": container}));
    }
    set("templates", templates.into());
    let document = json!({
        "apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": metadata, "spec": spec,
    });
    let memory_note = "# A pod's memory limit also counts what it writes to the mount until the file is closed.\n";
    format!(
        "# The Kedro pipeline {} as an Argo workflow: `argo submit FILE`. Made by `vineyard-fs kedro argo generate`.\n\
         {}# {}\n{}",
        super::yaml::string(&ask.pipeline),
        memory_note,
        if ask.keep {
            "The datasets of a run stay in vineyard when it is done."
        } else {
            "The step `clean` empties what the run has in vineyard, whether it succeeded or not."
        },
        super::yaml::document(&document)
    )
}

fn volume(ask: &Generate) -> Value {
    match &ask.volume {
        // The driver makes the prefix the root of the mount, so a run sees its own datasets only.
        Volume::Csi => {
            let mut attributes = Map::new();
            if let Some(vineyard) = &ask.vineyard {
                attributes.insert("vineyard".into(), vineyard.as_str().into());
            }
            attributes.insert("prefix".into(), "{{workflow.name}}".into());
            json!({"name": "vineyard", "csi": {"driver": "fs.vineyard.v6d.io", "volumeAttributes": attributes}})
        }
        Volume::HostPath => json!({"name": "vineyard", "hostPath": {
            "path": format!("/var/run/vineyard-fs/{}", ask.vineyard.as_deref().unwrap_or_default()),
            "type": "Directory",
        }}),
        Volume::Claim(name) => json!({"name": "vineyard", "persistentVolumeClaim": {"claimName": name}}),
    }
}

fn dag(tasks: &[Task]) -> Value {
    let tasks: Vec<Value> = tasks
        .iter()
        .map(|task| {
            let nodes = task.nodes.join(",");
            let mut parameters = vec![json!({"name": "nodes", "value": nodes})];
            let template = match task.dependencies.last() {
                Some(parent) => {
                    parameters.push(json!({"name": "near", "value": format!("{{{{tasks.{parent}.hostNodeName}}}}")}));
                    "node-near"
                }
                None => "node",
            };
            let mut described = json!({
                "name": task.name, "template": template, "arguments": {"parameters": parameters},
            });
            if let (Some(described), false) = (described.as_object_mut(), task.dependencies.is_empty()) {
                described.insert("dependencies".into(), json!(task.dependencies));
            }
            described
        })
        .collect();
    json!({"name": "pipeline", "dag": {"tasks": tasks}})
}

fn node_template(name: &str, near: bool, ask: &Generate, facts: &Facts) -> Value {
    // `--nodes` since Kedro 0.19; before, `--node`.
    let flag = if facts.versions.kedro_at_least((0, 19)) { "--nodes" } else { "--node" };
    let mut inputs = vec![json!({"name": "nodes"})];
    if near {
        inputs.push(json!({"name": "near"}));
    }
    let mut container = json!({
        "image": "{{workflow.parameters.image}}",
        "command": ["kedro"],
        "args": [
            "run", "--pipeline", ask.pipeline, "--env", "{{workflow.parameters.env}}",
            "--params", "{{workflow.parameters.params}}", flag, "{{inputs.parameters.nodes}}",
        ],
    });
    add_container_rest(&mut container, ask, true);
    let mut template = json!({
        "name": name,
        "inputs": {"parameters": inputs},
        "metadata": {"annotations": {"fs.vineyard.v6d.io/kedro-nodes": "{{inputs.parameters.nodes}}"}},
        "retryStrategy": {"limit": ask.retries.to_string(), "retryPolicy": "Always"},
    });
    if let Some(template) = template.as_object_mut() {
        if near {
            // A wish, not a demand: where the node is full the data comes to the pod instead.
            template.insert(
                "affinity".into(),
                json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
                    "weight": 100,
                    "preference": {"matchFields": [
                        {"key": "metadata.name", "operator": "In", "values": ["{{inputs.parameters.near}}"]},
                    ]},
                }]}}),
            );
        }
        template.insert("container".into(), container);
    }
    template
}

/// What every container has; one of a node also has its resources and sees the run's own datasets only.
fn add_container_rest(container: &mut Value, ask: &Generate, node: bool) {
    let Some(container) = container.as_object_mut() else { return };
    if node && (ask.memory.is_some() || ask.cpu.is_some()) {
        let (mut requests, mut limits) = (Map::new(), Map::new());
        if let Some(cpu) = &ask.cpu {
            requests.insert("cpu".into(), cpu.as_str().into());
        }
        if let Some(memory) = &ask.memory {
            requests.insert("memory".into(), memory.as_str().into());
            limits.insert("memory".into(), memory.as_str().into());
        }
        let mut wanted = json!({"requests": requests});
        if let (Some(wanted), false) = (wanted.as_object_mut(), limits.is_empty()) {
            wanted.insert("limits".into(), limits.into());
        }
        container.insert("resources".into(), wanted);
    }
    container.insert(
        "securityContext".into(),
        json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}),
    );
    let mut mounted = json!({"name": "vineyard", "mountPath": ask.mount, "mountPropagation": "HostToContainer"});
    // Only the CSI driver knows prefixes; elsewhere a folder of its own keeps a run apart.
    if let (Some(mounted), false) = (mounted.as_object_mut(), ask.volume == Volume::Csi || !node) {
        mounted.insert("subPath".into(), "{{workflow.name}}".into());
    }
    container.insert("volumeMounts".into(), json!([mounted]));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        assert!(["500m", "2", "1.5Gi", "100Mi", "4G"].iter().all(|text| is_quantity(text)));
        assert!(!["", "Gi", "2 Gi", "2gb", "-1", "1e3", "inf", "0"].iter().any(|text| is_quantity(text)));
    }

    fn generate() -> Generate {
        Generate {
            image: "shop:1".into(),
            pipeline: "__default__".into(),
            env: "vineyard".into(),
            mount: "/mnt/vineyard".into(),
            volume: Volume::Csi,
            vineyard: None,
            per: Per::Node,
            memory: None,
            cpu: None,
            namespace: None,
            service_account: None,
            retries: 1,
            deadline: None,
            ttl: None,
            params: String::new(),
            keep: false,
        }
    }

    #[test]
    fn the_driver_chooses_the_instance_that_is_not_named() {
        let mut ask = generate();
        ask.validate().unwrap();
        assert_eq!(volume(&ask)["csi"]["volumeAttributes"], json!({"prefix": "{{workflow.name}}"}));
        ask.volume = Volume::HostPath;
        assert!(ask.validate().unwrap_err().to_string().contains("--vineyard"));
        ask.vineyard = Some("data/store".into());
        ask.validate().unwrap();
        assert_eq!(volume(&ask)["hostPath"]["path"], "/var/run/vineyard-fs/data/store");
        ask.volume = Volume::Csi;
        assert_eq!(volume(&ask)["csi"]["volumeAttributes"]["vineyard"], "data/store");
    }

    #[test]
    fn what_kubernetes_or_argo_would_misread_is_refused() {
        let refused = |change: fn(&mut Generate)| {
            let mut ask = generate();
            change(&mut ask);
            ask.validate().is_err()
        };
        assert!(refused(|ask| ask.namespace = Some("a.b".into())));
        assert!(refused(|ask| ask.namespace = Some("Bad_NS".into())));
        assert!(refused(|ask| ask.vineyard = Some("a.b/c".into())));
        assert!(refused(|ask| ask.image = "{{x}}".into()));
        assert!(refused(|ask| ask.params = "a={{x}}".into()));
        assert!(!refused(|ask| ask.namespace = Some("team-1".into())));
    }

    #[test]
    fn volumes_parse() {
        assert_eq!("pvc:data-1".parse::<Volume>().unwrap(), Volume::Claim("data-1".into()));
        assert!("pvc:Data_1".parse::<Volume>().is_err() && "nfs".parse::<Volume>().is_err());
    }

    #[test]
    fn labels_have_letters_at_their_ends() {
        assert_eq!(label_value("__default__"), "default");
    }
}

//! `argo generate`: an Argo workflow whose pods share a pipeline's data through the mount.
//!
//! One DAG task a node (or group of nodes), each a pod that runs `kedro run` for its nodes with the vineyard volume at
//! the mount's path. Every run has a namespace of its own below the volume, removed by the exit handler.

use super::introspect::{Facts, Node, Pipeline};
use super::list::{below, local_path};
use crate::error::{Error, Kind, Result};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Longest name of a task and longest value of a label in Kubernetes.
const LABEL_LENGTH: usize = 63;

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

/// What makes a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Per {
    /// Each node
    #[default]
    Node,
    /// Nodes of the same outermost namespace together
    Namespace,
    /// Nodes with the same tags together
    Tag,
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
    /// The vineyard instance, `NAMESPACE/NAME`.
    pub vineyard: String,
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

/// A pod: nodes that run together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Unique, valid in Kubernetes and Argo.
    pub name: String,
    /// Kedro's names, in the order of execution.
    pub nodes: Vec<String>,
    /// Names of the tasks that must be done before, in the order of execution; the last one made the most inputs.
    pub dependencies: Vec<String>,
}

/// A name as a DNS label (RFC 1123): lower-case letters, digits and dashes, 1 to 63 of them.
pub fn dns_label(name: &str) -> String {
    let mut label = String::new();
    for c in name.chars() {
        if c.is_ascii_alphanumeric() {
            label.push(c.to_ascii_lowercase());
        } else if !label.ends_with('-') {
            label.push('-');
        }
    }
    let label: String = label.trim_matches('-').chars().take(LABEL_LENGTH).collect();
    let label = label.trim_end_matches('-');
    if label.is_empty() { "node".into() } else { label.into() }
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
        for (flag, value) in [("--namespace", &self.namespace), ("--service-account", &self.service_account)] {
            if let Some(value) = value.as_ref().filter(|value| !is_dns_name(value, 253)) {
                return refuse(format!("{flag} {value:?} cannot be a name in Kubernetes"));
            }
        }
        let instance = self.vineyard.split_once('/');
        if !instance.is_some_and(|(namespace, name)| is_dns_name(namespace, 63) && is_dns_name(name, 253)) {
            return refuse(format!("--vineyard {:?} must be NAMESPACE/NAME of a vineyard instance", self.vineyard));
        }
        Ok(())
    }
}

/// The pods of a pipeline.
///
/// # Errors
/// [`Kind::Invalid`] if a node cannot be named on Kedro's command line, or if groups depend on each other in a circle.
pub fn tasks(pipeline: &Pipeline, per: Per) -> Result<Vec<Task>> {
    if pipeline.nodes.is_empty() {
        return Err(Error::new(Kind::Invalid, "the pipeline has no nodes"));
    }
    if let Some(node) = pipeline.nodes.iter().find(|node| node.name.contains(',')) {
        let hint = if node.named { "a comma in its name" } else { "no name" };
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "the node {:?} has {hint}, and `kedro run` splits node names at commas: give it a name, as in \
                 node(..., name=\"split\")",
                node.name
            ),
        ));
    }
    if let Some(node) = pipeline.nodes.iter().find(|node| node.name.contains("{{")) {
        return Err(Error::new(
            Kind::Invalid,
            format!("the node {:?} has {{{{ in its name, which Argo would replace: rename it", node.name),
        ));
    }
    let key = |node: &Node| match per {
        Per::Node => None,
        Per::Namespace => node.namespace.as_deref().and_then(|name| name.split('.').next()).map(str::to_owned),
        Per::Tag => (!node.tags.is_empty()).then(|| node.tags.join("-")),
    };
    let mut groups: Vec<(Option<String>, Vec<&Node>)> = Vec::new();
    for node in &pipeline.nodes {
        let key = key(node);
        match groups.iter_mut().find(|(other, _)| other.is_some() && *other == key) {
            Some((_, nodes)) => nodes.push(node),
            None => groups.push((key, vec![node])),
        }
    }
    let mut names: Vec<String> = Vec::new();
    for (key, nodes) in &groups {
        let wanted = dns_label(key.as_deref().or(nodes.first().map(|node| node.name.as_str())).unwrap_or_default());
        names.push(unique(&wanted, &names));
    }
    let group_of: BTreeMap<&str, usize> = groups
        .iter()
        .enumerate()
        .flat_map(|(number, (_, nodes))| nodes.iter().map(move |node| (node.name.as_str(), number)))
        .collect();
    let mut above: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); groups.len()];
    for (number, (_, nodes)) in groups.iter().enumerate() {
        let parents = nodes.iter().flat_map(|node| &node.parents).filter_map(|parent| group_of.get(parent.as_str()));
        if let Some(set) = above.get_mut(number) {
            set.extend(parents.filter(|parent| **parent != number));
        }
    }
    let order = ordered(&above).map_err(|circle| {
        let circle: Vec<&str> = circle.into_iter().filter_map(|number| names.get(number)).map(String::as_str).collect();
        Error::new(Kind::Invalid, format!("the groups {} need each other's outputs: use --per node", circle.join(", ")))
    })?;
    let rank: BTreeMap<usize, usize> = order.iter().enumerate().map(|(rank, number)| (*number, rank)).collect();
    let weight = |from: usize, to: &[&Node]| {
        let made: BTreeSet<&str> = groups
            .get(from)
            .map(|(_, nodes)| nodes.iter().flat_map(|node| &node.outputs).map(|name| stem(name)).collect())
            .unwrap_or_default();
        let read: BTreeSet<&str> = to.iter().flat_map(|node| &node.inputs).map(|name| stem(name)).collect();
        made.intersection(&read).count()
    };
    let mut tasks = Vec::new();
    for number in order {
        let (Some((_, nodes)), Some(name), Some(parents)) = (groups.get(number), names.get(number), above.get(number))
        else {
            continue;
        };
        let mut parents: Vec<usize> = parents.iter().copied().collect();
        parents.sort_by_key(|parent| (weight(*parent, nodes), rank.get(parent)));
        tasks.push(Task {
            name: name.clone(),
            nodes: nodes.iter().map(|node| node.name.clone()).collect(),
            dependencies: parents.into_iter().filter_map(|parent| names.get(parent).cloned()).collect(),
        });
    }
    Ok(tasks)
}

fn stem(name: &str) -> &str {
    super::entries::stripped(name)
}

/// `wanted`, or with the first free number behind it.
fn unique(wanted: &str, taken: &[String]) -> String {
    let mut name = wanted.to_owned();
    let mut number = 2;
    while taken.contains(&name) {
        let suffix = format!("-{number}");
        let room = LABEL_LENGTH.saturating_sub(suffix.len());
        name = format!("{}{suffix}", wanted.get(..wanted.len().min(room)).unwrap_or(wanted).trim_end_matches('-'));
        number += 1;
    }
    name
}

/// A topological order that keeps the given order where it may; else those that are in or behind a circle.
fn ordered(above: &[BTreeSet<usize>]) -> std::result::Result<Vec<usize>, Vec<usize>> {
    let mut order: Vec<usize> = Vec::new();
    let mut left: Vec<usize> = (0..above.len()).collect();
    while !left.is_empty() {
        let ready = left.iter().position(|number| {
            above.get(*number).is_none_or(|parents| parents.iter().all(|parent| order.contains(parent)))
        });
        match ready {
            Some(position) => order.push(left.remove(position)),
            None => return Err(left),
        }
    }
    Ok(order)
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
        Volume::Csi => json!({"name": "vineyard", "csi": {
            "driver": "fs.vineyard.v6d.io",
            "volumeAttributes": {"vineyard": ask.vineyard, "prefix": "{{workflow.name}}"},
        }}),
        Volume::HostPath => json!({"name": "vineyard", "hostPath": {
            "path": format!("/var/run/vineyard-fs/{}", ask.vineyard), "type": "Directory",
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

    fn node(name: &str, namespace: Option<&str>, inputs: &[&str], outputs: &[&str], parents: &[&str]) -> Node {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        Node {
            name: name.into(),
            named: !name.contains('['),
            tags: Vec::new(),
            namespace: namespace.map(str::to_owned),
            inputs: owned(inputs),
            outputs: owned(outputs),
            parents: owned(parents),
            generator: false,
        }
    }

    fn pipeline(nodes: Vec<Node>) -> Pipeline {
        Pipeline { nodes, datasets: indexmap::IndexMap::new() }
    }

    #[test]
    fn names_become_labels() {
        assert_eq!(dns_label("Make_Predictions.v2"), "make-predictions-v2");
        assert_eq!(dns_label("__default__"), "default");
        assert_eq!(dns_label("数据"), "node");
        let long = dns_label(&"ab_".repeat(40));
        assert!(long.len() <= 63 && !long.ends_with('-'));
        assert_eq!(label_value("__default__"), "default");
    }

    #[test]
    fn names_stay_apart() {
        let nodes = ["a_b", "a.b", "A b", "a-b-2"].map(|name| node(name, None, &[], &[], &[])).to_vec();
        let names: Vec<String> = tasks(&pipeline(nodes), Per::Node).unwrap().into_iter().map(|t| t.name).collect();
        assert_eq!(names, ["a-b", "a-b-2", "a-b-3", "a-b-2-2"]);
        let taken = vec!["x".repeat(63)];
        assert_eq!(unique(&"x".repeat(63), &taken).len(), 63);
    }

    #[test]
    fn the_last_dependency_made_the_most_inputs() {
        let nodes = vec![
            node("split", None, &[], &["a", "b"], &[]),
            node("other", None, &[], &["c"], &[]),
            node("join", None, &["a", "b", "c"], &[], &["split", "other"]),
        ];
        let tasks = tasks(&pipeline(nodes), Per::Node).unwrap();
        assert_eq!(tasks[2].dependencies, ["other", "split"]);
    }

    #[test]
    fn namespaces_group_nodes_and_circles_are_refused() {
        let chain = |middle: Option<&str>| {
            pipeline(vec![
                node("ns.one", Some("ns.x"), &[], &["a"], &[]),
                node("two", middle, &["a"], &["b"], &["ns.one"]),
                node("ns.three", Some("ns"), &["b"], &[], &["two"]),
            ])
        };
        let grouped = tasks(&chain(Some("ns")), Per::Namespace).unwrap();
        assert_eq!(grouped[0].nodes, ["ns.one", "two", "ns.three"]);
        assert_eq!(grouped[0].dependencies, Vec::<String>::new());
        let error = tasks(&chain(None), Per::Namespace).unwrap_err();
        assert!(error.to_string().contains("--per node"), "{error}");
    }

    #[test]
    fn a_node_that_kedro_cannot_find_is_refused() {
        let nodes = vec![node("f([a,b]) -> [c]", None, &[], &[], &[])];
        assert!(tasks(&pipeline(nodes), Per::Node).unwrap_err().to_string().contains("name"));
    }

    #[test]
    fn quantities() {
        assert!(["500m", "2", "1.5Gi", "100Mi", "4G"].iter().all(|text| is_quantity(text)));
        assert!(!["", "Gi", "2 Gi", "2gb", "-1", "1e3", "inf", "0"].iter().any(|text| is_quantity(text)));
    }

    #[test]
    fn volumes_parse() {
        assert_eq!("pvc:data-1".parse::<Volume>().unwrap(), Volume::Claim("data-1".into()));
        assert!("pvc:Data_1".parse::<Volume>().is_err() && "nfs".parse::<Volume>().is_err());
    }
}

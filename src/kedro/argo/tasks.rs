//! The pods of a workflow: which nodes run together, what they are called, what they wait for.

use crate::error::{Error, Kind, Result};
use crate::kedro::entries::stripped;
use crate::kedro::introspect::{Node, Pipeline};
use std::collections::{BTreeMap, BTreeSet};

/// Longest name of a task and longest value of a label in Kubernetes.
pub(super) const LABEL_LENGTH: usize = 63;

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
        // A name joins them with dashes in the end; a tag may have one itself.
        Per::Tag => (!node.tags.is_empty()).then(|| node.tags.join("\n")),
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
            .map(|(_, nodes)| nodes.iter().flat_map(|node| &node.outputs).map(|name| stripped(name)).collect())
            .unwrap_or_default();
        let read: BTreeSet<&str> = to.iter().flat_map(|node| &node.inputs).map(|name| stripped(name)).collect();
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
    fn one_tag_with_a_dash_is_not_two_tags() {
        let mut nodes = vec![node("one", None, &[], &["a"], &[]), node("two", None, &["a"], &[], &["one"])];
        nodes[0].tags = vec!["a-b".into()];
        nodes[1].tags = vec!["a".into(), "b".into()];
        let tasks = tasks(&pipeline(nodes), Per::Tag).unwrap();
        assert_eq!(tasks.iter().map(|task| task.name.as_str()).collect::<Vec<_>>(), ["a-b", "a-b-2"]);
        assert_eq!(tasks[0].nodes, ["one"]);
    }

    #[test]
    fn a_node_that_kedro_cannot_find_is_refused() {
        let nodes = vec![node("f([a,b]) -> [c]", None, &[], &[], &[])];
        assert!(tasks(&pipeline(nodes), Per::Node).unwrap_err().to_string().contains("name"));
    }
}

//! Questions to the name map.
//!
//! vineyardd compares a pattern with one name after the other, in byte order, until it has as many as were asked for
//! (`meta_tree::ListName`): a request takes as long as there are names. So questions about names that begin alike, as
//! those about one path do, are one request.

use super::{Client, Repeat};
use crate::error::Result;
use crate::vineyard::ObjectId;
use crate::vineyard::request::{ListNameReply, Request, name_pattern};
use crate::vineyard::store::{NameQuery, NamedObject};

/// Names that begin alike, at most, that are asked for in place of those that are wanted.
const TOGETHER: u64 = 16;

impl Client {
    pub(super) fn ask_names(&self, queries: &[NameQuery]) -> Result<Vec<Vec<NamedObject>>> {
        if let Some(stem) = common_stem(queries) {
            let all = NameQuery::Prefix { prefix: stem.to_owned(), limit: Some(TOGETHER) };
            let found = self.ask_each(&[all])?.pop().unwrap_or_default();
            if let Some(answers) = queries.iter().map(|query| answer(query, &found)).collect() {
                return Ok(answers);
            }
        }
        self.ask_each(queries)
    }

    fn ask_each(&self, queries: &[NameQuery]) -> Result<Vec<Vec<NamedObject>>> {
        // The server's match ends at a NUL, so a limit would count names that are sorted out here.
        let limit = |text: &str, limit: Option<u64>| limit.filter(|_| !text.contains('\0')).unwrap_or(u64::MAX);
        let request = |query: &NameQuery| {
            let (pattern, limit) = match query {
                NameQuery::Exact(name) => (name_pattern(name, true), limit(name, Some(1))),
                NameQuery::Prefix { prefix, limit: most } => (name_pattern(prefix, false), limit(prefix, *most)),
            };
            Request::ListName { pattern, regex: false, limit }
        };
        let requests: Vec<Request> = queries.iter().map(request).collect();
        let answers = self.run(Repeat::Safe, |connection| {
            connection.calls(&requests, "list_name_reply", |_, reply: ListNameReply| Ok(reply.names.0))
        })?;
        let mut selected = Vec::with_capacity(queries.len());
        for (query, answer) in queries.iter().zip(answers) {
            let mut names: Vec<NamedObject> = answer?.into_iter().map(|(name, id)| (name, ObjectId(id))).collect();
            match query {
                NameQuery::Exact(name) => names.retain(|(found, _)| found == name),
                NameQuery::Prefix { prefix, limit } => {
                    names.retain(|(found, _)| found.starts_with(prefix.as_str()));
                    if !names.is_sorted_by(|a, b| a.0 <= b.0) {
                        names.sort_unstable();
                    }
                    names.truncate(most(*limit));
                }
            }
            selected.push(names);
        }
        Ok(selected)
    }
}

fn most(limit: Option<u64>) -> usize {
    limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

/// What several questions have in common that can be answered as one.
fn common_stem(queries: &[NameQuery]) -> Option<&str> {
    fn text_of(query: &NameQuery) -> Option<&str> {
        match query {
            NameQuery::Exact(name) => Some(name),
            NameQuery::Prefix { prefix, limit: Some(_) } => Some(prefix),
            NameQuery::Prefix { limit: None, .. } => None,
        }
    }
    let (first, others) = queries.split_first()?;
    let first = text_of(first)?;
    let mut shared = first.len();
    for other in others {
        let alike = first.bytes().zip(text_of(other)?.bytes()).take_while(|(a, b)| a == b).count();
        shared = shared.min(alike);
    }
    while !first.is_char_boundary(shared) {
        shared -= 1;
    }
    let stem = &first[..shared];
    let cut = queries.iter().any(|query| text_of(query).is_some_and(|text| text.contains('\0')));
    (!others.is_empty() && !stem.is_empty() && !cut).then_some(stem)
}

/// The answer to a question about names that begin with a stem, from the first [`TOGETHER`] of them; `None` if it may be
/// among those that were not returned.
fn answer(query: &NameQuery, found: &[NamedObject]) -> Option<Vec<NamedObject>> {
    let all = (found.len() as u64) < TOGETHER;
    let last = found.last().map_or("", |(name, _)| name);
    let (names, complete): (Vec<_>, _) = match query {
        NameQuery::Exact(name) => {
            (found.iter().filter(|(found, _)| found == name).cloned().collect(), all || last >= name.as_str())
        }
        NameQuery::Prefix { prefix, limit } => {
            let names: Vec<_> = found.iter().filter(|(name, _)| name.starts_with(prefix)).take(most(*limit)).collect();
            let beyond = last > prefix.as_str() && !last.starts_with(prefix);
            let complete = all || beyond || names.len() == most(*limit);
            (names.into_iter().cloned().collect(), complete)
        }
    };
    complete.then_some(names)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query() -> impl Strategy<Value = NameQuery> {
        let text = || "[ax./-]{0,4}";
        prop_oneof![
            text().prop_map(NameQuery::Exact),
            (text(), 1..4u64).prop_map(|(prefix, limit)| NameQuery::Prefix { prefix, limit: Some(limit) }),
        ]
    }

    proptest! {
        #[test]
        fn one_request_answers_as_several_would(
            names in proptest::collection::btree_set("[ax./-]{1,6}", 0..60),
            queries in proptest::collection::vec(query(), 1..4),
        ) {
            let names: Vec<NamedObject> = names.into_iter().map(|name| (name, ObjectId(1))).collect();
            let with = |prefix: &str, limit: u64| -> Vec<NamedObject> {
                names.iter().filter(|(name, _)| name.starts_with(prefix)).take(limit as usize).cloned().collect()
            };
            let Some(stem) = common_stem(&queries) else { return Ok(()) };
            let found = with(stem, TOGETHER);
            for query in &queries {
                let right = match query {
                    NameQuery::Exact(name) => names.iter().filter(|(n, _)| n == name).cloned().collect(),
                    NameQuery::Prefix { prefix, limit } => with(prefix, limit.unwrap()),
                };
                if let Some(answered) = answer(query, &found) {
                    prop_assert_eq!(answered, right);
                }
            }
        }
    }

    #[test]
    fn what_is_asked_of_a_path_is_one_request_however_many_names_begin_like_it() {
        let exact = |name: &str| NameQuery::Exact(name.into());
        let below = NameQuery::Prefix { prefix: "run1.arrow/".into(), limit: Some(1) };
        let queries = [exact("run1.arrow"), below, exact("run1")];
        assert_eq!(common_stem(&queries), Some("run1"));
        let found: Vec<NamedObject> = ["run1", "run1.csv"]
            .into_iter()
            .map(String::from)
            .chain((0..99).map(|n| format!("run1{n:02}")))
            .take(TOGETHER as usize)
            .map(|name| (name, ObjectId(1)))
            .collect();
        let answers: Option<Vec<_>> = queries.iter().map(|query| answer(query, &found)).collect();
        assert_eq!(answers.unwrap(), [vec![], vec![], vec![("run1".to_owned(), ObjectId(1))]]);
        // Not if they come first.
        let found: Vec<NamedObject> = (0..TOGETHER).map(|n| (format!("run1-{n:02}"), ObjectId(1))).collect();
        assert!(answer(&queries[0], &found).is_none());
        for one in [&[exact("a\0"), exact("a")][..], &[exact("a"), exact("b")], &[exact("a")], &[]] {
            assert_eq!(common_stem(one), None);
        }
    }
}

//! The node that has seen the longest beginning of this prompt, as its cache may still hold it, until that node is
//! overloaded by a stated factor; then, and for prompts nobody has seen, the less loaded of two.
//!
//! What is remembered is where prompts were sent. A node that has loaded the model anew counts as another one: its
//! cache is empty, which its report of the model's state tells.

use super::least_loaded::lighter_of_two;
use super::prefix_tree::{Path, PrefixTree};
use super::{Candidate, How, Pick, RoutingPolicy};
use crate::Request;
use serde::Deserialize;
use serde_json::value::RawValue;

/// See the module.
pub(super) struct PrefixAffinity {
    tree: PrefixTree,
    overload: f64,
}

impl PrefixAffinity {
    pub(super) fn new(pieces: usize, overload: f64) -> Self {
        Self {
            tree: PrefixTree::new(pieces),
            overload,
        }
    }
}

impl RoutingPolicy for PrefixAffinity {
    fn pick(&self, request: &Request, candidates: &[&Candidate]) -> Pick {
        let path = path_of(request);
        let lightest = candidates
            .iter()
            .map(|node| node.pressure())
            .fold(f64::INFINITY, f64::min);
        let mut known = None;
        self.tree.follow(&path, |owners| {
            let seen = owners.iter().filter_map(|owner| {
                let index = candidates.iter().position(|node| node.seen_as == *owner)?;
                let pressure = candidates[index].pressure();
                (pressure <= self.overload * lightest).then_some((index, pressure))
            });
            if let Some((index, _)) = seen.min_by(|a, b| a.1.total_cmp(&b.1)) {
                known = Some(index); // the deeper, the better
            }
        });
        let pick = match known {
            Some(index) => Pick {
                index,
                how: How::Prefix,
            },
            None => Pick {
                index: lighter_of_two(candidates),
                how: How::Load,
            },
        };
        self.tree.insert(&path, candidates[pick.index].seen_as);
        pick
    }
}

/// What the node will make its prompt of, in the order it is written in.
#[derive(Deserialize)]
struct Prompt<'a> {
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt: Option<&'a RawValue>,
}

fn path_of(request: &Request) -> Path {
    let mut path = Path::new(request.exchange.model());
    // a body that is no request is the node's to refuse
    if let Ok(prompt) = serde_json::from_slice::<Prompt<'_>>(&request.body) {
        let parts = [prompt.tools, prompt.messages, prompt.prompt];
        for part in parts.into_iter().flatten() {
            path.push(part.get().as_bytes());
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::example_request;

    /// A chat whose turns are these, each with some length.
    fn chat(turns: &[&str]) -> Request {
        let messages: Vec<String> = turns
            .iter()
            .map(|turn| format!(r#"{{"role":"user","content":"{}"}}"#, turn.repeat(100)))
            .collect();
        example_request(&format!(
            r#"{{"model":"m","messages":[{}]}}"#,
            messages.join(",")
        ))
    }

    #[test]
    fn a_conversation_stays_with_its_node_until_that_is_overloaded() {
        let mut nodes = ["a", "b", "c", "d"].map(Candidate::example);
        let policy = PrefixAffinity::new(10_000, 2.0);
        let pick = |nodes: &[Candidate], turns: &[&str]| {
            let all: Vec<&Candidate> = nodes.iter().collect();
            policy.pick(&chat(turns), &all)
        };
        let first = pick(&nodes, &["one"]).index;
        for turns in [&["one", "two"][..], &["one", "two", "three"]] {
            let next = pick(&nodes, turns);
            assert_eq!((next.index, next.how), (first, How::Prefix));
        }
        nodes[first].foreign = 1;
        assert_eq!(pick(&nodes, &["one", "two"]).index, first, "2 to 1 is fair");
        nodes[first].foreign = 2;
        let moved = pick(&nodes, &["one", "two"]);
        assert_ne!(moved.index, first, "3 to 1 is not");
        nodes[first].foreign = 0;
        let next = pick(&nodes, &["one", "two", "three", "four"]);
        assert_eq!(next.index, first, "which has seen more of this one");
        assert_eq!(pick(&nodes, &["other"]).how, How::Load);
    }

    #[test]
    fn a_node_that_loaded_the_model_anew_has_seen_nothing() {
        let mut nodes = ["a", "b"].map(Candidate::example);
        let policy = PrefixAffinity::new(10_000, 2.0);
        let request = chat(&["one"]);
        let first = policy.pick(&request, &[&nodes[0], &nodes[1]]).index;
        nodes[first].seen_as += 1;
        assert_eq!(
            policy.pick(&request, &[&nodes[0], &nodes[1]]).how,
            How::Load
        );
    }
}

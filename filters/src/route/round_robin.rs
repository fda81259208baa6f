//! One node after the other, whatever they do; a node of weight 2 has two turns.

use super::{Candidate, How, Pick, RoutingPolicy};
use crate::Request;
use std::sync::atomic::{AtomicUsize, Ordering};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct RoundRobin {
    turn: AtomicUsize,
}

impl RoutingPolicy for RoundRobin {
    fn pick(&self, _: &Request, candidates: &[&Candidate]) -> Pick {
        let turns: usize = candidates.iter().map(|node| node.weight()).sum();
        let mut turn = self.turn.fetch_add(1, Ordering::Relaxed) % turns.max(1);
        let mut index = 0;
        while let Some(left) = turn.checked_sub(candidates[index].weight()) {
            (turn, index) = (left, index + 1);
        }
        Pick {
            index,
            how: How::Turn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::example_request;

    #[test]
    fn every_node_has_its_turns() {
        let nodes = [
            Candidate::example("a"),
            Candidate::weighing("b", 2),
            Candidate::example("c"),
        ];
        let all: Vec<&Candidate> = nodes.iter().collect();
        let policy = RoundRobin::default();
        let request = example_request("");
        let picks: Vec<_> = (0..8).map(|_| policy.pick(&request, &all).index).collect();
        assert_eq!(picks, [0, 1, 1, 2, 0, 1, 1, 2]);
    }
}

//! One node after the other, whatever they do; nodes whose last contact failed come last.

use super::{Candidate, RoutingPolicy};
use crate::Exchange;
use std::sync::atomic::{AtomicUsize, Ordering};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct RoundRobin {
    turn: AtomicUsize,
}

impl RoutingPolicy for RoundRobin {
    fn pick(&self, _: &Exchange, candidates: &[&Candidate]) -> Option<usize> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        (0..candidates.len())
            .map(|step| turn.wrapping_add(step) % candidates.len())
            .min_by_key(|&index| candidates[index].endpoint.load.is_failing())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_healthy_node_has_its_turn() {
        let (head, ()) = http::Request::new(()).into_parts();
        let exchange = Exchange::open(&head);
        let nodes = ["a", "b", "c"].map(Candidate::example);
        nodes[1].endpoint.load.set_failing(true);
        let all: Vec<&Candidate> = nodes.iter().collect();
        let policy = RoundRobin::default();
        let picks: Vec<_> = (0..6)
            .filter_map(|_| policy.pick(&exchange, &all))
            .collect();
        assert!(
            picks.contains(&0) && picks.contains(&2) && !picks.contains(&1),
            "{picks:?}"
        );
    }
}

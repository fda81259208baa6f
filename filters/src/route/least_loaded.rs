//! The less loaded of two nodes taken by chance: nearly as even as the least loaded of all, and gateways that see the
//! same polls do not all run to the same node.

use super::{Candidate, How, Pick, RoutingPolicy};
use crate::Request;
use rand::Rng;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct LeastLoaded;

impl RoutingPolicy for LeastLoaded {
    fn pick(&self, _: &Request, candidates: &[&Candidate]) -> Pick {
        Pick {
            index: lighter_of_two(candidates),
            how: How::Load,
        }
    }
}

/// The lighter of two candidates taken by chance.
pub(super) fn lighter_of_two(candidates: &[&Candidate]) -> usize {
    let count = candidates.len();
    if count < 2 {
        return 0;
    }
    let mut random = rand::rng();
    let first = random.random_range(0..count);
    let second = (first + random.random_range(1..count)) % count;
    if candidates[second].is_lighter_than(candidates[first]) {
        second
    } else {
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::example_request;

    fn picks(candidates: &[Candidate]) -> Vec<usize> {
        let all: Vec<&Candidate> = candidates.iter().collect();
        let request = example_request("");
        let mut counts = vec![0; all.len()];
        for _ in 0..3000 {
            counts[LeastLoaded.pick(&request, &all).index] += 1;
        }
        counts
    }

    #[test]
    fn of_two_nodes_the_idler_is_taken() {
        let mut nodes = ["busy", "idle"].map(Candidate::example);
        nodes[0].foreign = 3;
        assert_eq!(picks(&nodes), [0, 3000]);
    }

    #[test]
    fn the_busiest_of_many_is_never_taken_and_equals_share() {
        let mut nodes = ["a", "b", "c", "d"].map(Candidate::example);
        nodes[2].foreign = 9;
        let counts = picks(&nodes);
        assert_eq!(counts[2], 0);
        assert!(
            [0, 1, 3].iter().all(|&node| counts[node] > 600),
            "{counts:?}"
        );
    }

    #[test]
    fn a_heavier_node_carries_more_before_it_counts_as_loaded() {
        let mut nodes = [Candidate::example("small"), Candidate::weighing("large", 4)];
        nodes[1].foreign = 2;
        assert_eq!(picks(&nodes), [0, 3000], "3 of 4 is less than 1 of 1");
        nodes[1].foreign = 5;
        assert_eq!(picks(&nodes), [3000, 0]);
    }
}

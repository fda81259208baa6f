//! The node with the fewest requests in flight; ties fall by chance, so that gateways do not march in step.

use super::{Candidate, RoutingPolicy};
use crate::Exchange;
use rand::Rng;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct LeastLoaded;

impl RoutingPolicy for LeastLoaded {
    fn pick(&self, _: &Exchange, candidates: &[&Candidate]) -> Option<usize> {
        if candidates.len() < 2 {
            return (!candidates.is_empty()).then_some(0);
        }
        let start = rand::rng().random_range(0..candidates.len());
        (0..candidates.len())
            .map(|step| (start + step) % candidates.len())
            .min_by_key(|&index| candidates[index].load())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_idlest_healthy_node_is_taken() {
        let (head, ()) = http::Request::new(()).into_parts();
        let exchange = Exchange::open(&head);
        let mut nodes = ["busy", "idle", "broken"].map(Candidate::example);
        nodes[0].reported = 3;
        nodes[2].endpoint.load.set_failing(true);
        let all: Vec<&Candidate> = nodes.iter().collect();
        for _ in 0..20 {
            assert_eq!(LeastLoaded.pick(&exchange, &all), Some(1));
        }
        assert_eq!(
            LeastLoaded.pick(&exchange, &all[2..]),
            Some(0),
            "a failing node beats none"
        );
        assert_eq!(LeastLoaded.pick(&exchange, &[]), None);
    }
}

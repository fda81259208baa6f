//! The same node for the same session, as long as it is there and not overloaded. Nothing is remembered: every gateway
//! finds the same node by itself, and a node that comes or goes moves only the sessions it wins or loses.

use super::Candidate;
use super::prefix_tree::hash;

/// The candidate of this session: that with the greatest hash of session and node, weighted.
pub(super) fn owner(session: &[u8], candidates: &[&Candidate]) -> usize {
    let seed = hash(0x5e55_1017, session);
    let score = |candidate: &Candidate| {
        let hashed = hash(seed, candidate.endpoint.node.as_bytes());
        // uniform in (0, 1]; -w / ln(u) makes each win in proportion to its weight
        let uniform = ((hashed >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
        candidate.weight() as f64 / -uniform.ln()
    };
    let mut best = (0, f64::MIN);
    for (index, candidate) in candidates.iter().enumerate() {
        let score = score(candidate);
        if score > best.1 {
            best = (index, score);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_stay_where_they_are_when_another_node_goes() {
        let nodes = ["a", "b", "c", "d"].map(Candidate::example);
        let all: Vec<&Candidate> = nodes.iter().collect();
        let fewer = &all[..3];
        let mut counts = [0; 4];
        for session in 0..4000u32 {
            let session = session.to_le_bytes();
            let before = owner(&session, &all);
            counts[before] += 1;
            if before != 3 {
                assert_eq!(owner(&session, fewer), before);
            }
        }
        assert!(counts.iter().all(|count| *count > 800), "{counts:?}");
    }

    #[test]
    fn a_heavier_node_has_more_sessions() {
        let nodes = [Candidate::example("a"), Candidate::weighing("b", 3)];
        let all: Vec<&Candidate> = nodes.iter().collect();
        let heavy = (0..4000u32)
            .filter(|session| owner(&session.to_le_bytes(), &all) == 1)
            .count();
        assert!((2800..3200).contains(&heavy), "{heavy}");
    }
}

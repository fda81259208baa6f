//! Who is computed in the next step. Decides on numbers alone: no tensor, no clock, no channel.

use super::plan::{Plan, Row};
use super::sequence::{Sequence, SequenceId, SequenceStatus};
use std::collections::VecDeque;

/// Room a sequence must have beyond its prompt before it may begin, in tokens, so that it is not set back at once.
const HEADROOM: usize = 64;

/// Sequences in order of arrival, and the bounds on a step.
#[derive(Debug)]
pub struct Scheduler {
    waiting: VecDeque<Sequence>,
    /// Running and paused, oldest first.
    running: Vec<Sequence>,
    bounds: Bounds,
}

/// What a step and the set of running sequences may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Sequences with a state.
    pub max_running: usize,
    /// Prompt tokens in one step, over all sequences.
    pub prefill_tokens: usize,
    /// Bytes all states together may hold.
    pub state_bytes: u64,
}

impl Scheduler {
    /// A scheduler without sequences.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            bounds,
        }
    }

    /// Puts a sequence in the line: behind all that have its priority or a better one.
    pub fn add(&mut self, sequence: Sequence) {
        let ahead = |other: &Sequence| other.priority <= sequence.priority;
        let place = self.waiting.iter().rposition(ahead).map_or(0, |at| at + 1);
        self.waiting.insert(place, sequence);
    }

    /// Takes a sequence out, wherever it stands.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            return Some(self.running.remove(at));
        }
        let at = self.waiting.iter().position(|sequence| sequence.id == id)?;
        self.waiting.remove(at)
    }

    /// Leaves a running sequence out of plans until [`Self::resume`].
    pub fn pause(&mut self, id: SequenceId) {
        self.set_status(id, SequenceStatus::Running, SequenceStatus::Paused);
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&mut self, id: SequenceId) {
        self.set_status(id, SequenceStatus::Paused, SequenceStatus::Running);
    }

    fn set_status(&mut self, id: SequenceId, from: SequenceStatus, to: SequenceStatus) {
        let found = self
            .running
            .iter_mut()
            .find(|sequence| sequence.id == id && sequence.status == from);
        if let Some(sequence) = found {
            sequence.status = to;
        }
    }

    /// A sequence that has a state.
    #[must_use]
    pub fn running(&self, id: SequenceId) -> Option<&Sequence> {
        self.running.iter().find(|sequence| sequence.id == id)
    }

    /// How many sequences have a state.
    #[must_use]
    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    /// How many sequences wait.
    #[must_use]
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// Decides the next step: every sequence that writes, then pieces of prompts, oldest first, then new ones.
    ///
    /// `state_bytes` tells what the state of a sequence of so many tokens holds.
    pub fn plan(&mut self, state_bytes: impl Fn(usize) -> u64) -> Plan {
        let mut plan = Plan {
            preempted: self.make_room(&state_bytes),
            ..Plan::default()
        };
        let active = |sequence: &&Sequence| sequence.status == SequenceStatus::Running;
        for sequence in self.running.iter().filter(active) {
            if sequence.remaining() == 1 {
                plan.rows.push(row(sequence, 1));
            }
        }
        let mut budget = self.bounds.prefill_tokens;
        for sequence in self.running.iter().filter(active) {
            let piece = sequence.piece(budget);
            if sequence.remaining() > 1 && piece > 0 {
                budget -= piece;
                plan.rows.push(row(sequence, piece));
            }
        }
        while budget > 0 && plan.preempted.is_empty() && self.next_fits(&state_bytes) {
            let Some(mut sequence) = self.waiting.pop_front() else {
                break;
            };
            sequence.status = SequenceStatus::Running;
            let piece = sequence.piece(budget);
            budget -= piece;
            plan.rows.push(row(&sequence, piece));
            plan.started.push(sequence.id);
            self.running.push(sequence);
        }
        plan
    }

    /// Takes the outcome of a step in: `sampled` has one token for each row that samples, in order.
    pub fn commit(&mut self, plan: &Plan, sampled: &[(SequenceId, u32)]) {
        for row in &plan.rows {
            if let Some(sequence) = self.running_mut(row.sequence) {
                sequence.computed = row.tokens.end;
            }
        }
        for &(id, token) in sampled {
            if let Some(sequence) = self.running_mut(id) {
                sequence.tokens.push(token);
            }
        }
    }

    fn running_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|sequence| sequence.id == id)
    }

    /// Sets the youngest back until what runs has room to grow by a token each. The oldest always stays:
    /// a model is loaded only where one sequence of full length fits.
    fn make_room(&mut self, state_bytes: &impl Fn(usize) -> u64) -> Vec<SequenceId> {
        let mut preempted = Vec::new();
        while self.running.len() > 1 && self.held(state_bytes) > self.bounds.state_bytes {
            let Some(mut youngest) = self.running.pop() else {
                break;
            };
            youngest.computed = 0;
            youngest.status = SequenceStatus::Waiting;
            preempted.push(youngest.id);
            self.waiting.push_front(youngest);
        }
        preempted
    }

    fn next_fits(&self, state_bytes: &impl Fn(usize) -> u64) -> bool {
        let Some(next) = self.waiting.front() else {
            return false;
        };
        if self.running.is_empty() {
            return true;
        }
        let wanted = state_bytes(next.tokens.len() + HEADROOM);
        self.running.len() < self.bounds.max_running
            && self.held(state_bytes).saturating_add(wanted) <= self.bounds.state_bytes
    }

    /// What the running sequences will hold after this step, prompts counted whole.
    fn held(&self, state_bytes: &impl Fn(usize) -> u64) -> u64 {
        self.running
            .iter()
            .map(|sequence| state_bytes(sequence.tokens.len() + 1))
            .fold(0, u64::saturating_add)
    }
}

fn row(sequence: &Sequence, count: usize) -> Row {
    let tokens = sequence.computed..sequence.computed + count;
    Row {
        sequence: sequence.id,
        sample: tokens.end == sequence.tokens.len(),
        every: sequence.every_logit,
        tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn scheduler(max_running: usize, prefill_tokens: usize, state_bytes: u64) -> Scheduler {
        Scheduler::new(Bounds {
            max_running,
            prefill_tokens,
            state_bytes,
        })
    }

    fn add(scheduler: &mut Scheduler, id: u64, prompt: usize) {
        scheduler.add(Sequence::new(SequenceId(id), vec![0; prompt]));
    }

    /// Plans and commits a step; each row as (sequence, tokens, sampled).
    fn step(scheduler: &mut Scheduler, cost: fn(usize) -> u64) -> Vec<(u64, usize, bool)> {
        let plan = scheduler.plan(cost);
        let sampled: Vec<_> = plan
            .rows
            .iter()
            .filter(|row| row.sample)
            .map(|row| (row.sequence, 1))
            .collect();
        scheduler.commit(&plan, &sampled);
        plan.rows
            .iter()
            .map(|row| (row.sequence.0, row.tokens.len(), row.sample))
            .collect()
    }

    const FREE: fn(usize) -> u64 = |_| 0;
    const PER_TOKEN: fn(usize) -> u64 = |tokens| tokens as u64;

    #[test]
    fn those_that_write_come_first_and_prompts_share_what_is_left() {
        let mut scheduler = scheduler(8, 4, 0);
        add(&mut scheduler, 1, 3);
        assert_eq!(step(&mut scheduler, FREE), [(1, 3, true)]);
        add(&mut scheduler, 2, 6);
        add(&mut scheduler, 3, 1);
        assert_eq!(step(&mut scheduler, FREE), [(1, 1, true), (2, 4, false)]);
        assert_eq!(
            step(&mut scheduler, FREE),
            [(1, 1, true), (2, 2, true), (3, 1, true)]
        );
        assert_eq!(
            step(&mut scheduler, FREE),
            [(1, 1, true), (2, 1, true), (3, 1, true)]
        );
    }

    #[test]
    fn a_better_priority_begins_earlier_and_equals_keep_their_order() {
        let mut scheduler = scheduler(8, 64, 0);
        for (id, priority) in [(1, 0), (2, 5), (3, -5), (4, 0)] {
            scheduler.add(Sequence {
                priority,
                ..Sequence::new(SequenceId(id), vec![0; 2])
            });
        }
        let begun = scheduler.plan(FREE).started;
        assert_eq!(begun, [3, 1, 4, 2].map(SequenceId));
    }

    #[test]
    fn no_more_run_than_allowed_and_the_line_is_kept() {
        let mut scheduler = scheduler(1, 64, 0);
        add(&mut scheduler, 1, 2);
        add(&mut scheduler, 2, 2);
        assert_eq!(step(&mut scheduler, FREE), [(1, 2, true)]);
        assert_eq!(step(&mut scheduler, FREE), [(1, 1, true)]);
        scheduler.remove(SequenceId(1));
        assert_eq!(step(&mut scheduler, FREE), [(2, 2, true)]);
    }

    #[test]
    fn a_paused_sequence_is_left_out_until_it_is_resumed() {
        let mut scheduler = scheduler(8, 64, 0);
        add(&mut scheduler, 1, 2);
        step(&mut scheduler, FREE);
        scheduler.pause(SequenceId(1));
        assert_eq!(step(&mut scheduler, FREE), []);
        scheduler.resume(SequenceId(1));
        assert_eq!(step(&mut scheduler, FREE), [(1, 1, true)]);
    }

    #[test]
    fn the_youngest_is_set_back_when_states_outgrow_their_room() {
        let mut scheduler = scheduler(8, 64, 100);
        add(&mut scheduler, 1, 10);
        add(&mut scheduler, 2, 10);
        step(&mut scheduler, PER_TOKEN);
        assert_eq!(
            scheduler.running_count(),
            2,
            "10 + 1 and 10 + 64 fit in 100"
        );
        let mut plan = scheduler.plan(PER_TOKEN);
        while plan.preempted.is_empty() {
            let sampled: Vec<_> = plan.rows.iter().map(|row| (row.sequence, 1)).collect();
            scheduler.commit(&plan, &sampled);
            plan = scheduler.plan(PER_TOKEN);
        }
        assert_eq!(plan.preempted, [SequenceId(2)]);
        assert_eq!(scheduler.waiting_count(), 1);
        scheduler.remove(SequenceId(1));
        let again = scheduler.plan(PER_TOKEN);
        assert_eq!(again.started, [SequenceId(2)]);
        assert_eq!(
            again.rows[0].tokens.start, 0,
            "it begins anew, what it wrote included"
        );
        assert!(again.rows[0].sample);
    }

    #[test]
    fn random_lives_keep_the_invariants() {
        for seed in 0..20 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut scheduler = scheduler(4, 16, 300);
            let mut next = 0;
            for _ in 0..500 {
                match rng.random_range(0..10) {
                    0..3 => {
                        next += 1;
                        add(&mut scheduler, next, rng.random_range(1..80));
                    }
                    3 => drop(scheduler.remove(SequenceId(rng.random_range(1..next + 2)))),
                    4 => scheduler.pause(SequenceId(rng.random_range(1..next + 2))),
                    5 => scheduler.resume(SequenceId(rng.random_range(1..next + 2))),
                    _ => {}
                }
                let plan = scheduler.plan(PER_TOKEN);
                let (_, reading) = plan.token_counts();
                assert!(
                    reading <= 16 + scheduler.running_count(),
                    "seed {seed}: {plan:?}"
                );
                assert!(scheduler.running_count() <= 4, "seed {seed}");
                for row in &plan.rows {
                    let sequence = scheduler.running(row.sequence).expect("planned rows run");
                    assert_eq!(row.tokens.start, sequence.computed, "seed {seed}");
                    assert!(!row.tokens.is_empty(), "seed {seed}");
                    assert_eq!(row.sample, row.tokens.end == sequence.tokens.len());
                }
                let sampled: Vec<_> = plan
                    .rows
                    .iter()
                    .filter(|row| row.sample)
                    .map(|row| (row.sequence, 1))
                    .collect();
                scheduler.commit(&plan, &sampled);
            }
        }
    }
}

//! Who is computed in the next step. Decides on numbers alone: no tensor, no clock, no channel.

use super::drafts::MOST_GUESSED;
use super::plan::{Plan, Row};
use super::sequence::{Sequence, SequenceId, SequenceStatus};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Room a sequence must have beyond its prompt before it may begin, in tokens, so that it is not set back at once.
const HEADROOM: usize = 64;

/// Where the states of sequences are.
pub trait Store {
    /// Blocks of keys and values that a sequence of so many tokens holds.
    fn blocks(&self, tokens: usize) -> usize;

    /// Gives a sequence its state, with the effect of as many of its first tokens as others have left.
    fn begin(&mut self, sequence: &Sequence) -> Begun;
}

/// The state of a sequence that begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Begun {
    /// Tokens whose effect is in it; not all.
    pub computed: usize,
    /// A further place where it is to be saved.
    pub save_at: Option<usize>,
}

/// Who may begin next among equals: the users take turns, whoever of them asks most.
///
/// Start-time fair queueing with requests of equal weight: a request's turn is the one after its user's last, but not before
/// the turn that begins now, so that nobody saves turns up.
#[derive(Debug, Default)]
struct Turns {
    now: u64,
    /// Each user's next turn, where it is still to come. Who does not say who they are is one user.
    next: HashMap<Option<Arc<str>>, u64>,
}

impl Turns {
    fn take(&mut self, user: Option<Arc<str>>) -> u64 {
        let next = self.next.entry(user).or_insert(self.now);
        let turn = *next;
        *next += 1;
        turn
    }

    fn begin(&mut self, turn: u64) {
        if turn > self.now {
            self.now = turn;
            self.next.retain(|_, next| *next > turn);
        }
    }
}

/// Sequences in the order in which they begin, and the bounds on a step.
#[derive(Debug)]
pub struct Scheduler {
    waiting: VecDeque<Sequence>,
    turns: Turns,
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
    /// Blocks of keys and values all sequences together may hold.
    pub blocks: usize,
    /// Tokens that are guessed ahead of each sequence that writes; zero guesses none.
    pub drafts: usize,
    /// Bytes that states saved for later sequences may hold; with zero nothing is kept of those that have ended.
    pub snapshot_bytes: u64,
    /// Bytes of saved states that were moved from a device to the host.
    pub host_snapshot_bytes: u64,
}

impl Scheduler {
    /// A scheduler without sequences.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            waiting: VecDeque::new(),
            turns: Turns::default(),
            running: Vec::new(),
            bounds,
        }
    }

    /// Changes the bounds. Who must make way is told by [`Self::make_room`], at the latest with the next plan.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// Puts a sequence in the line: behind all that have a better priority, and of its own priority behind those whose turn
    /// is no later.
    pub fn add(&mut self, mut sequence: Sequence) {
        sequence.turn = self.turns.take(sequence.user.clone());
        let rank = |of: &Sequence| (of.priority, of.turn);
        let ahead = |other: &Sequence| rank(other) <= rank(&sequence);
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

    /// Decides the next step: every sequence that writes, then pieces of prompts, oldest first, then new ones. Where any
    /// writes, the step takes in at most `beside` tokens of prompts.
    pub fn plan(&mut self, store: &mut impl Store, beside: usize) -> Plan {
        let mut plan = Plan {
            preempted: self.make_room(store),
            ..Plan::default()
        };
        let active = |sequence: &&Sequence| sequence.status == SequenceStatus::Running;
        let mut guessed = 0;
        for sequence in self.running.iter().filter(active) {
            if sequence.remaining() == 1 {
                let mut row = row(sequence, 1);
                // those that were paused come with what they had: there is room for the trails of so many
                guessed += usize::from(row.drafts > 0);
                if guessed > MOST_GUESSED {
                    row.drafts = 0;
                }
                plan.rows.push(row);
            }
        }
        let mut budget = self.bounds.prefill_tokens;
        if !plan.rows.is_empty() {
            budget = budget.min(beside);
        }
        for sequence in self.running.iter().filter(active) {
            let piece = sequence.piece(budget);
            if sequence.remaining() > 1 && piece > 0 {
                budget -= piece;
                plan.rows.push(row(sequence, piece));
            }
        }
        while budget > 0 && plan.preempted.is_empty() && self.next_fits(store) {
            let Some(mut sequence) = self.waiting.pop_front() else {
                break;
            };
            self.turns.begin(sequence.turn);
            let begun = store.begin(&sequence);
            sequence.computed = begun.computed;
            if let Some(place) = begun.save_at {
                sequence.save_at(place);
            }
            sequence.status = SequenceStatus::Running;
            let piece = sequence.piece(budget);
            budget -= piece;
            plan.rows.push(row(&sequence, piece));
            plan.started.push(sequence.id);
            self.running.push(sequence);
        }
        plan
    }

    /// Takes the outcome of a step in: of each row that samples, the drafts that held and the token after them.
    pub fn commit(&mut self, plan: &Plan, sampled: &[(SequenceId, Vec<u32>)]) {
        for row in &plan.rows {
            if let Some(sequence) = self.running_mut(row.sequence) {
                sequence.computed = row.tokens.end;
                sequence.drafts.clear();
            }
        }
        for (id, tokens) in sampled {
            if let Some(sequence) = self.running_mut(*id) {
                sequence.tokens.extend(tokens);
                sequence.computed = sequence.tokens.len() - 1;
            }
        }
    }

    /// Sets the guesses of what follows for a sequence.
    pub fn set_drafts(&mut self, id: SequenceId, drafts: Vec<u32>) {
        if let Some(sequence) = self.running_mut(id) {
            sequence.drafts = drafts;
        }
    }

    fn running_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|sequence| sequence.id == id)
    }

    /// Sets the youngest back until what runs has room to grow by a token each; their states are to be let go. The oldest
    /// always stays: a model is loaded only where one sequence of full length fits, and is never given less.
    pub fn make_room(&mut self, store: &impl Store) -> Vec<SequenceId> {
        let mut preempted = Vec::new();
        while self.running.len() > 1 && self.is_beyond_bounds(store) {
            let Some(mut youngest) = self.running.pop() else {
                break;
            };
            youngest.computed = 0;
            youngest.drafts.clear();
            youngest.status = SequenceStatus::Waiting;
            preempted.push(youngest.id);
            self.waiting.push_front(youngest);
        }
        preempted
    }

    fn is_beyond_bounds(&self, store: &impl Store) -> bool {
        self.running.len() > self.bounds.max_running || self.held(store) > self.bounds.blocks
    }

    fn next_fits(&self, store: &impl Store) -> bool {
        let Some(next) = self.waiting.front() else {
            return false;
        };
        if self.running.is_empty() {
            return true;
        }
        // another answer to a prompt that is being computed goes on from what that one leaves
        let twin = |other: &Sequence| {
            other.remaining() > 1 && !next.every_logit && other.tokens == next.tokens
        };
        let wanted = store.blocks(next.tokens.len() + HEADROOM);
        self.running.len() < self.bounds.max_running
            && self.held(store) + wanted <= self.bounds.blocks
            && !self.running.iter().any(twin)
    }

    /// What the running sequences will hold after this step, prompts counted whole: its tokens with the drafts that are
    /// checked in it, and those that are made after it, all of which may follow drafts that held.
    fn held(&self, store: &impl Store) -> usize {
        self.running
            .iter()
            .map(|sequence| store.blocks(sequence.tokens.len() + 1 + 2 * self.bounds.drafts))
            .sum()
    }
}

fn row(sequence: &Sequence, count: usize) -> Row {
    let tokens = sequence.computed..sequence.computed + count;
    Row {
        sequence: sequence.id,
        sample: tokens.end == sequence.tokens.len(),
        every: sequence.every_logit,
        save: sequence.places.contains(&tokens.end),
        drafts: sequence.drafts.len(), // there are none before it writes
        tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn scheduler(max_running: usize, prefill_tokens: usize, blocks: usize) -> Scheduler {
        Scheduler::new(Bounds {
            max_running,
            prefill_tokens,
            blocks,
            drafts: 0,
            snapshot_bytes: 0,
            host_snapshot_bytes: 0,
        })
    }

    fn add(scheduler: &mut Scheduler, id: u64, prompt: usize) {
        scheduler.add(Sequence::new(SequenceId(id), vec![id as u32; prompt]));
    }

    /// Plans and commits a step; each row as (sequence, tokens, sampled).
    fn step(scheduler: &mut Scheduler, mut store: Sized) -> Vec<(u64, usize, bool)> {
        let plan = scheduler.plan(&mut store, usize::MAX);
        let sampled: Vec<_> = plan
            .rows
            .iter()
            .filter(|row| row.sample)
            .map(|row| (row.sequence, vec![1]))
            .collect();
        scheduler.commit(&plan, &sampled);
        plan.rows
            .iter()
            .map(|row| (row.sequence.0, row.tokens.len(), row.sample))
            .collect()
    }

    /// So many blocks a token, always begun anew.
    #[derive(Clone, Copy)]
    struct Sized(usize);

    impl Store for Sized {
        fn blocks(&self, tokens: usize) -> usize {
            self.0 * tokens
        }

        fn begin(&mut self, _: &Sequence) -> Begun {
            Begun::default()
        }
    }

    const FREE: Sized = Sized(0);
    const PER_TOKEN: Sized = Sized(1);

    /// Others have left the first tokens of every sequence.
    struct Left(usize);

    impl Store for Left {
        fn blocks(&self, _: usize) -> usize {
            0
        }

        fn begin(&mut self, _: &Sequence) -> Begun {
            Begun {
                computed: self.0,
                save_at: Some(self.0 + 3),
            }
        }
    }

    #[test]
    fn what_others_left_is_not_computed_and_steps_end_where_states_are_saved() {
        let mut scheduler = scheduler(8, 10, 0);
        scheduler.add(Sequence {
            places: vec![2, 20],
            ..Sequence::new(SequenceId(1), vec![0; 24])
        });
        let mut pieces = Vec::new();
        for _ in 0..5 {
            let plan = scheduler.plan(&mut Left(4), usize::MAX);
            let row = &plan.rows[0];
            pieces.push((row.tokens.clone(), row.save, row.sample));
            let written = row.sample.then(|| (SequenceId(1), vec![1]));
            scheduler.commit(&plan, written.as_slice());
        }
        let expected = [
            (4..7, true, false),
            (7..17, false, false),
            (17..20, true, false),
            (20..24, false, true),
            (24..25, false, true),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn a_second_answer_to_a_prompt_waits_until_the_prompt_is_computed_once() {
        let mut scheduler = scheduler(8, 10, 0);
        for id in [1, 2] {
            scheduler.add(Sequence::new(SequenceId(id), vec![0; 15]));
        }
        assert_eq!(step(&mut scheduler, FREE), [(1, 10, false)]);
        assert_eq!(step(&mut scheduler, FREE), [(1, 5, true)]);
        assert_eq!(step(&mut scheduler, FREE), [(1, 1, true), (2, 10, false)]);
    }

    #[test]
    fn no_step_checks_the_guesses_of_more_sequences_than_have_room_for_trails() {
        let mut scheduler = scheduler(20, 100, 0);
        let ids = 0..MOST_GUESSED as u64 + 2;
        for id in ids.clone() {
            add(&mut scheduler, id, 3);
        }
        step(&mut scheduler, FREE);
        for id in ids.clone() {
            scheduler.set_drafts(SequenceId(id), vec![1, 1]);
        }
        let mut free = FREE;
        let plan = scheduler.plan(&mut free, usize::MAX);
        let drafts: Vec<usize> = plan.rows.iter().map(|row| row.drafts).collect();
        assert_eq!(drafts, [vec![2; MOST_GUESSED], vec![0; 2]].concat());
        let sampled: Vec<_> = ids.map(|id| (SequenceId(id), vec![1])).collect();
        scheduler.commit(&plan, &sampled);
        assert!(scheduler.running.iter().all(|one| one.drafts.is_empty()));
    }

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
    fn beside_those_that_write_less_is_read() {
        let mut scheduler = scheduler(8, 64, 0);
        add(&mut scheduler, 1, 2);
        let begun = scheduler.plan(&mut FREE.clone(), 16);
        scheduler.commit(&begun, &[(SequenceId(1), vec![1])]);
        add(&mut scheduler, 2, 100);
        let lengths = |plan: &Plan| -> Vec<_> { plan.rows.iter().map(Row::count).collect() };
        let beside = scheduler.plan(&mut FREE.clone(), 16);
        assert_eq!(lengths(&beside), [1, 16]);
        scheduler.commit(&beside, &[(SequenceId(1), vec![1])]);
        scheduler.remove(SequenceId(1));
        assert_eq!(
            lengths(&scheduler.plan(&mut FREE.clone(), 16)),
            [64],
            "nobody waits for it"
        );
    }

    #[test]
    fn users_take_turns_and_nobody_saves_them_up() {
        let mut scheduler = scheduler(1, 10, 0);
        let add = |scheduler: &mut Scheduler, id: u64, user: Option<&str>| {
            scheduler.add(Sequence {
                user: user.map(Arc::from),
                ..Sequence::new(SequenceId(id), vec![0; 2])
            });
        };
        // begins the next and ends it
        let next = |scheduler: &mut Scheduler| {
            let mut store = FREE;
            let started = scheduler.plan(&mut store, usize::MAX).started;
            started.iter().for_each(|id| drop(scheduler.remove(*id)));
            started[0].0
        };
        for (id, user) in [(1, "a"), (2, "a"), (3, "a"), (4, "a"), (5, "b"), (6, "b")] {
            add(&mut scheduler, id, Some(user));
        }
        add(&mut scheduler, 7, None);
        add(&mut scheduler, 8, None);
        let first: Vec<_> = (0..5).map(|_| next(&mut scheduler)).collect();
        assert_eq!(first, [1, 5, 7, 2, 6]);
        // who comes late has the turn that is now, not all that went by
        add(&mut scheduler, 9, Some("c"));
        add(&mut scheduler, 10, Some("c"));
        add(&mut scheduler, 11, Some("c"));
        let then: Vec<_> = (0..6).map(|_| next(&mut scheduler)).collect();
        assert_eq!(then, [8, 9, 3, 10, 4, 11]);
        let known = &scheduler.turns.next;
        assert_eq!(
            known.len(),
            2,
            "turns that are over are forgotten: {known:?}"
        );
    }

    #[test]
    fn a_better_priority_begins_earlier_and_equals_keep_their_order() {
        let mut scheduler = scheduler(8, 64, 0);
        for (id, priority) in [(1, 0), (2, 5), (3, -5), (4, 0)] {
            scheduler.add(Sequence {
                priority,
                ..Sequence::new(SequenceId(id), vec![id as u32; 2])
            });
        }
        let begun = scheduler.plan(&mut FREE.clone(), usize::MAX).started;
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
        let mut store = PER_TOKEN;
        let mut plan = scheduler.plan(&mut store, usize::MAX);
        while plan.preempted.is_empty() {
            let rows = plan.rows.iter();
            let sampled: Vec<_> = rows.map(|row| (row.sequence, vec![1])).collect();
            scheduler.commit(&plan, &sampled);
            plan = scheduler.plan(&mut store, usize::MAX);
        }
        assert_eq!(plan.preempted, [SequenceId(2)]);
        assert_eq!(scheduler.waiting_count(), 1);
        scheduler.remove(SequenceId(1));
        let again = scheduler.plan(&mut store, usize::MAX);
        assert_eq!(again.started, [SequenceId(2)]);
        assert_eq!(
            again.rows[0].tokens.start, 0,
            "it begins anew, what it wrote included"
        );
        assert!(again.rows[0].sample);
    }

    #[test]
    fn smaller_bounds_set_the_youngest_back_and_larger_ones_let_them_begin_again() {
        let mut scheduler = scheduler(4, 64, 400);
        for id in 1..=4 {
            add(&mut scheduler, id, 10);
        }
        assert_eq!(step(&mut scheduler, PER_TOKEN).len(), 4);
        let wide = scheduler.bounds;
        let set = |scheduler: &mut Scheduler, max_running, blocks| {
            scheduler.set_bounds(Bounds {
                max_running,
                blocks,
                ..wide
            });
        };
        set(&mut scheduler, 3, 400);
        assert_eq!(scheduler.make_room(&PER_TOKEN), [SequenceId(4)]);
        set(&mut scheduler, 4, 24); // two of eleven tokens and the next of each
        assert_eq!(scheduler.make_room(&PER_TOKEN), [SequenceId(3)]);
        set(&mut scheduler, 4, 1);
        let plan = scheduler.plan(&mut PER_TOKEN.clone(), usize::MAX);
        assert_eq!(plan.preempted, [SequenceId(2)], "the oldest stays");
        set(&mut scheduler, 4, 400);
        let begun = scheduler.plan(&mut PER_TOKEN.clone(), usize::MAX).started;
        assert_eq!(begun, [2, 3, 4].map(SequenceId), "in the order they had");
    }

    #[test]
    fn random_lives_keep_the_invariants() {
        for seed in 0..20 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut scheduler = scheduler(4, 16, 300);
            let mut most = 4;
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
                    6 => {
                        most = rng.random_range(1..5);
                        scheduler.set_bounds(Bounds {
                            max_running: most,
                            blocks: rng.random_range(100..400),
                            ..scheduler.bounds
                        });
                    }
                    _ => {}
                }
                let plan = scheduler.plan(&mut PER_TOKEN.clone(), usize::MAX);
                let (_, reading) = plan.token_counts();
                assert!(
                    reading <= 16 + scheduler.running_count(),
                    "seed {seed}: {plan:?}"
                );
                assert!(scheduler.running_count() <= most, "seed {seed}");
                assert!(
                    scheduler.running_count() == 1 || !scheduler.is_beyond_bounds(&PER_TOKEN),
                    "seed {seed}"
                );
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
                    .map(|row| (row.sequence, vec![1]))
                    .collect();
                scheduler.commit(&plan, &sampled);
            }
        }
    }
}

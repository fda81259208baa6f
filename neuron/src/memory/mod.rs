//! What sequences remember.

pub mod pool;
pub(crate) mod slot;

use crate::gpu::GpuError;
use pool::{BLOCK, Block, KvNumbers, KvPool, KvShape};
use slot::Slot;
use std::sync::Arc;

/// Everything a model remembers of one sequence, where the model is.
///
/// Only its keys and values grow with the sequence. It cannot be cut back to any earlier position: [`Snapshot`]s can be
/// taken and gone on from, and the rows of a step that said so can be taken back.
#[derive(Debug)]
pub struct SequenceState {
    /// Tokens whose effect is in it.
    pub(crate) len: usize,
    /// Tokens the drafting layer has taken in; it follows the others one token behind.
    pub(crate) drafted: usize,
    pub(crate) layers: Vec<LayerState>,
    /// What the gated delta nets remember, where that is on a device.
    slot: Option<Slot>,
    /// Keys and values of all layers, [`BLOCK`] tokens each; the last ones may have room.
    blocks: Vec<Arc<Block>>,
    pool: KvPool,
    /// What the other ranks of the model remember of the same tokens, in their order; none of those that have not begun or
    /// are at work with it.
    others: Vec<Option<SequenceState>>,
}

/// A block of keys and values with those that other ranks hold of the same tokens.
#[derive(Debug, Clone)]
pub struct SharedBlock {
    own: Arc<Block>,
    others: Box<[Arc<Block>]>,
}

impl SharedBlock {
    /// Whether nobody else holds it.
    #[must_use]
    pub fn is_last(&self) -> bool {
        Arc::strong_count(&self.own) == 1
    }
}

/// What one layer remembers.
#[derive(Debug, Clone)]
pub(crate) enum LayerState {
    /// Of full attention: keys and values, at this place in every block.
    Attention(usize),
    /// Of the gated delta net: a convolution tail and the recurrent state.
    Delta(DeltaState),
    /// The same on a device, at this place in the sequence's slot.
    InSlot(usize),
}

/// State of a gated delta net.
#[derive(Debug, Clone)]
pub(crate) struct DeltaState {
    /// Inputs of the convolution for the last tokens, oldest first: `(kernel - 1, channels)`.
    pub(crate) conv: Vec<f32>,
    /// `S`: `(value heads, key dim, value dim)`. It stays f32: lower precision drifts over long sequences.
    pub(crate) recurrent: Vec<f32>,
    /// What it was after each row but the last of a step whose rows may be taken back.
    pub(crate) trail: Option<Trail>,
}

/// Earlier states of a gated delta net.
#[derive(Debug, Clone)]
pub(crate) struct Trail {
    /// The convolution's tail before the step, then its inputs: `(kernel - 1 + rows, channels)`.
    pub(crate) conv: Vec<f32>,
    /// `S` after each row but the last: `(value heads, rows - 1, key dim · value dim)`.
    pub(crate) recurrent: Vec<f32>,
    pub(crate) rows: usize,
    /// Value heads.
    pub(crate) heads: usize,
}

impl DeltaState {
    /// Goes back to where it was after the first `rows` of the last step's rows, one at least.
    fn keep_rows(&mut self, rows: usize) {
        let Some(trail) = self.trail.take().filter(|trail| rows < trail.rows) else {
            return;
        };
        let channels = (trail.conv.len() - self.conv.len()) / trail.rows;
        let tail = self.conv.len();
        self.conv
            .copy_from_slice(&trail.conv[rows * channels..][..tail]);
        let size = self.recurrent.len() / trail.heads;
        let heads = self.recurrent.chunks_exact_mut(size);
        for (head, state) in heads.enumerate() {
            let at = (head * (trail.rows - 1) + rows - 1) * size;
            state.copy_from_slice(&trail.recurrent[at..at + size]);
        }
    }
}

/// What a gated delta net remembers of a sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Remembered {
    /// The tail of the convolution, `(taps - 1, channels)`.
    pub tail: Vec<f32>,
    /// `S`: `(value heads, key dim, value dim)`.
    pub recurrent: Vec<f32>,
}

/// There are not as many free blocks as a step takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no block of keys and values is free")]
pub struct NoBlocks;

impl SequenceState {
    /// A state that has seen nothing, with keys and values in blocks of `pool`.
    pub(crate) fn new(layers: Vec<LayerState>, pool: KvPool) -> Self {
        Self {
            len: 0,
            drafted: 0,
            layers,
            slot: None,
            blocks: Vec::new(),
            pool,
            others: Vec::new(),
        }
    }

    /// The same with what gated delta nets remember on a device.
    pub(crate) fn with_slot(mut self, slot: Option<Slot>) -> Self {
        self.slot = slot;
        self
    }

    /// What gated delta nets remember, where that is on a device.
    pub(crate) fn slot(&self) -> Option<&Slot> {
        self.slot.as_ref()
    }

    /// As [`Self::slot`], to be changed.
    pub(crate) fn slot_mut(&mut self) -> Option<&mut Slot> {
        self.slot.as_mut()
    }

    /// The same with room for what so many other ranks remember.
    pub(crate) fn shared_among(mut self, others: usize) -> Self {
        self.others.resize_with(others, || None);
        self
    }

    /// The part of another rank, for as long as it computes; none where the sequence has not begun.
    pub(crate) fn lend(&mut self, other: usize) -> Option<Self> {
        self.others.get_mut(other)?.take()
    }

    /// Takes the part of another rank back.
    pub(crate) fn give_back(&mut self, other: usize, part: Self) {
        debug_assert_eq!(part.len, self.len, "all ranks have seen the same tokens");
        self.others[other] = Some(part);
    }

    /// What each rank remembers, in their order.
    pub fn parts(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.others.iter().flatten())
    }

    /// Whether there was room for all of it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let own = self.slot.as_ref().is_none_or(Slot::is_whole);
        own && self.others.iter().flatten().all(Self::is_whole)
    }

    /// Tokens whose effect is in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has not begun.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block number `at` of all ranks, to be shared.
    ///
    /// # Panics
    /// When there are not as many.
    #[must_use]
    pub fn block(&self, at: usize) -> SharedBlock {
        let others = self.others.iter().flatten();
        SharedBlock {
            own: self.blocks[at].clone(),
            others: others.map(|part| part.blocks[at].clone()).collect(),
        }
    }

    /// Keys and values so far.
    #[must_use]
    pub fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }

    /// Blocks that a step over `rows` more tokens takes from the pool.
    #[must_use]
    pub fn wanted_blocks(&self, rows: usize) -> usize {
        let to = self.len + rows;
        self.shared_blocks(self.len, to).count()
            + KvShape::blocks(to).saturating_sub(self.blocks.len())
    }

    /// Sees to it that `rows` more tokens can be written: no block that somebody else reads is written to.
    ///
    /// # Errors
    /// When the pool has too few blocks.
    pub(crate) fn make_room(&mut self, rows: usize) -> Result<(), NoBlocks> {
        self.make_room_between(self.len, self.len + rows)
    }

    /// As [`Self::make_room`], for the drafting layer.
    ///
    /// # Errors
    /// When the pool has too few blocks.
    pub(crate) fn make_room_for_drafts(&mut self, rows: usize) -> Result<(), NoBlocks> {
        self.make_room_between(self.drafted, self.drafted + rows)
    }

    fn make_room_between(&mut self, from: usize, to: usize) -> Result<(), NoBlocks> {
        for at in self.shared_blocks(from, to).collect::<Vec<_>>() {
            self.blocks[at] = self.blocks[at].copied().ok_or(NoBlocks)?;
        }
        while self.blocks.len() < KvShape::blocks(to) {
            self.blocks.push(self.pool.take().ok_or(NoBlocks)?);
        }
        Ok(())
    }

    /// Which blocks of the tokens from `from` to `to` somebody else holds too.
    fn shared_blocks(&self, from: usize, to: usize) -> impl Iterator<Item = usize> {
        let end = KvShape::blocks(to).min(self.blocks.len());
        (from / BLOCK..end).filter(|at| Arc::strong_count(&self.blocks[*at]) > 1)
    }

    /// Takes the rows of the last step back but for the first `rows`, one at least. The step must have said that it may
    /// happen ([`Segment::revocable`](crate::model::Segment::revocable)) and had `of` rows.
    pub fn keep_rows(&mut self, rows: usize, of: usize) {
        self.len -= of - rows;
        self.drafted = self.drafted.min(self.len);
        for layer in &mut self.layers {
            if let LayerState::Delta(state) = layer {
                state.keep_rows(rows);
            }
        }
        if let Some(slot) = &mut self.slot {
            slot.keep_rows(rows, of);
        }
        for part in self.others.iter_mut().flatten() {
            part.keep_rows(rows, of);
        }
    }

    /// Takes back what the drafting layer guessed ahead of the sequence.
    pub fn follow(&mut self) {
        self.drafted = self.drafted.min(self.len);
        self.others.iter_mut().flatten().for_each(Self::follow);
    }

    /// Keys and values of a place and head so far, each `(tokens, dim)`.
    #[must_use]
    pub fn keys_and_values(&self, place: usize, head: usize) -> [Vec<f32>; 2] {
        let count = self.len * self.pool.shape().dim;
        let mut all = [Vec::new(), Vec::new()];
        for block in &self.blocks {
            for (all, part) in all.iter_mut().zip(block.both(place, head)) {
                all.extend(part);
            }
        }
        all.map(|mut numbers| {
            numbers.truncate(count);
            numbers
        })
    }

    /// What the gated delta net that is layer `layer` remembers; nothing where the layer is none.
    ///
    /// # Errors
    /// When they are on a device that fails.
    pub fn delta_state(&self, layer: usize) -> Result<Remembered, GpuError> {
        match (&self.layers[layer], &self.slot) {
            (LayerState::Delta(state), _) => Ok(Remembered {
                tail: state.conv.clone(),
                recurrent: state.recurrent.clone(),
            }),
            (LayerState::InSlot(place), Some(slot)) => slot.read(*place),
            _ => Ok(Remembered::default()),
        }
    }

    /// What the keys and values of one of its tokens are.
    #[must_use]
    pub fn kv_shape(&self) -> KvShape {
        self.pool.shape()
    }

    /// What its keys and values are held as.
    #[must_use]
    pub fn kv_numbers(&self) -> KvNumbers {
        self.pool.numbers()
    }

    /// Writes key and value of the token at `position`, for which [`Self::make_room`] has made room.
    pub(crate) fn put(
        &mut self,
        place: (usize, usize),
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        Arc::get_mut(&mut self.blocks[position / BLOCK])
            .expect("a block that is written to has one holder")
            .put(place, position % BLOCK, key, value);
    }

    /// What is needed to go on from here, sharing the blocks.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let partial =
            (!self.len.is_multiple_of(BLOCK)).then(|| self.blocks[self.len / BLOCK].clone());
        let others = self.others.iter();
        Snapshot {
            len: self.len,
            drafted: self.drafted,
            layers: self.layers.clone(),
            slot: self.slot.clone(),
            partial,
            pool: self.pool.clone(),
            others: others
                .map(|part| part.as_ref().map(Self::snapshot))
                .collect(),
        }
    }
}

/// The state of a sequence at one position, without its full blocks of keys and values.
#[derive(Debug, Clone)]
pub struct Snapshot {
    len: usize,
    drafted: usize,
    layers: Vec<LayerState>,
    slot: Option<Slot>,
    /// The block that is not full.
    partial: Option<Arc<Block>>,
    pool: KvPool,
    others: Vec<Option<Snapshot>>,
}

impl Snapshot {
    /// Tokens whose effect is in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is of a sequence that had not begun.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether there was room for all of it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let own = self.slot.as_ref().is_none_or(Slot::is_whole);
        own && self.others.iter().flatten().all(Self::is_whole)
    }

    /// Moves what it holds on devices to the host, from where it is gone on from as well, if not as fast. False where it is on
    /// the host, or could not be moved: then some of it may have gone.
    pub fn move_to_host(&mut self) -> bool {
        let own = self.slot.as_mut().is_some_and(Slot::move_to_host);
        let mut others = self.others.iter_mut().flatten();
        own && others.all(Self::move_to_host)
    }

    /// Bytes it holds beside its block, over all ranks.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let floats: usize = self
            .layers
            .iter()
            .map(|layer| match layer {
                LayerState::Attention(_) | LayerState::InSlot(_) => 0,
                LayerState::Delta(state) => state.conv.len() + state.recurrent.len(),
            })
            .sum();
        let floats = floats + self.slot.as_ref().map_or(0, Slot::floats);
        let others = self.others.iter().flatten().map(Self::bytes);
        4 * floats as u64 + others.sum::<u64>()
    }

    /// A sequence that goes on from here. `full` are the blocks before, all of them full. Whoever wants to go on from here again
    /// makes a copy first: states are large, and most have one use.
    #[must_use]
    pub fn resume(mut self, full: Vec<SharedBlock>) -> SequenceState {
        let others = std::mem::take(&mut self.others).into_iter().enumerate();
        let others = others.map(|(at, part)| {
            let blocks = full.iter().map(|block| block.others[at].clone());
            part.map(|part| part.resume_part(blocks.collect()))
        });
        let others = others.collect();
        SequenceState {
            others,
            ..self.resume_part(full.into_iter().map(|block| block.own).collect())
        }
    }

    fn resume_part(self, mut full: Vec<Arc<Block>>) -> SequenceState {
        debug_assert_eq!(full.len(), self.len / BLOCK, "every full block is there");
        full.extend(self.partial);
        SequenceState {
            len: self.len,
            drafted: self.drafted,
            layers: self.layers,
            slot: self.slot,
            blocks: full,
            pool: self.pool,
            others: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape {
        layers: 1,
        heads: 1,
        dim: 1,
    };

    fn write(state: &mut SequenceState, values: &[f32]) {
        state.make_room(values.len()).unwrap();
        for value in values {
            state.put((0, 0), state.len, &[*value], &[*value]);
            state.len += 1;
        }
    }

    fn read(state: &SequenceState) -> Vec<f32> {
        let [keys, values] = state.keys_and_values(0, 0);
        assert_eq!(keys, values);
        keys
    }

    #[test]
    fn those_who_go_on_from_a_snapshot_do_not_disturb_each_other() {
        for cut in [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK] {
            let pool = KvPool::new(SHAPE);
            pool.set_capacity(100);
            let head: Vec<f32> = (0..cut).map(|n| n as f32).collect();
            let mut first = SequenceState::new(vec![LayerState::Attention(0)], pool.clone());
            write(&mut first, &head);
            let snapshot = first.snapshot();
            let full = (0..cut / BLOCK).map(|at| first.block(at)).collect();
            let mut second = snapshot.clone().resume(full);
            write(&mut first, &[-1.0; 20]);
            write(&mut second, &[-2.0; 20]);
            assert_eq!(read(&first), [&head[..], &[-1.0; 20]].concat(), "{cut}");
            assert_eq!(read(&second), [&head[..], &[-2.0; 20]].concat(), "{cut}");
            drop((first, second, snapshot));
            assert_eq!(pool.out(), 0, "{cut}");
        }
    }

    #[test]
    fn the_blocks_it_says_it_wants_are_those_it_takes() {
        let pool = KvPool::new(SHAPE);
        pool.set_capacity(1000);
        let mut state = SequenceState::new(vec![LayerState::Attention(0)], pool.clone());
        let mut kept = Vec::new();
        for rows in [1, 3, 12, 1, 40, 16, 7] {
            for shared in [false, true] {
                if shared {
                    kept.push(state.snapshot());
                }
                let (wanted, before) = (state.wanted_blocks(rows), pool.out());
                write(&mut state, &vec![0.0; rows]);
                assert_eq!(pool.out() - before, wanted, "{rows} rows");
            }
        }
    }
}

//! What kernels have to know of a step beside the numbers: where each sequence's rows, state, keys and values are.

use crate::gpu::{Address, Arg, Buffer, Gpu, GpuError};
use crate::kernels::choose::{Pick, Rule};
use crate::memory::SequenceState;
use crate::memory::pool::{BLOCK, KvShape};
use crate::model::Batch;
use std::sync::{Arc, Mutex, PoisonError};

/// Sequences with more rows than this are read by the kernels for prompts.
pub(crate) const FEW_ROWS: usize = 8;

/// The tables of one step, on the device. They lie at the same places for steps of the same [shape](Shape).
#[derive(Debug, Clone)]
pub(crate) struct Step {
    buffer: Arc<Buffer>,
    pub(crate) shape: Shape,
    /// Sequences at the front that have few rows each, and the rows of all of them.
    pub(crate) few: (usize, usize),
    /// The most rows a sequence has.
    pub(crate) longest: usize,
    /// Which kind of place in a trail the step's states have, see [`Slot`](crate::memory::slot::Slot).
    pub(crate) trail_rows: usize,
    places: Places,
}

/// What the places of tables, and the grids of kernels, depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) segments: usize,
    /// Rows that need logits.
    pub(crate) wanted: usize,
    /// Blocks of keys and values there is room for in a sequence's table: a power of two.
    pub(crate) table_width: usize,
    /// How much there is to choose tokens by; nothing where logits are wanted.
    pub(crate) choices: Choices,
}

/// Sizes of the tables that tokens are chosen by.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Choices {
    /// Entries of a row of logits that may be chosen.
    pub(crate) allowed: usize,
    /// Rules, one for each row of logits.
    pub(crate) rules: usize,
    /// Edits of logits there is room for: none, or a power of two.
    pub(crate) edits: usize,
    /// The same of masks.
    pub(crate) masks: usize,
}

impl Choices {
    fn of(rules: &[Rule], allowed: usize) -> Self {
        let room = |count: usize| match count {
            0 => 0,
            count => count.next_power_of_two(),
        };
        Self {
            allowed,
            rules: rules.len(),
            edits: room(rules.iter().map(|rule| rule.edits.len()).sum()),
            masks: room(rules.iter().filter(|rule| rule.mask.is_some()).count()),
        }
    }

    /// Words of a mask.
    pub(crate) fn mask_words(&self) -> usize {
        self.allowed.div_ceil(u32::BITS as usize)
    }
}

/// Where tables begin in the buffer.
#[derive(Debug, Clone, Copy)]
struct Places {
    trails: usize,
    blocks: usize,
    picks: usize,
    starts: usize,
    row_segment: usize,
    positions: usize,
    ids: usize,
    wanted: usize,
    edits: usize,
    masks: usize,
    end: usize,
}

/// Words of an edit: row, id, divide, add.
const EDIT: usize = 4;

impl Shape {
    fn places(&self) -> Places {
        let (long, short) = (size_of::<u64>(), size_of::<u32>());
        let trails = self.segments * long;
        let blocks = trails + self.segments * long;
        let picks = blocks + self.segments * self.table_width * long;
        let starts = picks + self.choices.rules * size_of::<Pick>();
        let row_segment = starts + (self.segments + 1) * short;
        let positions = row_segment + self.rows * short;
        let ids = positions + self.rows * short;
        let wanted = ids + self.rows * short;
        let edits = wanted + self.wanted * short;
        let masks = edits + self.choices.edits * EDIT * short;
        Places {
            trails,
            blocks,
            picks,
            starts,
            row_segment,
            positions,
            ids,
            wanted,
            edits,
            masks,
            end: masks + self.choices.masks * self.choices.mask_words() * short,
        }
    }
}

/// The memory that tables of steps are written to; it grows, and then lies elsewhere.
#[derive(Debug, Default)]
pub(crate) struct StepMemory(Mutex<Option<Arc<Buffer>>>);

impl StepMemory {
    fn at_least(&self, gpu: &Gpu, bytes: usize) -> Result<Arc<Buffer>, GpuError> {
        const SMALLEST: usize = 1 << 20;
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some(buffer) if buffer.bytes() >= bytes => Ok(buffer.clone()),
            _ => {
                let bytes = bytes.next_power_of_two().max(SMALLEST);
                let buffer = Arc::new(gpu.buffer(bytes)?);
                *held = Some(buffer.clone());
                Ok(buffer)
            }
        }
    }
}

impl Step {
    /// Writes the tables of `batch`, whose sequences have seen `starts` tokens each and have room for the new ones. Where tokens
    /// are to be chosen there is a rule for each row that needs logits, of which so many first entries are allowed.
    pub(crate) fn new(
        gpu: &Gpu,
        memory: &StepMemory,
        batch: &Batch,
        starts: &[usize],
        states: &[&mut SequenceState],
        rules: Option<(&[Rule], usize)>,
    ) -> Result<Self, GpuError> {
        let (rules, allowed) = rules.unwrap_or_default();
        let segments = &batch.segments;
        let tables = segments.iter().map(|segment| {
            let seen = starts[segment.state] + segment.rows.len();
            KvShape::blocks(seen)
        });
        let wanted = batch.logit_rows();
        let shape = Shape {
            rows: batch.ids.len(),
            segments: segments.len(),
            wanted: wanted.len(),
            table_width: tables.max().unwrap_or(0).max(1).next_power_of_two(),
            choices: Choices::of(rules, allowed),
        };
        let places = shape.places();
        let mut longs: Vec<u64> = Vec::with_capacity(places.starts / 8);
        let states_of = || segments.iter().map(|segment| &*states[segment.state]);
        for state in states_of() {
            longs.push(match state.slot() {
                Some(slot) => slot.address()?,
                None => 0,
            });
        }
        longs.extend(states_of().map(|state| state.slot().map_or(0, |slot| slot.trail_address())));
        for state in states_of() {
            let blocks = state.blocks().iter();
            let end = longs.len() + shape.table_width;
            longs.extend(blocks.take(shape.table_width).map(|block| block.address()));
            longs.resize(end, 0);
        }
        let masks = rules.iter().filter_map(|rule| rule.mask.as_ref());
        let mut numbered = 0..;
        for rule in rules {
            let mask = rule.mask.as_ref().and_then(|_| numbered.next());
            let pick = Pick {
                mask: mask.unwrap_or(-1),
                ..rule.pick
            };
            longs.extend(bytemuck::cast::<Pick, [u64; size_of::<Pick>() / 8]>(pick));
        }
        let mut shorts: Vec<u32> = Vec::with_capacity((places.end - places.starts) / 4);
        let short = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        shorts.push(0);
        shorts.extend(segments.iter().map(|segment| short(segment.rows.end)));
        for (at, segment) in segments.iter().enumerate() {
            shorts.extend(segment.rows.clone().map(|_| short(at)));
        }
        for segment in segments {
            let first = starts[segment.state];
            shorts.extend((0..segment.rows.len()).map(|row| short(first + row)));
        }
        shorts.extend(&batch.ids);
        shorts.extend(wanted);
        for (row, rule) in rules.iter().enumerate() {
            for edit in &rule.edits {
                shorts.extend([
                    short(row),
                    edit.id,
                    edit.divide.to_bits(),
                    edit.add.to_bits(),
                ]);
            }
        }
        // what is left of the table is of no row
        shorts.resize((places.masks - places.starts) / size_of::<u32>(), u32::MAX);
        let words = shape.choices.mask_words();
        for mask in masks {
            let end = shorts.len() + words;
            shorts.extend(mask.iter().take(words));
            shorts.resize(end, 0);
        }
        shorts.resize((places.end - places.starts) / size_of::<u32>(), 0);
        let buffer = memory.at_least(gpu, places.end)?;
        let bytes = [
            bytemuck::cast_slice::<u64, u8>(&longs),
            bytemuck::cast_slice::<u32, u8>(&shorts),
        ]
        .concat();
        gpu.driver().upload(buffer.address(), &bytes)?;
        let few = segments
            .iter()
            .take_while(|segment| segment.rows.len() <= FEW_ROWS)
            .count();
        Ok(Self {
            buffer,
            shape,
            few: (
                few,
                few.checked_sub(1).map_or(0, |at| segments[at].rows.end),
            ),
            longest: segments
                .iter()
                .map(|segment| segment.rows.len())
                .max()
                .unwrap_or(0),
            trail_rows: states_of()
                .filter_map(|state| state.slot().map(|slot| slot.trail_rows()))
                .max()
                .unwrap_or(0),
            places,
        })
    }

    /// The device it is on.
    pub(crate) fn gpu(&self) -> &Gpu {
        self.buffer.gpu()
    }

    /// Where the tables are.
    pub(crate) fn address(&self) -> Address {
        self.buffer.address()
    }

    fn at(&self, place: usize) -> Arg {
        Arg::Address(self.buffer.address() + place as u64)
    }

    /// The address of each sequence's slot, from sequence `first` on.
    pub(super) fn slots(&self, first: usize) -> Arg {
        self.at(first * size_of::<u64>())
    }

    /// The address of each sequence's trail, or 0, from sequence `first` on.
    pub(super) fn trails(&self, first: usize) -> Arg {
        self.at(self.places.trails + first * size_of::<u64>())
    }

    /// The addresses of each sequence's blocks, from sequence `first` on.
    pub(super) fn blocks(&self, first: usize) -> Arg {
        self.at(self.places.blocks + first * self.shape.table_width * size_of::<u64>())
    }

    /// Where each sequence's rows begin, from sequence `first` on, and where the last one's end.
    pub(super) fn starts(&self, first: usize) -> Arg {
        self.at(self.places.starts + first * size_of::<u32>())
    }

    /// The sequence of each row.
    pub(super) fn row_segment(&self) -> Arg {
        self.at(self.places.row_segment)
    }

    /// The position of each row in its sequence.
    pub(super) fn positions(&self) -> Arg {
        self.at(self.places.positions)
    }

    /// The token of each row.
    pub(super) fn ids(&self) -> Arg {
        self.at(self.places.ids)
    }

    /// The rows that need logits.
    pub(super) fn wanted(&self) -> Arg {
        self.at(self.places.wanted)
    }

    /// How the token of each row of logits is chosen.
    pub(super) fn picks(&self) -> Arg {
        self.at(self.places.picks)
    }

    /// The changes of logits.
    pub(super) fn edits(&self) -> Arg {
        self.at(self.places.edits)
    }

    /// The masks of tokens.
    pub(super) fn masks(&self) -> Arg {
        self.at(self.places.masks)
    }

    /// Tokens there is room for in the longest sequence's table.
    pub(super) fn context(&self) -> usize {
        self.shape.table_width * BLOCK
    }
}

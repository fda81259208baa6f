//! One forward step as the model sees it: flat rows, cut into one segment per sequence.

use std::ops::Range;

/// The tokens of one step over any number of sequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all segments, one after another.
    pub ids: Vec<u32>,
    /// Which rows belong to which sequence; in the order of `ids`, without gaps.
    pub segments: Vec<Segment>,
}

/// The rows of one sequence in a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Which of the states passed to `forward` this sequence's state is.
    pub state: usize,
    /// Its rows in [`Batch::ids`].
    pub rows: Range<usize>,
    /// Which of its rows need logits.
    pub logits: LogitRows,
    /// Whether the state must be able to go back to the place after any of them, see
    /// [`SequenceState::keep_rows`](crate::memory::SequenceState::keep_rows).
    pub revocable: bool,
}

/// Which rows of a segment need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a piece of a prompt that has more to come.
    None,
    /// The last row alone.
    Last,
    /// Every row.
    All,
}

impl Batch {
    /// A batch of one sequence, whose state is the first.
    #[must_use]
    pub fn single(ids: &[u32], logits: LogitRows) -> Self {
        let mut batch = Self::default();
        batch.push(0, ids, logits);
        batch
    }

    /// Adds the rows `ids` of the sequence whose state is `state`.
    pub fn push(&mut self, state: usize, ids: &[u32], logits: LogitRows) {
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.segments.push(Segment {
            state,
            rows: start..self.ids.len(),
            logits,
            revocable: false,
        });
    }

    /// As [`Self::push`], with logits of every row, for rows some of which may be taken back.
    pub fn push_revocable(&mut self, state: usize, ids: &[u32]) {
        self.push(state, ids, LogitRows::All);
        if let Some(segment) = self.segments.last_mut() {
            segment.revocable = true;
        }
    }

    /// The rows that need logits, in order: the rows of the tensor that `forward` returns.
    #[must_use]
    pub fn logit_rows(&self) -> Vec<u32> {
        self.segments
            .iter()
            .flat_map(|segment| match segment.logits {
                LogitRows::None => 0..0,
                LogitRows::Last => segment.rows.end - 1..segment.rows.end,
                LogitRows::All => segment.rows.clone(),
            })
            .map(|row| u32::try_from(row).expect("a batch has fewer rows than u32 counts"))
            .collect()
    }
}

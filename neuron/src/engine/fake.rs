//! A model for tests: its next token is a fixed function of the tokens so far, or what the test scripted.

use crate::kernels::rows::Rows;
use crate::memory::pool::{BLOCK, KvPool, KvShape};
use crate::memory::{DeltaState, LayerState, SequenceState};
use crate::model::{Batch, CausalLm, Drafted, LogitRows, ModelError, Probe, Seen};
use candle_core::{DType, Device, Tensor};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// Entries of a row of logits: more than the tiny tokenizer's 512, as in real models.
pub(crate) const VOCAB: usize = 520;

/// What the next token is.
#[derive(Clone)]
pub(crate) enum Script {
    /// A hash of all tokens so far chooses smooth logits.
    Hash,
    /// After the first `prompt` tokens, these, and then the last of them for ever.
    Say { prompt: usize, tokens: Vec<u32> },
    /// Like `Hash`, but NaN for sequences that begin with this token.
    NanFor(u32),
    /// The step after so many fails.
    FailAfter(usize),
    /// The step after so many panics.
    PanicAfter(usize),
}

/// Lets a test hold the model at the beginning of each step.
#[derive(Default)]
pub(crate) struct Gate {
    steps: Mutex<Option<usize>>,
    changed: Condvar,
}

impl Gate {
    /// A gate that lets `steps` steps through.
    pub(crate) fn closed_after(steps: usize) -> Arc<Self> {
        Arc::new(Self {
            steps: Mutex::new(Some(steps)),
            changed: Condvar::new(),
        })
    }

    /// Lets `steps` more steps through.
    pub(crate) fn let_through(&self, steps: usize) {
        if let Some(left) = self.steps.lock().unwrap().as_mut() {
            *left += steps;
        }
        self.changed.notify_all();
    }

    /// Lets everything through.
    pub(crate) fn open(&self) {
        *self.steps.lock().unwrap() = None;
        self.changed.notify_all();
    }

    /// Waits until the next step may pass.
    pub(crate) fn pass(&self) {
        let mut steps = self.steps.lock().unwrap();
        loop {
            match steps.as_mut() {
                None => return,
                Some(0) => steps = self.changed.wait(steps).unwrap(),
                Some(left) => {
                    *left -= 1;
                    return;
                }
            }
        }
    }
}

pub(crate) struct FakeModel {
    pub(crate) script: Script,
    pub(crate) gate: Arc<Gate>,
    pub(crate) context: usize,
    /// What it says that a state takes beside its blocks.
    pub(crate) fixed: u64,
    /// What it says that a row takes of a step that can be taken back.
    pub(crate) trail: u64,
    /// The most that such steps took since its bounds were last set.
    pub(crate) trails: AtomicU64,
    /// Steps run so far.
    pub(crate) steps: Arc<AtomicUsize>,
    /// Tokens computed so far.
    pub(crate) rows: Arc<AtomicUsize>,
    pub(crate) pool: KvPool,
    /// Dropped with the model.
    #[expect(dead_code, reason = "held to be dropped, never used")]
    pub(crate) dropped: Option<Box<dyn std::any::Any + Send>>,
}

impl FakeModel {
    pub(crate) fn new(script: Script) -> Self {
        Self {
            script,
            gate: Arc::default(),
            context: 4096,
            fixed: 0,
            trail: 0,
            trails: AtomicU64::new(0),
            steps: Arc::default(),
            rows: Arc::default(),
            pool: KvPool::new(KvShape {
                layers: 1,
                heads: 1,
                dim: 1,
            }),
            dropped: None,
        }
    }

    fn row(&self, tokens: &[u32]) -> Vec<f32> {
        let mut row = vec![0.0; VOCAB];
        if let Script::Say {
            prompt,
            tokens: say,
        } = &self.script
        {
            let next = say[(tokens.len() - prompt).min(say.len() - 1)];
            row[next as usize] = 50.0;
            return row;
        }
        if matches!(self.script, Script::NanFor(first) if tokens[0] == first) {
            return vec![f32::NAN; VOCAB];
        }
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for token in tokens {
            hash = (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3);
        }
        for (id, value) in row.iter_mut().enumerate() {
            let mixed = (hash ^ (id as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
                .wrapping_mul(0xff51_afd7_ed55_8ccd);
            *value = (mixed >> 40) as f32 / (1 << 22) as f32;
        }
        // Nothing that ends or is special, and the tail is the likeliest of all: it must never be sampled.
        row[479..512].fill(-10.0);
        row[512..].fill(100.0);
        row
    }
}

impl CausalLm for FakeModel {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn context_length(&self) -> usize {
        self.context
    }

    fn weight_bytes(&self) -> u64 {
        1000
    }

    /// A byte a token, so it says.
    fn state_bytes(&self, tokens: usize) -> u64 {
        self.fixed + (KvShape::blocks(tokens) * BLOCK) as u64
    }

    fn trail_bytes(&self, rows: usize) -> u64 {
        rows as u64 * self.trail
    }

    fn trails_held(&self) -> u64 {
        self.trails.load(Ordering::SeqCst)
    }

    fn pool(&self) -> &KvPool {
        &self.pool
    }

    fn bound_blocks(&self, blocks: usize) {
        self.pool.set_capacity(blocks);
        self.trails.store(0, Ordering::SeqCst);
    }

    fn drafts(&self) -> bool {
        true
    }

    /// It keeps the tokens it has seen, half of its memory in either kind of layer.
    fn new_state(&self) -> SequenceState {
        let seen = DeltaState {
            conv: Vec::new(),
            recurrent: Vec::new(),
            trail: None,
        };
        let layers = vec![LayerState::Delta(seen), LayerState::Attention(0)];
        SequenceState::new(layers, self.pool.clone())
    }

    fn forward_probed(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError> {
        self.gate.pass();
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        match self.script {
            Script::FailAfter(steps) if step >= steps => {
                return Err(candle_core::Error::Msg("a planted fault".into()).into());
            }
            Script::PanicAfter(steps) if step >= steps => panic!("a planted panic"),
            _ => {}
        }
        let mut rows = Vec::new();
        let trails = batch.segments.iter().filter(|segment| segment.revocable);
        let trails = trails.map(|segment| self.trail_bytes(segment.rows.len()));
        self.trails.fetch_max(trails.sum(), Ordering::SeqCst);
        for segment in &batch.segments {
            let state = &mut *states[segment.state];
            state.make_room(segment.rows.len())?;
            self.rows.fetch_add(segment.rows.len(), Ordering::SeqCst);
            let kept = state.len;
            if let LayerState::Delta(delta) = &mut state.layers[0] {
                delta.recurrent.truncate(kept); // rows that were taken back
            }
            for (at, &token) in batch.ids[segment.rows.clone()].iter().enumerate() {
                let token = token as f32;
                state.put((0, 0), state.len, &[token], &[token]);
                state.len += 1;
                let [kept, _] = state.keys_and_values(0, 0);
                let LayerState::Delta(delta) = &mut state.layers[0] else {
                    unreachable!("the fake makes its own states");
                };
                delta.recurrent.push(token);
                assert_eq!(
                    delta.recurrent, kept,
                    "both kinds of layer saw the same tokens"
                );
                let last = at + 1 == segment.rows.len();
                if segment.logits == LogitRows::All || (segment.logits == LogitRows::Last && last) {
                    let seen: Vec<u32> = kept.iter().map(|token| *token as u32).collect();
                    rows.extend(self.row(&seen));
                }
            }
        }
        let hidden = batch.ids.iter().map(|id| *id as f32).collect();
        let hidden = Tensor::from_vec(hidden, (batch.ids.len(), 1), &Device::Cpu)?;
        probe(Seen::Final, &Rows::Host(hidden));
        logits(rows)
    }

    /// Guesses what is scripted right. Of hashed tokens every third guess is wrong, and the one after it seldom right.
    fn draft(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        states: &mut [&mut SequenceState],
    ) -> Option<Result<Drafted, ModelError>> {
        assert_eq!(hidden.dims(), [batch.ids.len(), 1]);
        let mut rows = Vec::new();
        for segment in &batch.segments {
            let state = &mut *states[segment.state];
            if state.drafted < state.len {
                let gap = state.len - state.drafted;
                assert_eq!(gap, segment.rows.len(), "no token is left out");
            }
            if let Err(error) = state.make_room_for_drafts(segment.rows.len()) {
                return Some(Err(error.into()));
            }
            state.drafted += segment.rows.len();
            if segment.logits == LogitRows::Last {
                let [seen, _] = state.keys_and_values(0, 0);
                let seen = seen.into_iter().map(|token| token as u32);
                let seen: Vec<u32> = seen.chain([batch.ids[segment.rows.end - 1]]).collect();
                let mut row = self.row(&seen);
                if matches!(self.script, Script::Hash) && seen.len().is_multiple_of(3) {
                    row[100] = 99.0;
                }
                rows.extend(row);
            }
        }
        let hidden = Tensor::zeros((rows.len() / VOCAB, 1), DType::F32, &Device::Cpu);
        Some((|| {
            Ok(Drafted {
                logits: logits(rows)?,
                hidden: hidden?,
            })
        })())
    }
}

fn logits(rows: Vec<f32>) -> Result<Tensor, ModelError> {
    let count = rows.len() / VOCAB;
    Ok(Tensor::from_vec(rows, (count, VOCAB), &Device::Cpu)?)
}

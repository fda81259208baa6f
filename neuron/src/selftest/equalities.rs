//! What has to be the same whatever way a model is asked: whole = in pieces = token by token, alone = in a batch, gone on
//! from a saved state = never interrupted, taken back = never guessed.

use crate::kernels::argmax;
use crate::kernels::choose::{Edit, Pick, Rule};
use crate::memory::SequenceState;
use crate::model::{Batch, CausalLm, LogitRows, ModelError};

/// Tokens of the prompts; the last reaches over several blocks.
const LENGTHS: [usize; 5] = [1, 9, 16, 37, 75];
/// Tokens that each is continued by.
const ANSWER: usize = 6;

/// One way of asking against another.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Equality {
    /// What was compared.
    pub what: String,
    /// Largest difference of any logit.
    pub difference: f32,
    /// Whether the likeliest tokens were the same wherever one was ahead of all others by more than that.
    pub same_tokens: bool,
}

/// Compares all ways.
///
/// # Errors
/// When the model fails.
pub fn compare(model: &dyn CausalLm) -> Result<Vec<Equality>, ModelError> {
    let prompts: Vec<Vec<u32>> = (0u32..)
        .zip(LENGTHS)
        .map(|(seed, length)| prompt(model, seed, length))
        .collect();
    let alone: Vec<Trace> = prompts
        .iter()
        .map(|prompt| answer(model, prompt, prompt.len()))
        .collect::<Result<_, _>>()?;
    let mut found = Vec::new();
    for piece in [1, 5, 16, 64] {
        for (prompt, alone) in prompts.iter().zip(&alone) {
            let pieces = answer(model, prompt, piece)?;
            let what = format!("{} tokens in pieces of {piece}", prompt.len());
            found.push(alone.against(&pieces, what));
        }
    }
    for (length, (batched, alone)) in LENGTHS
        .iter()
        .zip(together(model, &prompts)?.iter().zip(&alone))
    {
        let what = format!("{length} tokens beside others");
        found.push(alone.against(batched, what));
    }
    for (prompt, alone) in prompts.iter().zip(&alone) {
        for way in [Way::Likeliest, Way::Chance, Way::Filtered, Way::Changed] {
            found.push(chosen(model, prompt, way)?);
        }
        for on_host in [false, true] {
            let resumed = resumed(model, prompt, on_host)?;
            let place = if on_host {
                ", which was on the host"
            } else {
                ""
            };
            let what = format!("{} tokens, gone on from a saved state{place}", prompt.len());
            found.push(alone.against(&resumed, what));
        }
        let revoked = revoked(model, prompt, &alone.tokens)?;
        let what = format!("{} tokens, guesses taken back", prompt.len());
        found.push(alone.against(&revoked, what));
    }
    Ok(found)
}

/// Logits after a prompt and after each token that was chosen by them.
struct Trace {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

impl Trace {
    /// What `other` has that this one has not.
    fn against(&self, other: &Self, what: String) -> Equality {
        let mut difference = 0f32;
        for (own, other) in self.logits.iter().zip(&other.logits) {
            for (a, b) in own.iter().zip(other) {
                let apart = (a - b).abs();
                // no number is as far away as can be
                difference = if apart.is_nan() {
                    f32::INFINITY
                } else {
                    difference.max(apart)
                };
            }
        }
        let clear = |logits: &[f32]| {
            let top = logits[top(logits) as usize];
            logits
                .iter()
                .filter(|logit| top - **logit <= 2.0 * difference)
                .count()
                == 1
        };
        let steps = self
            .logits
            .iter()
            .zip(self.tokens.iter().zip(&other.tokens));
        let mut same = steps.map(|(logits, (own, other))| own == other || !clear(logits));
        Equality {
            what,
            difference,
            same_tokens: self.logits.len() == other.logits.len() && same.all(|one| one),
        }
    }
}

fn prompt(model: &dyn CausalLm, seed: u32, length: usize) -> Vec<u32> {
    let entries = model.vocab_size().max(1) as u32;
    let token = |at: u32| (at * 7919 + seed * 104_729 + at * at * 31) % entries;
    (0..length as u32).map(token).collect()
}

fn top(logits: &[f32]) -> u32 {
    argmax(logits).unwrap_or(0) as u32
}

fn rows(logits: &candle_core::Tensor) -> Result<Vec<Vec<f32>>, ModelError> {
    Ok(logits.to_vec2()?)
}

/// Reads the prompt in pieces and writes an answer.
fn answer(model: &dyn CausalLm, prompt: &[u32], piece: usize) -> Result<Trace, ModelError> {
    let mut state = model.new_state();
    let mut last = Vec::new();
    for piece in prompt.chunks(piece) {
        let batch = Batch::single(piece, LogitRows::Last);
        last = rows(&model.forward(&batch, &mut [&mut state])?)?.remove(0);
    }
    go_on(model, &mut state, last)
}

/// Writes an answer from where the state is.
fn go_on(
    model: &dyn CausalLm,
    state: &mut SequenceState,
    first: Vec<f32>,
) -> Result<Trace, ModelError> {
    let mut trace = Trace {
        tokens: Vec::new(),
        logits: vec![first],
    };
    loop {
        let token = top(trace.logits.last().expect("there is a first"));
        trace.tokens.push(token);
        if trace.tokens.len() == ANSWER {
            return Ok(trace);
        }
        let batch = Batch::single(&[token], LogitRows::Last);
        let logits = model.forward(&batch, &mut [&mut *state])?;
        trace.logits.push(rows(&logits)?.remove(0));
    }
}

/// All prompts at once: a new one begins in every step, whose rows stand behind those of the sequences that write already.
fn together(model: &dyn CausalLm, prompts: &[Vec<u32>]) -> Result<Vec<Trace>, ModelError> {
    let mut states: Vec<SequenceState> = prompts.iter().map(|_| model.new_state()).collect();
    let mut traces: Vec<Trace> = prompts
        .iter()
        .map(|_| Trace {
            tokens: Vec::new(),
            logits: Vec::new(),
        })
        .collect();
    for step in 0.. {
        let mut batch = Batch::default();
        let mut at_work = Vec::new();
        for (index, trace) in traces.iter().enumerate().take(step) {
            if trace.tokens.len() < ANSWER {
                let token = *trace.tokens.last().expect("it has been read");
                batch.push(index, &[token], LogitRows::Last);
                at_work.push(index);
            }
        }
        if let Some(prompt) = prompts.get(step) {
            batch.push(step, prompt, LogitRows::Last);
            at_work.push(step);
        }
        if at_work.is_empty() {
            break;
        }
        let mut lent: Vec<&mut SequenceState> = states.iter_mut().collect();
        let logits = rows(&model.forward(&batch, &mut lent)?)?;
        for (index, logits) in at_work.into_iter().zip(logits) {
            traces[index].tokens.push(top(&logits));
            traces[index].logits.push(logits);
        }
    }
    Ok(traces)
}

/// A kind of rule that tokens are chosen by.
#[derive(Debug, Clone, Copy)]
enum Way {
    Likeliest,
    /// Each as often as the model says.
    Chance,
    /// Among the likelier ones.
    Filtered,
    /// Among those that a mask allows, with changed logits.
    Changed,
}

impl Way {
    /// The rule of the token at `step`, of `entries`.
    fn rule(self, step: usize, entries: usize) -> Rule {
        let random = (step as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let pick = match self {
            Self::Likeliest => Pick::LIKELIEST,
            Self::Chance => Pick::by_chance(1.5, 0, 1.0, 0.0, random),
            Self::Filtered => Pick::by_chance(2.0, 50, 0.9, 0.01, random),
            Self::Changed => Pick::by_chance(3.0, 0, 0.95, 0.0, random),
        };
        if !matches!(self, Self::Changed) {
            return Rule {
                pick,
                ..Rule::likeliest()
            };
        }
        let edit = |at: usize| Edit {
            id: (at * 7 % entries) as u32,
            divide: 1.0 + at as f32 / 10.0,
            add: if at == 3 {
                f32::NEG_INFINITY
            } else {
                0.1 * at as f32
            },
        };
        Rule {
            // as many as steps before have made, so that tables have other sizes
            edits: (0..(2 * step + 1).min(entries / 7)).map(edit).collect(),
            mask: Some(vec![0x5a5a_ff0f; entries.div_ceil(40)]), // and nothing behind it
            pick,
        }
    }
}

/// Tokens that the model chooses, against those that the same rules choose on the host of its logits.
fn chosen(model: &dyn CausalLm, prompt: &[u32], way: Way) -> Result<Equality, ModelError> {
    let allowed = model.vocab_size() - 1; // the last is past the tokenizer
    let (mut state, mut other) = (model.new_state(), model.new_state());
    let mut next = prompt.to_vec();
    let mut same_tokens = true;
    for step in 0..ANSWER {
        let batch = Batch::single(&next, LogitRows::Last);
        let rule = way.rule(step, allowed);
        let mut logits = rows(&model.forward(&batch, &mut [&mut state])?)?.remove(0);
        let expected = rule.choose(&mut logits[..allowed]);
        let found = model.forward_chosen(&batch, &mut [&mut other], &[rule], allowed)?;
        same_tokens &= found == [expected];
        next = vec![expected.unwrap_or(0)];
    }
    Ok(Equality {
        what: format!("{} tokens, chosen by the model: {way:?}", prompt.len()),
        difference: 0.0,
        same_tokens,
    })
}

/// Saves the state before the prompt's last token, goes on elsewhere from it, and only then answers from the saved one.
/// With `on_host` it is moved there meanwhile, where the model is on a device.
fn resumed(model: &dyn CausalLm, prompt: &[u32], on_host: bool) -> Result<Trace, ModelError> {
    let (head, last) = prompt.split_at(prompt.len() - 1);
    let mut first = model.new_state();
    for piece in head.chunks(head.len().max(1)) {
        model.forward(&Batch::single(piece, LogitRows::None), &mut [&mut first])?;
    }
    let mut snapshot = first.snapshot();
    if on_host {
        let moved = snapshot.move_to_host();
        debug_assert_eq!(moved, model.pool().is_on_device());
    }
    let full = head.len() / crate::memory::pool::BLOCK;
    let blocks = (0..full).map(|at| first.block(at)).collect();
    let other = [last, last, last].concat();
    model.forward(&Batch::single(&other, LogitRows::None), &mut [&mut first])?;
    drop(first);
    let mut state = snapshot.clone().resume(blocks); // copies are on the device
    let logits = model.forward(&Batch::single(last, LogitRows::Last), &mut [&mut state])?;
    go_on(model, &mut state, rows(&logits)?.remove(0))
}

/// Feeds the right answer with wrong guesses behind it, one to three rows of which are kept.
fn revoked(model: &dyn CausalLm, prompt: &[u32], answer: &[u32]) -> Result<Trace, ModelError> {
    let mut state = model.new_state();
    let logits = model.forward(&Batch::single(prompt, LogitRows::Last), &mut [&mut state])?;
    let mut trace = Trace {
        tokens: Vec::new(),
        logits: rows(&logits)?,
    };
    let entries = model.vocab_size() as u32;
    for (round, keep) in [1usize, 2, 3, 1].into_iter().enumerate() {
        let from = trace.logits.len() - 1;
        let left = (ANSWER - 1 - from).min(keep);
        if left == 0 {
            break;
        }
        let mut ids = answer[from..from + left].to_vec();
        ids.extend((0..3).map(|guess| (answer[from] + 17 + guess + round as u32) % entries));
        let mut batch = Batch::default();
        batch.push_revocable(0, &ids);
        let logits = rows(&model.forward(&batch, &mut [&mut state])?)?;
        trace.logits.extend(logits.into_iter().take(left));
        state.keep_rows(left, ids.len());
    }
    trace.tokens = trace.logits.iter().map(|logits| top(logits)).collect();
    Ok(trace)
}

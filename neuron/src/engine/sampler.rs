//! Logits → one token id.

use crate::kernels::argmax;
use crate::text::grammar::Mask;
use crate::text::output::Scored;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

/// Most tokens whose log probabilities are given at each place.
pub const MOST_LOGPROBS: u64 = 20;

/// How to choose tokens, as asked for; [`SamplingFields::checked`] makes [`SamplingParams`] of it.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingFields {
    /// Zero is greedy.
    pub temperature: f64,
    /// Keep the k likeliest tokens; 0 and -1 keep all.
    pub top_k: i64,
    /// Keep the likeliest tokens that together have this share; 1 keeps all.
    pub top_p: f64,
    /// Drop tokens below this share of the likeliest; 0 keeps all.
    pub min_p: f64,
    /// The same seed makes the same choices.
    pub seed: u64,
    /// Taken off tokens the answer has.
    pub presence_penalty: f64,
    /// Taken off as often as the answer has them.
    pub frequency_penalty: f64,
    /// Divides the logits of tokens that prompt or answer have; 1 changes nothing.
    pub repetition_penalty: f64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f64)>,
    /// The answer has at least so many tokens.
    pub min_tokens: u64,
    /// Give the log probability of each token, and of so many of the likeliest.
    pub logprobs: Option<u64>,
}

impl Default for SamplingFields {
    /// Plain sampling: every token as often as the model says.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            logprobs: None,
        }
    }
}

impl SamplingFields {
    /// The same, with every value in range.
    ///
    /// # Errors
    /// When one is not.
    pub fn checked(self) -> Result<SamplingParams, OutOfRange> {
        let check = |fits: bool, field, range| {
            if fits {
                Ok(())
            } else {
                Err(OutOfRange { field, range })
            }
        };
        let penalty = -2.0..=2.0;
        check(
            (0.0..=2.0).contains(&self.temperature),
            "temperature",
            "0 to 2",
        )?;
        check(self.top_k >= -1, "top_k", "-1 or more")?;
        check(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            "above 0 and at most 1",
        )?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", "0 to 1")?;
        check(
            penalty.contains(&self.presence_penalty),
            "presence_penalty",
            "-2 to 2",
        )?;
        check(
            penalty.contains(&self.frequency_penalty),
            "frequency_penalty",
            "-2 to 2",
        )?;
        check(
            self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0,
            "repetition_penalty",
            "above 0 and at most 10",
        )?;
        let bias = -100.0..=100.0;
        check(
            self.logit_bias.iter().all(|(_, by)| bias.contains(by)),
            "logit_bias",
            "numbers from -100 to 100 by token id",
        )?;
        check(
            self.logprobs.is_none_or(|count| count <= MOST_LOGPROBS),
            "top_logprobs",
            "0 to 20",
        )?;
        Ok(SamplingParams { asked: self })
    }
}

/// How to choose tokens. Only [`SamplingFields::checked`] makes one, so its values are always in range.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    asked: SamplingFields,
}

impl SamplingParams {
    /// Always the likeliest token.
    #[must_use]
    pub fn greedy() -> Self {
        let fields = SamplingFields {
            temperature: 0.0,
            ..SamplingFields::default()
        };
        fields.checked().expect("each value is in range")
    }

    /// The same with another seed: the way another answer to the same request is drawn.
    #[must_use]
    pub fn with_seed_moved_by(&self, by: u64) -> Self {
        let mut other = self.clone();
        other.asked.seed = other.asked.seed.wrapping_add(by);
        other
    }

    /// The answer has at least so many tokens.
    #[must_use]
    pub fn min_tokens(&self) -> u64 {
        self.asked.min_tokens
    }
}

/// A value out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` must be {range}")]
pub struct OutOfRange {
    /// The field at fault, as requests spell it.
    pub field: &'static str,
    /// What it may be.
    pub range: &'static str,
}

/// The logits hold no number to choose by: the computation that made them went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model computed logits that are not numbers")]
pub struct NotANumber;

/// Scores `token` and the `top` likeliest under `logits`.
///
/// # Errors
/// [`NotANumber`] when the logits hold something else.
pub fn score(logits: &[f32], token: u32, top: usize) -> Result<Scored, NotANumber> {
    let scored = Place::of(logits, top).scored(token, logits[token as usize]);
    if scored.logprob.is_nan() {
        return Err(NotANumber);
    }
    Ok(scored)
}

/// What is known of a row of logits before anything in it is changed.
struct Place {
    /// Log of the sum of all weights.
    total: f32,
    top: Vec<(u32, f32)>,
}

impl Place {
    fn of(logits: &[f32], top_count: usize) -> Self {
        let peak = argmax(logits).map_or(0.0, |best| logits[best]);
        let sum: f64 = logits
            .iter()
            .map(|logit| f64::from((logit - peak).exp()))
            .sum();
        let total = peak + sum.ln() as f32;
        let mut top = top(logits, top_count).into_sorted_vec();
        top.reverse();
        let top = top
            .into_iter()
            .map(|next| (id(next.id), next.logit - total));
        Self {
            total,
            top: top.collect(),
        }
    }

    fn scored(self, token: u32, logit: f32) -> Scored {
        Scored {
            token,
            logprob: logit - self.total,
            top: self.top,
        }
    }
}

/// A token that was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Which.
    pub token: u32,
    /// Its log probability, if asked for.
    pub scored: Option<Scored>,
}

/// What bears on the next token beside logits and parameters.
#[derive(Default)]
pub struct Bounds<'a> {
    /// Takes the place of a choice.
    pub forced: Option<u32>,
    /// What a grammar allows.
    pub mask: Option<Mask>,
    /// Tokens that end the answer: impossible before it has its least length.
    pub ends: &'a [u32],
}

/// Chooses the tokens of one answer, and remembers those it has for the penalties.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// Ids of the prompt, each once; only where they matter.
    prompt: Vec<u32>,
    counts: HashMap<u32, u32>,
    drawn: u64,
}

impl Sampler {
    /// A sampler at the beginning of an answer to `prompt`.
    #[must_use]
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let mut ids = Vec::new();
        if params.asked.repetition_penalty != 1.0 {
            ids = prompt.to_vec();
            ids.sort_unstable();
            ids.dedup();
        }
        Self {
            params,
            prompt: ids,
            counts: HashMap::new(),
            drawn: 0,
        }
    }

    /// How many of the likeliest tokens are wanted at each place of a scored prompt.
    #[must_use]
    pub fn top_count(&self) -> usize {
        usize::try_from(self.params.asked.logprobs.unwrap_or(0)).unwrap_or(0)
    }

    /// Whether the next token is the likeliest as the logits are, and nothing else is asked of them.
    #[must_use]
    pub fn takes_the_likeliest(&self) -> bool {
        let asked = &self.params.asked;
        (asked.temperature == 0.0 || asked.top_k == 1)
            && asked.logprobs.is_none()
            && asked.repetition_penalty == 1.0
            && asked.presence_penalty == 0.0
            && asked.frequency_penalty == 0.0
            && asked.logit_bias.is_empty()
            && self.drawn >= asked.min_tokens
    }

    /// Takes in a token that was chosen elsewhere, as [`Self::next`] would have.
    pub fn took(&mut self, token: u32) {
        self.drawn += 1;
        *self.counts.entry(token).or_default() += 1;
    }

    /// Chooses the next token. The choice depends on the arguments, the parameters and the answer so far alone.
    ///
    /// `logits` are those of the ids that may be sampled: the tail past the tokenizer is cut off by the caller. They are
    /// changed in place.
    ///
    /// # Errors
    /// [`NotANumber`] when no logit is finite.
    pub fn next(&mut self, logits: &mut [f32], bounds: Bounds<'_>) -> Result<Choice, NotANumber> {
        if logits.iter().any(|logit| logit.is_nan()) {
            return Err(NotANumber);
        }
        let place = self
            .params
            .asked
            .logprobs
            .map(|_| Place::of(logits, self.top_count()));
        let mut before = Vec::new();
        let token = match bounds.forced {
            Some(token) => token,
            None => {
                self.change(logits, place.is_some().then_some(&mut before));
                if self.drawn < self.params.asked.min_tokens {
                    for end in bounds.ends {
                        if let Some(logit) = logits.get_mut(*end as usize) {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
                if let Some(mask) = bounds.mask {
                    mask.apply(logits);
                }
                draw(logits, &self.params.asked, self.drawn)?
            }
        };
        self.took(token);
        let scored = place.map(|place| {
            let changed = before.iter().find(|(id, _)| *id == token);
            let logit = changed.map_or_else(|| logits[token as usize], |(_, logit)| *logit);
            place.scored(token, logit)
        });
        Ok(Choice { token, scored })
    }

    /// Penalties and bias. `before` gets what they changed, as it was.
    fn change(&self, logits: &mut [f32], mut before: Option<&mut Vec<(u32, f32)>>) {
        let asked = &self.params.asked;
        let mut change = |id: u32, to: &dyn Fn(f32) -> f32| {
            let Some(logit) = logits.get_mut(id as usize) else {
                return;
            };
            if let Some(before) = before.as_deref_mut() {
                before.push((id, *logit));
            }
            *logit = to(*logit);
        };
        if asked.repetition_penalty != 1.0 {
            let by = asked.repetition_penalty as f32;
            let answer = self.counts.keys();
            let answer = answer.filter(|id| self.prompt.binary_search(id).is_err());
            for &id in self.prompt.iter().chain(answer) {
                change(id, &|logit| {
                    if logit > 0.0 { logit / by } else { logit * by }
                });
            }
        }
        let (presence, frequency) = (
            asked.presence_penalty as f32,
            asked.frequency_penalty as f32,
        );
        if presence != 0.0 || frequency != 0.0 {
            for (&id, &count) in &self.counts {
                change(id, &|logit| logit - presence - frequency * count as f32);
            }
        }
        for &(id, by) in &asked.logit_bias {
            change(id, &|logit| logit + by as f32);
        }
    }
}

/// The `counter`-th choice of a request among `logits`.
fn draw(logits: &[f32], params: &SamplingFields, counter: u64) -> Result<u32, NotANumber> {
    let best = argmax(logits).ok_or(NotANumber)?;
    if params.temperature == 0.0 || params.top_k == 1 {
        return Ok(id(best));
    }
    let peak = logits[best];
    let scale = 1.0 / params.temperature as f32;
    let weight = |logit: f32| ((logit - peak) * scale).exp();
    let mut draw = Draw::new(params.seed, counter);
    if params.top_k <= 0 && params.top_p >= 1.0 {
        // No order needed: min_p compares to the peak, whose weight is one.
        let least = params.min_p as f32;
        let kept = |logit: &f32| Some(weight(*logit)).filter(|weight| *weight >= least);
        let total = logits.iter().filter_map(kept).map(f64::from).sum::<f64>();
        let kept = logits.iter().enumerate();
        let kept = kept
            .filter_map(|(id, logit)| Some((id, weight(*logit))).filter(|kept| kept.1 >= least));
        return Ok(id(draw.pick(kept, total).unwrap_or(best)));
    }
    let candidates = likeliest(logits, params, weight);
    let total = candidates.iter().map(|kept| f64::from(kept.1)).sum();
    Ok(id(draw.pick(candidates.into_iter(), total).unwrap_or(best)))
}

/// The tokens that top_k, then top_p, then min_p leave, likeliest first, with their weights.
fn likeliest(
    logits: &[f32],
    params: &SamplingFields,
    weight: impl Fn(f32) -> f32,
) -> Vec<(usize, f32)> {
    // A heap gives the likeliest first at the price of those taken: most answers need a few dozen of 250,000.
    let mut ranked = match usize::try_from(params.top_k) {
        Ok(0) | Err(_) => ranked(logits).collect(),
        Ok(k) => top(logits, k),
    };
    let weights = ranked.iter().map(|next| f64::from(weight(next.logit)));
    let wanted = params.top_p * weights.sum::<f64>();
    let mut kept = Vec::new();
    let mut covered = 0.0;
    while covered < wanted
        && let Some(next) = ranked.pop()
    {
        let weight = weight(next.logit);
        if weight < params.min_p as f32 {
            break;
        }
        covered += f64::from(weight);
        kept.push((next.id, weight));
    }
    kept
}

fn ranked(logits: &[f32]) -> impl Iterator<Item = Ranked> {
    let logits = logits.iter().enumerate();
    logits.map(|(id, &logit)| Ranked { logit, id })
}

/// The `k` likeliest.
fn top(logits: &[f32], k: usize) -> BinaryHeap<Ranked> {
    let mut kept: BinaryHeap<Reverse<Ranked>> = BinaryHeap::new();
    for next in ranked(logits) {
        if kept.len() < k {
            kept.push(Reverse(next));
        } else if kept.peek().is_some_and(|least| next > least.0) {
            kept.pop();
            kept.push(Reverse(next));
        }
    }
    kept.into_iter().map(|Reverse(next)| next).collect()
}

fn id(index: usize) -> u32 {
    u32::try_from(index).expect("a vocabulary is smaller than u32")
}

/// The random number of one token: the place `counter` of the stream `seed`, whatever was drawn elsewhere.
struct Draw {
    point: f64,
}

impl Draw {
    fn new(seed: u64, counter: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_word_pos(u128::from(counter) * 2); // one f64 is two words
        Self {
            point: rng.random(),
        }
    }

    fn pick(&mut self, weights: impl Iterator<Item = (usize, f32)>, total: f64) -> Option<usize> {
        let wanted = self.point * total;
        let mut covered = 0.0;
        let mut last = None;
        for (id, weight) in weights {
            covered += f64::from(weight);
            last = Some(id);
            if covered > wanted {
                break;
            }
        }
        last
    }
}

struct Ranked {
    logit: f32,
    id: usize,
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        self.logit
            .total_cmp(&other.logit)
            .then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Ranked {}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    /// How often each id comes in 4,000 draws.
    fn counts(params: &SamplingFields) -> [u32; 5] {
        let mut counts = [0; 5];
        for counter in 0..4000 {
            counts[draw(&LOGITS, params, counter).unwrap() as usize] += 1;
        }
        counts
    }

    fn params(temperature: f64, top_k: i64, top_p: f64, min_p: f64) -> SamplingFields {
        SamplingFields {
            temperature,
            top_k,
            top_p,
            min_p,
            seed: 7,
            ..SamplingFields::default()
        }
    }

    fn greedy() -> SamplingFields {
        params(0.0, 0, 1.0, 0.0)
    }

    /// The greedy choices of `count` tokens, each from the same logits.
    fn choices(fields: SamplingFields, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(fields.checked().unwrap(), prompt);
        let mut choose = || sampler.next(&mut LOGITS.clone(), Bounds::default());
        (0..count).map(|_| choose().unwrap().token).collect()
    }

    #[test]
    fn temperature_zero_is_the_first_of_the_largest() {
        assert_eq!(draw(&LOGITS, &greedy(), 0), Ok(1));
        let hidden = [f32::NEG_INFINITY, -5.0, f32::NEG_INFINITY];
        assert_eq!(draw(&hidden, &greedy(), 0), Ok(1));
    }

    #[test]
    fn the_frequencies_follow_the_softmax() {
        let weights: Vec<f64> = LOGITS.iter().map(|logit| f64::from(*logit).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts(&params(1.0, 0, 1.0, 0.0)).iter().zip(&weights) {
            let expected = 4000.0 * weight / total;
            let error = (f64::from(*count) - expected).abs();
            assert!(
                error < 5.0 * expected.sqrt() + 1.0,
                "{count} for {expected}"
            );
        }
    }

    #[test]
    fn each_filter_keeps_what_it_names() {
        let kept = |params| counts(&params).map(|count| count > 0);
        assert_eq!(
            kept(params(1.0, 2, 1.0, 0.0)),
            [false, true, false, true, false]
        );
        assert_eq!(
            kept(params(1.0, 3, 1.0, 0.0)),
            [false, true, true, true, false]
        );
        // e³+e³ of the whole is 0.79
        assert_eq!(
            kept(params(1.0, 0, 0.75, 0.0)),
            [false, true, false, true, false]
        );
        assert_eq!(
            kept(params(1.0, 0, 0.85, 0.0)),
            [false, true, true, true, false]
        );
        assert_eq!(
            kept(params(1.0, 3, 0.5, 0.0)),
            [false, true, false, true, false]
        );
        // e² to e³ is 0.37
        assert_eq!(
            kept(params(1.0, 0, 1.0, 0.3)),
            [false, true, true, true, false]
        );
        assert_eq!(
            kept(params(1.0, 0, 0.99, 0.4)),
            [false, true, false, true, false]
        );
    }

    #[test]
    fn a_choice_depends_on_seed_and_place_alone() {
        let draw = |seed, counter| {
            let fields = SamplingFields {
                seed,
                ..params(1.5, 0, 1.0, 0.0)
            };
            draw(&LOGITS, &fields, counter).unwrap()
        };
        let forward: Vec<u32> = (0..50).map(|counter| draw(1, counter)).collect();
        let backward: Vec<u32> = (0..50).rev().map(|counter| draw(1, counter)).collect();
        assert_eq!(forward, backward.into_iter().rev().collect::<Vec<_>>());
        assert_ne!(
            forward,
            (0..50).map(|counter| draw(2, counter)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        let mut sampler = Sampler::new(SamplingParams::greedy(), &[]);
        assert_eq!(
            sampler.next(&mut [1.0, f32::NAN], Bounds::default()),
            Err(NotANumber)
        );
        assert_eq!(
            draw(&[f32::NEG_INFINITY], &params(1.0, 0, 1.0, 0.0), 0),
            Err(NotANumber)
        );
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        // 1 and 3 are worth 3, 2 is worth 2, 0 is worth 1.
        assert_eq!(choices(greedy(), &[], 3), [1, 1, 1]);
        let presence = SamplingFields {
            presence_penalty: 1.5,
            ..greedy()
        };
        assert_eq!(
            choices(presence, &[], 5),
            [1, 3, 2, 1, 1],
            "once, however often"
        );
        let frequency = SamplingFields {
            frequency_penalty: 1.5,
            ..greedy()
        };
        assert_eq!(
            choices(frequency, &[], 5),
            [1, 3, 2, 1, 3],
            "each time again"
        );
        let repetition = SamplingFields {
            repetition_penalty: 2.0,
            ..greedy()
        };
        assert_eq!(choices(repetition.clone(), &[], 3), [1, 3, 2]);
        assert_eq!(choices(repetition, &[1, 1, 3], 1), [2], "the prompt counts");
        let bias = SamplingFields {
            logit_bias: vec![(4, 5.0), (99, 1.0)],
            ..greedy()
        };
        assert_eq!(choices(bias, &[], 1), [4]);
    }

    #[test]
    fn the_answer_cannot_end_before_its_least_length() {
        let fields = SamplingFields {
            min_tokens: 2,
            ..greedy()
        };
        let mut sampler = Sampler::new(fields.checked().unwrap(), &[]);
        let mut choose = || {
            let bounds = Bounds {
                ends: &[1, 77],
                ..Bounds::default()
            };
            sampler.next(&mut LOGITS.clone(), bounds).unwrap().token
        };
        assert_eq!([choose(), choose(), choose()], [3, 3, 1]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_model_whatever_changed_the_choice() {
        let fields = SamplingFields {
            logprobs: Some(2),
            logit_bias: vec![(0, 50.0)],
            ..greedy()
        };
        let mut sampler = Sampler::new(fields.checked().unwrap(), &[]);
        let choice = sampler
            .next(&mut LOGITS.clone(), Bounds::default())
            .unwrap();
        let total = LOGITS.iter().map(|logit| logit.exp()).sum::<f32>().ln();
        let scored = choice.scored.unwrap();
        assert_eq!(choice.token, 0);
        assert!((scored.logprob - (1.0 - total)).abs() < 1e-5, "{scored:?}");
        let ids: Vec<u32> = scored.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [1, 3]);
        assert!((scored.top[0].1 - (3.0 - total)).abs() < 1e-5);
        assert_eq!(score(&LOGITS, 0, 2), Ok(scored));
        assert_eq!(score(&[1.0, f32::NAN], 0, 0), Err(NotANumber));
        let bounds = Bounds {
            forced: Some(4),
            ..Bounds::default()
        };
        let forced = sampler.next(&mut LOGITS.clone(), bounds).unwrap();
        assert_eq!(forced.token, 4);
        assert!((forced.scored.unwrap().logprob - (-1.0 - total)).abs() < 1e-5);
    }

    #[test]
    fn a_value_out_of_range_is_named() {
        let plain = SamplingFields::default;
        for (fields, name) in [
            (params(-0.1, 0, 1.0, 0.0), "temperature"),
            (params(f64::NAN, 0, 1.0, 0.0), "temperature"),
            (params(1.0, -2, 1.0, 0.0), "top_k"),
            (params(1.0, 0, 0.0, 0.0), "top_p"),
            (params(1.0, 0, 1.0, 1.1), "min_p"),
            (
                SamplingFields {
                    presence_penalty: 2.5,
                    ..plain()
                },
                "presence_penalty",
            ),
            (
                SamplingFields {
                    frequency_penalty: -3.0,
                    ..plain()
                },
                "frequency_penalty",
            ),
            (
                SamplingFields {
                    repetition_penalty: 0.0,
                    ..plain()
                },
                "repetition_penalty",
            ),
            (
                SamplingFields {
                    logit_bias: vec![(1, 101.0)],
                    ..plain()
                },
                "logit_bias",
            ),
            (
                SamplingFields {
                    logprobs: Some(21),
                    ..plain()
                },
                "top_logprobs",
            ),
        ] {
            assert_eq!(fields.checked().unwrap_err().field, name);
        }
    }
}

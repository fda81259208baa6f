//! What is asked of each token of an answer, and what the answer has so far, as a [`Rule`] for the next one.

use crate::kernels::argmax;
use crate::kernels::choose::{Edit, Pick, Rule, top};
use crate::text::grammar::Mask;
use crate::text::output::Scored;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

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
        let likeliest = top(logits, top_count).into_sorted_vec().into_iter();
        let top = likeliest.map(|next| (next.0.id as u32, next.0.logit - total));
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

/// Says how the tokens of one answer are chosen, and remembers those it has for the penalties.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// Ids of the prompt in order, each once; only where they matter.
    prompt: Vec<u32>,
    counts: BTreeMap<u32, u32>,
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
            counts: BTreeMap::new(),
            drawn: 0,
        }
    }

    /// How many of the likeliest tokens are wanted at each place of a scored prompt.
    #[must_use]
    pub fn top_count(&self) -> usize {
        usize::try_from(self.params.asked.logprobs.unwrap_or(0)).unwrap_or(0)
    }

    /// Whether log probabilities are wanted, for which logits are looked at beside the choice.
    #[must_use]
    pub fn scores(&self) -> bool {
        self.params.asked.logprobs.is_some()
    }

    /// How the next token is chosen, of those that `mask` allows. It depends on the arguments, the parameters and the answer so
    /// far alone.
    #[must_use]
    pub fn rule(&self, mask: Option<Mask>, ends: &[u32]) -> Rule {
        let asked = &self.params.asked;
        let pick = if asked.temperature == 0.0 || asked.top_k == 1 {
            Pick::LIKELIEST
        } else {
            let top_k = u32::try_from(asked.top_k).unwrap_or(0); // -1: all
            Pick::by_chance(
                asked.temperature,
                top_k,
                asked.top_p,
                asked.min_p,
                random(asked.seed, self.drawn),
            )
        };
        Rule {
            edits: self.edits(ends),
            mask: mask.map(Mask::into_words),
            pick,
        }
    }

    /// Penalties, bias, and ends that come too early.
    fn edits(&self, ends: &[u32]) -> Vec<Edit> {
        let asked = &self.params.asked;
        let mut edits = BTreeMap::new();
        let mut add = |id: u32, by: f64| *edits.entry(id).or_insert(0.0) += by;
        if asked.presence_penalty != 0.0 || asked.frequency_penalty != 0.0 {
            for (&id, &count) in &self.counts {
                let times = f64::from(count);
                add(
                    id,
                    -asked.presence_penalty - asked.frequency_penalty * times,
                );
            }
        }
        for &(id, by) in &asked.logit_bias {
            add(id, by);
        }
        if self.drawn < asked.min_tokens {
            for &end in ends {
                add(end, f64::NEG_INFINITY);
            }
        }
        let mut edits: Vec<Edit> = edits
            .into_iter()
            .map(|(id, add)| Edit {
                id,
                divide: 1.0,
                add: add as f32,
            })
            .collect();
        if asked.repetition_penalty != 1.0 {
            let divide = asked.repetition_penalty as f32;
            for edit in &mut edits {
                if self.prompt.binary_search(&edit.id).is_ok() || self.counts.contains_key(&edit.id)
                {
                    edit.divide = divide;
                }
            }
            let answer = self.counts.keys().copied();
            let answer = answer.filter(|id| self.prompt.binary_search(id).is_err());
            let changed = edits.len();
            for id in self.prompt.iter().copied().chain(answer) {
                let is_changed = edits[..changed].binary_search_by_key(&id, |edit| edit.id);
                if is_changed.is_err() {
                    let add = 0.0;
                    edits.push(Edit { id, divide, add });
                }
            }
        }
        edits
    }

    /// Takes in the token that was chosen.
    pub fn took(&mut self, token: u32) {
        self.drawn += 1;
        *self.counts.entry(token).or_default() += 1;
    }

    /// Chooses the next token among `logits`, by [`Self::rule`], and takes it in.
    ///
    /// `logits` are those of the ids that may be sampled: the tail past the tokenizer is cut off by the caller. They are
    /// changed in place.
    ///
    /// # Errors
    /// [`NotANumber`] when a logit is none, or none is finite.
    pub fn next(&mut self, logits: &mut [f32], bounds: Bounds<'_>) -> Result<Choice, NotANumber> {
        let place = self.scores().then(|| Place::of(logits, self.top_count()));
        let (token, logit) = match bounds.forced {
            Some(_) if logits.iter().any(|logit| logit.is_nan()) => return Err(NotANumber),
            Some(token) => (token, logits[token as usize]),
            None => {
                let rule = self.rule(bounds.mask, bounds.ends);
                let edits = rule.edits.iter();
                let before: Vec<(u32, f32)> = edits
                    .filter(|_| place.is_some())
                    .filter_map(|edit| Some((edit.id, *logits.get(edit.id as usize)?)))
                    .collect();
                let token = rule.choose(logits).ok_or(NotANumber)?;
                let changed = before.iter().find(|(id, _)| *id == token);
                let logit = changed.map_or(logits[token as usize], |(_, logit)| *logit);
                (token, logit)
            }
        };
        self.took(token);
        let scored = place.map(|place| place.scored(token, logit));
        Ok(Choice { token, scored })
    }
}

/// The random number of one token: the place `counter` of the stream `seed`, whatever was drawn elsewhere.
fn random(seed: u64, counter: u64) -> u64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_word_pos(u128::from(counter) * 2); // a number of 64 bits is two words
    rng.random()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    /// The choice of the `counter`-th token among the same logits.
    fn draw(params: &SamplingFields, counter: u64) -> u32 {
        let mut sampler = Sampler::new(params.clone().checked().unwrap(), &[]);
        sampler.drawn = counter;
        let choice = sampler.next(&mut LOGITS.clone(), Bounds::default());
        choice.unwrap().token
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
        assert_eq!(draw(&greedy(), 0), 1);
        for counter in 0..20 {
            assert_eq!(draw(&params(2.0, 1, 1.0, 0.0), counter), 1);
        }
    }

    #[test]
    fn the_frequencies_follow_the_softmax() {
        let weights: Vec<f64> = LOGITS.iter().map(|logit| f64::from(*logit).exp()).collect();
        let total: f64 = weights.iter().sum();
        let plain = params(1.0, 0, 1.0, 0.0);
        let mut counts = [0; LOGITS.len()];
        for counter in 0..4000 {
            counts[draw(&plain, counter) as usize] += 1;
        }
        for (count, weight) in counts.iter().zip(&weights) {
            let expected = 4000.0 * weight / total;
            let error = (f64::from(*count) - expected).abs();
            assert!(
                error < 5.0 * expected.sqrt() + 1.0,
                "{count} for {expected}"
            );
        }
    }

    #[test]
    fn filters_are_those_of_the_request() {
        let kept = |params| {
            let mut kept = [false; LOGITS.len()];
            for counter in 0..400 {
                kept[draw(&params, counter) as usize] = true;
            }
            kept
        };
        let [both, three] = [
            [false, true, false, true, false],
            [false, true, true, true, false],
        ];
        assert_eq!(kept(params(1.0, 3, 1.0, 0.0)), three);
        assert_eq!(kept(params(1.0, -1, 0.75, 0.0)), both); // e³+e³ of the whole is 0.79
        assert_eq!(kept(params(1.0, 0, 1.0, 0.3)), three); // e² to e³ is 0.37
    }

    #[test]
    fn a_choice_depends_on_seed_and_place_alone() {
        let draw = |seed, counter| {
            let fields = SamplingFields {
                seed,
                ..params(1.5, 0, 1.0, 0.0)
            };
            draw(&fields, counter)
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
            sampler.next(&mut [f32::NEG_INFINITY], Bounds::default()),
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

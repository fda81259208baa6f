//! Logits → one token id.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// How to choose the next token. Only [`SamplingParams::new`] makes one, so its values are always in range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    seed: u64,
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

impl SamplingParams {
    /// `temperature` 0 is greedy; `top_k` 0 or -1 and `top_p` 1 and `min_p` 0 keep every token.
    ///
    /// # Errors
    /// When a value is out of range.
    pub fn new(
        temperature: f64,
        top_k: i64,
        top_p: f64,
        min_p: f64,
        seed: u64,
    ) -> Result<Self, OutOfRange> {
        let check = |fits: bool, field, range| {
            if fits {
                Ok(())
            } else {
                Err(OutOfRange { field, range })
            }
        };
        check((0.0..=2.0).contains(&temperature), "temperature", "0 to 2")?;
        check(top_k >= -1, "top_k", "-1 or more")?;
        check(
            top_p > 0.0 && top_p <= 1.0,
            "top_p",
            "above 0 and at most 1",
        )?;
        check((0.0..=1.0).contains(&min_p), "min_p", "0 to 1")?;
        Ok(Self {
            temperature: temperature as f32,
            top_k: usize::try_from(top_k).unwrap_or(0),
            top_p: top_p as f32,
            min_p: min_p as f32,
            seed,
        })
    }

    /// Always the likeliest token.
    #[must_use]
    pub fn greedy() -> Self {
        Self::new(0.0, 0, 1.0, 0.0, 0).expect("each value is in range")
    }
}

/// The logits hold no number to choose by: the computation that made them went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model computed logits that are not numbers")]
pub struct NotANumber;

/// Chooses the `counter`-th token of a request. The choice depends on nothing but the arguments.
///
/// `logits` are those of the ids that may be sampled: the tail past the tokenizer is cut off by the caller.
///
/// # Errors
/// [`NotANumber`] when no logit is finite.
pub fn sample(logits: &[f32], params: &SamplingParams, counter: u64) -> Result<u32, NotANumber> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return Err(NotANumber);
    }
    let best = argmax(logits).ok_or(NotANumber)?;
    if params.temperature == 0.0 || params.top_k == 1 {
        return Ok(id(best));
    }
    let peak = logits[best];
    let scale = 1.0 / params.temperature;
    let weight = |logit: f32| ((logit - peak) * scale).exp();
    let mut draw = Draw::new(params.seed, counter);
    if params.top_k == 0 && params.top_p >= 1.0 {
        // No order needed: min_p compares to the peak, whose weight is one.
        let kept = |logit: &f32| Some(weight(*logit)).filter(|weight| *weight >= params.min_p);
        let total = logits.iter().filter_map(kept).map(f64::from).sum::<f64>();
        let kept = logits.iter().enumerate();
        let kept = kept.filter_map(|(id, logit)| {
            Some((id, weight(*logit))).filter(|kept| kept.1 >= params.min_p)
        });
        return Ok(id(draw.pick(kept, total).unwrap_or(best)));
    }
    let candidates = likeliest(logits, params, weight);
    let total = candidates.iter().map(|kept| f64::from(kept.1)).sum();
    Ok(id(draw.pick(candidates.into_iter(), total).unwrap_or(best)))
}

/// The tokens that top_k, then top_p, then min_p leave, likeliest first, with their weights.
fn likeliest(
    logits: &[f32],
    params: &SamplingParams,
    weight: impl Fn(f32) -> f32,
) -> Vec<(usize, f32)> {
    // A heap gives the likeliest first at the price of those taken: most answers need a few dozen of 250,000.
    let mut ranked = match params.top_k {
        0 => ranked(logits).collect(),
        k => top(logits, k),
    };
    let weights = ranked.iter().map(|next| f64::from(weight(next.logit)));
    let wanted = f64::from(params.top_p) * weights.sum::<f64>();
    let mut kept = Vec::new();
    let mut covered = 0.0;
    while covered < wanted
        && let Some(next) = ranked.pop()
    {
        let weight = weight(next.logit);
        if weight < params.min_p {
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

/// The first of the largest: ties go to the smaller id, as in every other implementation.
fn argmax(logits: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, peak)| logit > peak) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id)
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
    fn counts(params: &SamplingParams) -> [u32; 5] {
        let mut counts = [0; 5];
        for counter in 0..4000 {
            counts[sample(&LOGITS, params, counter).unwrap() as usize] += 1;
        }
        counts
    }

    fn params(temperature: f64, top_k: i64, top_p: f64, min_p: f64) -> SamplingParams {
        SamplingParams::new(temperature, top_k, top_p, min_p, 7).unwrap()
    }

    #[test]
    fn temperature_zero_is_the_first_of_the_largest() {
        assert_eq!(sample(&LOGITS, &SamplingParams::greedy(), 0), Ok(1));
        let hidden = [f32::NEG_INFINITY, -5.0, f32::NEG_INFINITY];
        assert_eq!(sample(&hidden, &SamplingParams::greedy(), 0), Ok(1));
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
            let params = SamplingParams::new(1.5, 0, 1.0, 0.0, seed).unwrap();
            sample(&LOGITS, &params, counter).unwrap()
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
        assert_eq!(
            sample(&[1.0, f32::NAN], &SamplingParams::greedy(), 0),
            Err(NotANumber)
        );
        assert_eq!(
            sample(&[f32::NEG_INFINITY], &params(1.0, 0, 1.0, 0.0), 0),
            Err(NotANumber)
        );
    }

    #[test]
    fn a_value_out_of_range_is_named() {
        for (result, field) in [
            (SamplingParams::new(-0.1, 0, 1.0, 0.0, 0), "temperature"),
            (SamplingParams::new(f64::NAN, 0, 1.0, 0.0, 0), "temperature"),
            (SamplingParams::new(1.0, -2, 1.0, 0.0, 0), "top_k"),
            (SamplingParams::new(1.0, 0, 0.0, 0.0, 0), "top_p"),
            (SamplingParams::new(1.0, 0, 1.0, 1.1, 0), "min_p"),
        ] {
            assert_eq!(result.unwrap_err().field, field);
        }
    }
}

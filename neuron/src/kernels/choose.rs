//! Which token comes next, given logits: the one rule, here for the host; `cuda/choose.cu` is the same for a device, to the bit.
//!
//! A token is as far from the likeliest as its logit is lower, divided by the temperature, and weighs e to the minus of that.
//! Weights are whole numbers of 2⁻⁴⁰, so that sums do not depend on their order; distances are compared in whole numbers of 2⁻²⁶.
//! Of the tokens, `top_k` keeps the k likeliest, `top_p` of these the likeliest that together have this share of the
//! weight, and `min_p` those not too far; what is as far as the last that is kept is kept as well. Among what is left a random
//! number decides by weight.

use super::{exp, vectorised};
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// How one token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Changes of logits that come first, each of another id.
    pub edits: Vec<Edit>,
    /// The tokens that are allowed, a bit each, in words from the lowest up; those past the end are not. All where it is absent.
    pub mask: Option<Vec<u32>>,
    /// How the choice is made.
    pub pick: Pick,
}

/// A change of the logit of `id`: divided by `divide` where it is above 0 and else multiplied with it, and then `add` more.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    /// The token.
    pub id: u32,
    /// 1 changes nothing.
    pub divide: f32,
    /// 0 changes nothing; minus infinity makes the token impossible.
    pub add: f32,
}

/// How a token is chosen among logits, as kernels read it.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::NoUninit)]
#[repr(C)]
pub struct Pick {
    pub(crate) random: u64,
    /// A share, in 2⁻⁶⁴; 0 keeps all.
    pub(crate) top_p: u64,
    /// One by the temperature; 0 takes the likeliest.
    pub(crate) scale: f32,
    /// The furthest that `min_p` keeps, in the units distances are compared in.
    pub(crate) limit: f32,
    /// 0 keeps all.
    pub(crate) top_k: u32,
    /// On a device: which of the masks, −1 for none.
    pub(crate) mask: i32,
}

/// Distances are compared in whole numbers of one by this.
const FINE: f32 = (1u32 << 26) as f32;
/// Weights are whole numbers of one by this.
const WEIGHT: f32 = (1u64 << 40) as f32;

impl Pick {
    /// The likeliest, of equals the first.
    pub const LIKELIEST: Self = Self {
        random: 0,
        top_p: 0,
        scale: 0.0,
        limit: f32::INFINITY,
        top_k: 0,
        mask: -1,
    };

    /// By chance: `random` decides among what is kept, each value of which is as likely.
    ///
    /// `temperature` is above 0, `top_k` 0 where all are kept, `top_p` above 0 and at most 1, `min_p` from 0 to 1.
    #[must_use]
    pub fn by_chance(temperature: f64, top_k: u32, top_p: f64, min_p: f64, random: u64) -> Self {
        let whole = 2f64.powi(64);
        Self {
            random,
            // a share that is rounded to nothing keeps the likeliest, as the smallest there is does
            top_p: if top_p < 1.0 {
                ((top_p * whole) as u64).max(1)
            } else {
                0
            },
            // not infinite: the peak is at no distance from itself, whatever that is multiplied with
            scale: (1.0 / temperature).min(f64::from(f32::MAX)) as f32,
            limit: if min_p > 0.0 {
                (-min_p.ln() as f32 * FINE).trunc()
            } else {
                f32::INFINITY
            },
            top_k,
            mask: -1,
        }
    }

    /// The likeliest, whatever chance would say.
    fn is_likeliest(&self) -> bool {
        self.scale == 0.0
    }
}

impl Rule {
    /// The likeliest token.
    #[must_use]
    pub fn likeliest() -> Self {
        Self {
            edits: Vec::new(),
            mask: None,
            pick: Pick::LIKELIEST,
        }
    }

    /// The token among `logits`, which are changed in place: none where one of them is not a number, or none finite.
    #[must_use]
    pub fn choose(&self, logits: &mut [f32]) -> Option<u32> {
        if logits
            .iter()
            .any(|logit| logit.is_nan() || *logit == f32::INFINITY)
        {
            return None;
        }
        for edit in &self.edits {
            if let Some(logit) = logits.get_mut(edit.id as usize) {
                *logit = edit.of(*logit);
            }
        }
        if let Some(words) = &self.mask {
            forbid(words, logits);
        }
        pick(logits, &self.pick)
    }
}

impl Edit {
    fn of(&self, logit: f32) -> f32 {
        let scaled = if logit > 0.0 {
            logit / self.divide
        } else {
            logit * self.divide
        };
        scaled + self.add
    }
}

/// Makes what the mask does not allow impossible.
pub(crate) fn forbid(words: &[u32], logits: &mut [f32]) {
    const WORD: usize = u32::BITS as usize;
    for (word, logits) in words.iter().zip(logits.chunks_mut(WORD)) {
        // most words allow nothing, or everything
        match *word {
            u32::MAX => {}
            0 => logits.fill(f32::NEG_INFINITY),
            word => {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
    if let Some(past) = logits.get_mut(words.len() * WORD..) {
        past.fill(f32::NEG_INFINITY);
    }
}

/// Tokens that are looked at together: most such pieces hold none that is near the peak.
const PIECE: usize = 256;

/// Logits seen from their peak.
struct Row<'a> {
    logits: &'a [f32],
    peak: f32,
    scale: f32,
}

/// What some tokens of a piece weigh, and what is compared of their distances.
struct Weighed {
    weights: [u64; PIECE],
    keys: [f32; PIECE],
}

impl<'a> Row<'a> {
    #[inline(always)]
    fn distance(&self, logit: f32) -> f32 {
        (self.peak - logit) * self.scale
    }

    #[inline(always)]
    fn key(&self, logit: f32) -> f32 {
        (self.distance(logit) * FINE).trunc()
    }

    /// The pieces that may have tokens up to `limit` that weigh something, each with the id of its first.
    fn pieces(&self, limit: f32) -> impl Iterator<Item = (usize, &'a [f32])> {
        /// From here on a token weighs nothing.
        const FAR: f32 = 28.0;
        let pieces = self.logits.chunks(PIECE).enumerate();
        let near = pieces.filter(move |(_, piece)| {
            let top = largest(piece);
            self.distance(top) < FAR && self.key(top) <= limit
        });
        near.map(|(at, piece)| (at * PIECE, piece))
    }

    /// Weights of those up to `limit`, 0 for the others.
    fn weigh(&self, piece: &[f32], limit: f32) -> Weighed {
        let (mut weights, mut keys) = ([0.0f32; PIECE], [f32::INFINITY; PIECE]);
        vectorised(
            #[inline(always)]
            || {
                for ((weight, key), logit) in weights.iter_mut().zip(&mut keys).zip(piece) {
                    let distance = self.distance(*logit);
                    *key = (distance * FINE).trunc();
                    *weight = if *key <= limit {
                        exp(-distance) * WEIGHT
                    } else {
                        0.0
                    };
                }
            },
        );
        Weighed {
            weights: weights.map(|weight| weight as u64),
            keys,
        }
    }
}

/// The largest of some logits, none of which is not a number.
fn largest(logits: &[f32]) -> f32 {
    const LANES: usize = 16;
    vectorised(
        #[inline(always)]
        || {
            let mut tops = [f32::NEG_INFINITY; LANES];
            let (whole, rest) = logits.as_chunks::<LANES>();
            for logits in whole {
                for (top, logit) in tops.iter_mut().zip(logits) {
                    *top = if *logit > *top { *logit } else { *top };
                }
            }
            tops.iter()
                .chain(rest)
                .copied()
                .fold(f32::NEG_INFINITY, f32::max)
        },
    )
}

/// The choice among `logits`, none of which is infinite or no number but for those that are impossible.
fn pick(logits: &[f32], pick: &Pick) -> Option<u32> {
    let peak = largest(logits);
    if peak == f32::NEG_INFINITY {
        return None;
    }
    if pick.is_likeliest() {
        let best = logits.iter().position(|logit| *logit == peak);
        return best.map(|best| best as u32);
    }
    let row = Row {
        logits,
        peak,
        scale: pick.scale,
    };
    let mut limit = f32::INFINITY;
    let most = pick.top_k as usize;
    if most > 0 && most < logits.len() {
        // the last of the k likeliest
        let last = top(logits, most).peek().map(|last| row.key(last.0.logit));
        limit = last.unwrap_or(limit);
    }
    if pick.top_p > 0 {
        limit = limit_of_share(&row, pick.top_p, limit);
    }
    draw(&row, limit.min(pick.limit), pick.random)
}

/// The key up to which the likeliest have this share of the weight of all up to `limit`.
fn limit_of_share(row: &Row<'_>, share: u64, limit: f32) -> f32 {
    /// Keys that are told apart only where it matters: what weighs something has 31 bits of them at the most.
    const BINS: usize = 1 << 11;
    let bin = |key: f32| (key as u32 >> 20) as usize;
    let mut bins = [0u64; BINS];
    let mut near = Vec::new();
    for (_, piece) in row.pieces(limit) {
        let Weighed { weights, keys } = row.weigh(piece, limit);
        for (weight, key) in weights.into_iter().zip(keys).filter(|one| one.0 > 0) {
            bins[bin(key)] += weight;
            near.push((key, weight));
        }
    }
    let mut left = part_of(bins.iter().sum(), share).max(1);
    for (at, sum) in bins.into_iter().enumerate() {
        if sum < left {
            left -= sum;
            continue;
        }
        near.retain(|(key, _)| bin(*key) == at);
        near.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        for (key, weight) in near {
            if weight >= left {
                return key;
            }
            left -= weight;
        }
        break;
    }
    limit // a share is less than all
}

/// `all` times a share in 2⁻⁶⁴, without what is behind the point.
fn part_of(all: u64, share: u64) -> u64 {
    ((u128::from(all) * u128::from(share)) >> 64) as u64
}

/// The token in which the running sum of the weights, of those up to `limit`, passes the point that `random` draws.
fn draw(row: &Row<'_>, limit: f32, random: u64) -> Option<u32> {
    let weights = |piece| row.weigh(piece, limit).weights;
    let pieces = row.pieces(limit);
    let sums: Vec<(usize, &[f32], u64)> = pieces
        .map(|(first, piece)| (first, piece, weights(piece).iter().sum()))
        .collect();
    let mut left = part_of(sums.iter().map(|(_, _, sum)| sum).sum(), random);
    for (first, piece, sum) in sums {
        if sum <= left {
            left -= sum;
            continue;
        }
        for (at, weight) in weights(piece).into_iter().enumerate() {
            if weight > left {
                return Some((first + at) as u32);
            }
            left -= weight;
        }
    }
    None // the peak weighs something, and a part is less than all
}

/// A token with its logit; the likelier is the larger, of equals the first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ranked {
    pub(crate) logit: f32,
    pub(crate) id: usize,
}

/// The `k` likeliest, the last of them on top.
pub(crate) fn top(logits: &[f32], k: usize) -> BinaryHeap<Reverse<Ranked>> {
    let mut kept: BinaryHeap<Reverse<Ranked>> = BinaryHeap::new();
    for (at, piece) in logits.chunks(PIECE).enumerate() {
        let least = kept.peek().map(|least| least.0.logit);
        if kept.len() == k && least.is_none_or(|least| largest(piece) <= least) {
            continue; // those that come first win of equals
        }
        for (id, &logit) in (at * PIECE..).zip(piece) {
            let next = Ranked { logit, id };
            if kept.len() < k {
                kept.push(Reverse(next));
            } else if kept.peek().is_some_and(|least| next > least.0) {
                kept.pop();
                kept.push(Reverse(next));
            }
        }
    }
    kept
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
    use crate::kernels::testing::numbers;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    /// How often each id comes in 4,000 draws that are spread evenly.
    fn counts(temperature: f64, top_k: u32, top_p: f64, min_p: f64) -> [u32; 5] {
        const DRAWS: u64 = 4000;
        let mut counts = [0; 5];
        for draw in 0..DRAWS {
            let random = draw * (u64::MAX / DRAWS);
            let pick = Pick::by_chance(temperature, top_k, top_p, min_p, random);
            let rule = Rule {
                pick,
                ..Rule::likeliest()
            };
            counts[rule.choose(&mut LOGITS.clone()).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_spread_evenly_give_each_token_its_share() {
        for temperature in [0.5, 1.0, 2.0] {
            let weights = LOGITS.map(|logit| (f64::from(logit) / temperature).exp());
            let total: f64 = weights.iter().sum();
            let counts = counts(temperature, 0, 1.0, 0.0);
            for (count, weight) in counts.iter().zip(weights) {
                let expected = 4000.0 * weight / total;
                assert!(
                    (f64::from(*count) - expected).abs() < 1.5,
                    "{count} for {expected}"
                );
            }
        }
    }

    #[test]
    fn however_low_a_temperature_is_the_likeliest_come() {
        let counts = counts(1e-300, 0, 1.0, 0.0);
        assert_eq!([counts[0], counts[2], counts[4]], [0; 3]);
        assert!(counts[1].abs_diff(counts[3]) <= 2, "{counts:?}");
        // the least that a division does not make infinite, and what is below
        for temperature in [3e-39, 2e-39, f64::MIN_POSITIVE, 5e-324] {
            let pick = Pick::by_chance(temperature, 3, 0.9, 0.1, 7);
            assert_eq!(pick.scale, f32::MAX.min((1.0 / temperature) as f32));
            assert_eq!(super::pick(&LOGITS, &pick), Some(1));
        }
    }

    #[test]
    fn each_filter_keeps_what_it_names() {
        let kept = |top_k, top_p, min_p| counts(1.0, top_k, top_p, min_p).map(|count| count > 0);
        let [both, three] = [
            [false, true, false, true, false],
            [false, true, true, true, false],
        ];
        assert_eq!(kept(2, 1.0, 0.0), both);
        assert_eq!(kept(3, 1.0, 0.0), three);
        assert_eq!(
            kept(1, 1.0, 0.0),
            both,
            "what is as likely as the last is kept"
        );
        // e³+e³ of the whole is 0.79
        assert_eq!(kept(0, 0.75, 0.0), both);
        assert_eq!(kept(0, 0.85, 0.0), three);
        assert_eq!(kept(3, 0.5, 0.0), both);
        // e² to e³ is 0.37
        assert_eq!(kept(0, 1.0, 0.3), three);
        assert_eq!(kept(0, 0.99, 0.4), both);
        assert_eq!(kept(0, 1e-30, 0.0), both);
    }

    #[test]
    fn the_likeliest_is_the_first_of_the_largest() {
        assert_eq!(Rule::likeliest().choose(&mut LOGITS.clone()), Some(1));
        let mut hidden = [f32::NEG_INFINITY, -5.0, f32::NEG_INFINITY];
        assert_eq!(Rule::likeliest().choose(&mut hidden), Some(1));
        for broken in [f32::NAN, f32::INFINITY] {
            assert_eq!(Rule::likeliest().choose(&mut [1.0, broken]), None);
        }
        assert_eq!(Rule::likeliest().choose(&mut [f32::NEG_INFINITY; 3]), None);
        assert_eq!(Rule::likeliest().choose(&mut []), None);
    }

    #[test]
    fn edits_and_masks_come_first() {
        let choose = |edits: &[(u32, f32, f32)], mask: Option<u32>| {
            let edits = edits.iter();
            let rule = Rule {
                edits: edits
                    .map(|&(id, divide, add)| Edit { id, divide, add })
                    .collect(),
                mask: mask.map(|word| vec![word]),
                pick: Pick::LIKELIEST,
            };
            rule.choose(&mut LOGITS.clone())
        };
        assert_eq!(choose(&[(1, 2.0, 0.0)], None), Some(3));
        assert_eq!(choose(&[(4, 1.0, 9.0), (99, 1.0, 9.0)], None), Some(4));
        assert_eq!(
            choose(&[(1, 1.0, f32::NEG_INFINITY)], Some(0b0111)),
            Some(2)
        );
        assert_eq!(choose(&[], Some(0)), None);
        // below zero a logit is multiplied
        assert_eq!(choose(&[(4, 0.5, 0.0)], Some(0b1_0000)), Some(4));
        assert_eq!(
            Edit {
                id: 0,
                divide: 2.0,
                add: 1.0
            }
            .of(-3.0),
            -5.0
        );
    }

    #[test]
    fn long_rows_are_drawn_from_as_a_plain_sum_says() {
        let logits: Vec<f32> = numbers(9, 5000).iter().map(|x| x * 6.0).collect();
        let peak = logits.iter().copied().fold(f32::MIN, f32::max);
        let weights: Vec<f64> = logits.iter().map(|x| f64::from(x - peak).exp()).collect();
        let total: f64 = weights.iter().sum();
        for share in [0.001, 0.1, 0.5, 0.77, 0.999] {
            let pick = Pick::by_chance(1.0, 0, 1.0, 0.0, (share * 2f64.powi(64)) as u64);
            let rule = Rule {
                pick,
                ..Rule::likeliest()
            };
            let found = rule.choose(&mut logits.clone()).unwrap() as usize;
            let before: f64 = weights[..found].iter().sum();
            let after = before + weights[found];
            let slack = 1e-6 * total;
            assert!(before - slack <= share * total && share * total <= after + slack);
        }
    }
}

//! Causal softmax attention over blocks of keys and values, with grouped query heads.

use super::exp;
use super::vector::{LANES, Vector, with_vectors};
use crate::memory::pool::{BLOCK, Block};
use rayon::prelude::*;
use std::sync::Arc;

/// Queries that go through a block together: with a dimension of 256 they are as large as its keys.
const TOGETHER: usize = 16;

/// The keys and values of one sequence in one layer.
#[derive(Debug, Clone, Copy)]
pub struct Cache<'a> {
    /// The sequence's blocks.
    pub blocks: &'a [Arc<Block>],
    /// The layer's place in each.
    pub layer: usize,
    /// Tokens in them, those of the queries included.
    pub len: usize,
    /// Heads that have keys and values.
    pub kv_heads: usize,
}

/// Attends from the last rows of a sequence to all of it; their keys and values are in the cache already.
///
/// `queries` is `(rows, heads, head_dim)`, normed and rotated; query head `h` reads kv head `h / (heads / kv heads)`.
/// Returns `(rows, heads, head_dim)`. Queries that read the same keys go through them together, a block at a time, with
/// running maxima and sums (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018); what one gets
/// does not depend on which others are with it.
#[must_use]
pub fn attention(queries: &[f32], cache: Cache<'_>, heads: usize, head_dim: usize) -> Vec<f32> {
    let rows = queries.len() / (heads * head_dim);
    let group = heads / cache.kv_heads;
    let of_head = rows * group; // queries of a kv head
    let tasks = rayon::current_num_threads().div_ceil(cache.kv_heads);
    let together = of_head.div_ceil(tasks).clamp(1, TOGETHER);
    let mut by_head = vec![0.0; queries.len()]; // (kv heads, rows, group, head_dim)
    by_head
        .par_chunks_exact_mut(of_head * head_dim)
        .enumerate()
        .for_each(|(kv_head, out)| {
            let tiles = out.par_chunks_mut(together * head_dim).enumerate();
            tiles.for_each(|(index, out)| {
                let place = |at: usize| (at / group, kv_head * group + at % group);
                let own = index * together..index * together + out.len() / head_dim;
                let mut tile: Vec<Query<'_>> = own
                    .zip(out.chunks_exact_mut(head_dim))
                    .map(|(at, out)| {
                        let (row, head) = place(at);
                        Query {
                            query: &queries[(row * heads + head) * head_dim..][..head_dim],
                            seen: cache.len - rows + row + 1,
                            top: f32::NEG_INFINITY,
                            total: 0.0,
                            weights: [0.0; BLOCK],
                            out,
                        }
                    })
                    .collect();
                with_vectors!(attend(&mut tile, cache, kv_head));
            });
        });
    if cache.kv_heads == 1 {
        return by_head; // heads come in order already
    }
    let mut out = vec![0.0; queries.len()];
    let row = group * head_dim;
    for (index, from) in by_head.chunks_exact(row).enumerate() {
        let (kv_head, t) = (index / rows, index % rows);
        out[(t * cache.kv_heads + kv_head) * row..][..row].copy_from_slice(from);
    }
    out
}

/// One query on its way through the blocks.
struct Query<'a> {
    query: &'a [f32],
    /// Tokens it may read.
    seen: usize,
    /// The largest score so far.
    top: f32,
    /// The sum of weights so far.
    total: f32,
    /// Those of the block, and before that its scores.
    weights: [f32; BLOCK],
    /// The weighted sum of values so far.
    out: &'a mut [f32],
}

#[inline(always)]
fn attend<V: Vector>(tile: &mut [Query<'_>], cache: Cache<'_>, kv_head: usize) {
    let longest = tile.iter().map(|query| query.seen).max().unwrap_or(0);
    for (index, block) in cache.blocks[..longest.div_ceil(BLOCK)].iter().enumerate() {
        let keys = block.keys(cache.layer, kv_head);
        for query in tile.iter_mut() {
            let count = query.seen.saturating_sub(index * BLOCK).min(BLOCK);
            query.weigh::<V>(keys, count);
        }
        let values = block.values(cache.layer, kv_head);
        for query in tile.iter_mut() {
            // what lies behind the last token is nobody's
            let count = query.seen.saturating_sub(index * BLOCK).min(BLOCK);
            add_weighted::<V>(query.out, &query.weights[..count], values);
        }
    }
    for query in tile {
        let inverse = 1.0 / query.total;
        query.out.iter_mut().for_each(|x| *x *= inverse);
    }
}

impl Query<'_> {
    /// The weights of a block's first `count` tokens.
    #[inline(always)]
    fn weigh<V: Vector>(&mut self, keys: &[f32], count: usize) {
        if count == 0 {
            return;
        }
        let scale = (self.query.len() as f32).sqrt().recip();
        let keys = keys.chunks_exact(self.query.len());
        let mut top = self.top;
        for (score, key) in self.weights[..count].iter_mut().zip(keys) {
            *score = scale * product::<V>(self.query, key);
            top = top.max(*score);
        }
        if top > self.top {
            let shrunk = exp(self.top - top);
            self.total *= shrunk;
            self.out.iter_mut().for_each(|x| *x *= shrunk);
            self.top = top;
        }
        for weight in &mut self.weights[..count] {
            *weight = exp(*weight - top);
        }
        self.total += self.weights[..count].iter().sum::<f32>();
    }
}

/// Vectors that a kernel works on side by side, so that their operations need not wait for each other.
const SIDES: usize = 4;

/// The sum of products of two rows.
#[inline(always)]
fn product<V: Vector>(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [V::splat(0.0); SIDES];
    let ((a, a_last), (b, b_last)) = (a.as_chunks::<SIDES>(), b.as_chunks::<SIDES>());
    for (a, b) in a.iter().zip(b) {
        for side in 0..SIDES {
            sums[side] = V::load(&a[side]).mul_add(V::load(&b[side]), sums[side]);
        }
    }
    for (a, b) in a_last.iter().zip(b_last) {
        sums[0] = V::load(a).mul_add(V::load(b), sums[0]);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum() + rest
}

/// `out ← out + Σ weight · value` over the tokens of a block.
#[inline(always)]
fn add_weighted<V: Vector>(out: &mut [f32], weights: &[f32], values: &[f32]) {
    let dim = out.len();
    let (vectors, rest) = out.as_chunks_mut::<LANES>();
    let done = vectors.len() * LANES;
    let (sides, last) = vectors.as_chunks_mut::<SIDES>();
    for (index, sides) in sides.iter_mut().enumerate() {
        let mut sums = [V::splat(0.0); SIDES];
        for (sum, side) in sums.iter_mut().zip(sides.iter()) {
            *sum = V::load(side);
        }
        for (value, weight) in values[index * SIDES * LANES..].chunks(dim).zip(weights) {
            let weight = V::splat(*weight);
            let (value, _) = value[..SIDES * LANES].as_chunks::<LANES>();
            for side in 0..SIDES {
                sums[side] = V::load(&value[side]).mul_add(weight, sums[side]);
            }
        }
        for (sum, side) in sums.iter().zip(sides) {
            sum.store(side);
        }
    }
    let first = done - last.len() * LANES;
    for (at, out) in (first..).zip(last.as_flattened_mut().iter_mut().chain(rest)) {
        for (token, weight) in weights.iter().enumerate() {
            *out += weight * values[token * dim + at];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;
    use crate::memory::pool::{KvPool, KvShape};
    use crate::memory::{LayerState, SequenceState};

    #[test]
    fn every_split_of_the_rows_meets_the_reference() {
        for (kv_heads, dim) in [(2, 5), (1, 45), (3, 64)] {
            split(kv_heads, dim);
        }
    }

    fn split(kv_heads: usize, dim: usize) {
        let (rows, heads) = (2 * BLOCK + 3, 6);
        let queries = numbers(1, rows * heads * dim);
        let keys: Vec<Vec<f32>> = (0..kv_heads as u64)
            .map(|h| numbers(10 + h, rows * dim))
            .collect();
        let values: Vec<Vec<f32>> = (0..kv_heads as u64)
            .map(|h| numbers(20 + h, rows * dim))
            .collect();
        let mut expected = Vec::new();
        for row in 0..rows {
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let query = &queries[(row * heads + head) * dim..][..dim];
                let weights: Vec<f64> = (0..=row)
                    .map(|t| {
                        let key = &keys[kv][t * dim..][..dim];
                        let score: f64 = query
                            .iter()
                            .zip(key)
                            .map(|(q, k)| f64::from(*q) * f64::from(*k))
                            .sum();
                        (score / (dim as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                expected.extend((0..dim).map(|d| {
                    weights
                        .iter()
                        .enumerate()
                        .map(|(t, w)| w / total * f64::from(values[kv][t * dim + d]))
                        .sum::<f64>()
                }));
            }
        }
        for piece in 1..=rows {
            let pool = KvPool::new(KvShape {
                layers: 2,
                heads: kv_heads,
                dim,
            });
            let layer = 1;
            let mut state = SequenceState::new(vec![LayerState::Attention(layer)], pool);
            let mut out = Vec::new();
            for start in (0..rows).step_by(piece) {
                let end = (start + piece).min(rows);
                state.make_room(end - start).unwrap();
                for (t, head) in (start..end).flat_map(|t| (0..kv_heads).map(move |head| (t, head)))
                {
                    let own = t * dim..(t + 1) * dim;
                    state.put(
                        (layer, head),
                        t,
                        &keys[head][own.clone()],
                        &values[head][own],
                    );
                }
                state.len = end;
                let cache = Cache {
                    blocks: state.blocks(),
                    layer,
                    len: end,
                    kv_heads,
                };
                let queries = &queries[start * heads * dim..end * heads * dim];
                out.extend(attention(queries, cache, heads, dim));
            }
            assert!(max_diff(&out, &expected) < 1e-6, "pieces of {piece}");
        }
    }
}

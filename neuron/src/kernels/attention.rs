//! Causal softmax attention over blocks of keys and values, with grouped query heads.

use super::{add_scaled, dot};
use crate::memory::pool::{BLOCK, Block};
use rayon::prelude::*;
use std::sync::Arc;

/// The keys and values of one sequence in one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cache<'a> {
    /// The sequence's blocks.
    pub(crate) blocks: &'a [Arc<Block>],
    /// The layer's place in each.
    pub(crate) layer: usize,
    /// Tokens in them, those of the queries included.
    pub(crate) len: usize,
    /// Heads that have keys and values.
    pub(crate) kv_heads: usize,
}

/// Attends from the last rows of a sequence to all of it; their keys and values are in the cache already.
///
/// `queries` is `(rows, heads, head_dim)`, normed and rotated; query head `h` reads kv head `h / (heads / kv heads)`.
/// Returns `(rows, heads, head_dim)`. The scores of one row and head at a time are held, never all of them.
#[must_use]
pub(crate) fn attention(
    queries: &[f32],
    cache: Cache<'_>,
    heads: usize,
    head_dim: usize,
) -> Vec<f32> {
    let rows = queries.len() / (heads * head_dim);
    let group = heads / cache.kv_heads;
    let past = cache.len - rows;
    let scale = (head_dim as f32).sqrt().recip();
    let mut out = vec![0.0; queries.len()];
    out.par_chunks_exact_mut(head_dim)
        .zip(queries.par_chunks_exact(head_dim))
        .enumerate()
        .for_each_init(Vec::new, |scores: &mut Vec<f32>, (index, (out, query))| {
            let (row, head) = (index / heads, index % heads);
            let (seen, kv_head) = (past + row + 1, head / group);
            let blocks = &cache.blocks[..seen.div_ceil(BLOCK)];
            scores.clear();
            for block in blocks {
                let keys = block.keys(cache.layer, kv_head).chunks_exact(head_dim);
                scores.extend(keys.map(|key| scale * dot(query, key)));
            }
            scores.truncate(seen); // the rest of the last block is not of this row's past
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            for (scores, block) in scores.chunks(BLOCK).zip(blocks) {
                let values = block.values(cache.layer, kv_head).chunks_exact(head_dim);
                for (score, value) in scores.iter().zip(values) {
                    let weight = (score - top).exp();
                    total += weight;
                    add_scaled(out, weight, value);
                }
            }
            let inverse = 1.0 / total;
            out.iter_mut().for_each(|x| *x *= inverse);
        });
    out
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;
    use crate::memory::pool::{KvPool, KvShape};
    use crate::memory::{LayerState, SequenceState};

    #[test]
    fn every_split_of_the_rows_meets_the_reference() {
        let (rows, heads, kv_heads, dim) = (2 * BLOCK + 3, 6, 2, 5);
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

//! The gated delta rule as a scan over tokens, in place on its state (Yang et al., "Gated Delta Networks", 2024).

use super::dot;
use super::vector::{LANES, Vector, with_vectors};
use rayon::prelude::*;

/// Added to the squared length of queries and keys before they are normalised; fixed by the architecture.
const L2_EPS: f32 = 1e-6;
/// Multiplications below which a second thread costs more than it brings.
const PER_THREAD: usize = 1 << 15;
/// Columns of a state that go through all rows together: with 128 keys 16 KB.
const COLUMNS: usize = SIDES * LANES;
/// Vectors of them.
const SIDES: usize = 4;

/// Sizes of one call.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Key heads; each serves `value / key` value heads, interleaved.
    pub key: usize,
    /// Value heads.
    pub value: usize,
    /// Width of a key and a query.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
}

impl Heads {
    /// Numbers in a row of `[q | k | v]`.
    #[must_use]
    pub fn channels(&self) -> usize {
        2 * self.key * self.key_dim + self.value * self.value_dim
    }
}

/// Runs the rows of one sequence and returns `o`: `(rows, value heads, value dim)`.
///
/// `qkv` is `(rows, channels)` after the convolution; `decay` is `g ≤ 0` and `beta` the write strength, both
/// `(rows, value heads)`; `state` is `S`, `(value heads, key dim, value dim)`. `trail`, empty or
/// `(value heads, rows - 1, key dim · value dim)`, is given what `S` is after each row but the last.
#[must_use]
pub fn delta_rule(
    qkv: &[f32],
    decay: &[f32],
    beta: &[f32],
    state: &mut [f32],
    trail: &mut [f32],
    heads: Heads,
) -> Vec<f32> {
    let (value, value_dim) = (heads.value, heads.value_dim);
    let size = heads.key_dim * value_dim;
    let rows = qkv.len() / heads.channels();
    let mut by_head = vec![0.0; value * rows * value_dim];
    let mut trails: Vec<&mut [f32]> = match trail.len() / value {
        0 => (0..value).map(|_| Default::default()).collect(),
        length => trail.chunks_exact_mut(length).collect(),
    };
    let inputs = Inputs {
        qkv,
        decay,
        beta,
        heads,
    };
    state
        .par_chunks_exact_mut(size)
        .zip(by_head.par_chunks_exact_mut(rows * value_dim))
        .zip(&mut trails)
        .with_min_len((PER_THREAD / (rows * size).max(1)).max(1))
        .enumerate()
        .for_each(|(h, ((state, out), trail))| with_vectors!(head(&inputs, h, state, trail, out)));
    by_token(&by_head, rows, value, value_dim)
}

struct Inputs<'a> {
    qkv: &'a [f32],
    decay: &'a [f32],
    beta: &'a [f32],
    heads: Heads,
}

/// All rows of value head `h`. Columns of its state know nothing of each other: some of them at a time go through all
/// rows, so that they stay in the first cache.
#[inline(always)]
fn head<V: Vector>(
    inputs: &Inputs<'_>,
    h: usize,
    state: &mut [f32],
    trail: &mut [f32],
    out: &mut [f32],
) {
    let Heads {
        key,
        value,
        key_dim,
        value_dim,
    } = inputs.heads;
    let (key_head, channels) = (h / (value / key), inputs.heads.channels());
    let rows = inputs.qkv.len() / channels;
    let mut queries = vec![0.0; rows * key_dim];
    let mut keys = vec![0.0; rows * key_dim];
    for (t, row) in inputs.qkv.chunks_exact(channels).enumerate() {
        let (query, rest) = row.split_at(key * key_dim);
        let own = t * key_dim..(t + 1) * key_dim;
        let scale = (key_dim as f32).sqrt().recip();
        normalise(
            &query[key_head * key_dim..][..key_dim],
            scale,
            &mut queries[own.clone()],
        );
        normalise(&rest[key_head * key_dim..][..key_dim], 1.0, &mut keys[own]);
    }
    // what the step of row `t` needs beside values
    let of_row = |t: usize| {
        let row = t * key_dim..(t + 1) * key_dim;
        let at = t * value + h;
        Step {
            query: &queries[row.clone()],
            key: &keys[row],
            g: inputs.decay[at].exp(),
            beta: inputs.beta[at],
        }
    };
    let values = 2 * key * key_dim + h * value_dim;
    let mut tile = Vec::new();
    for first in (0..value_dim).step_by(COLUMNS) {
        let width = COLUMNS.min(value_dim - first);
        let values = &inputs.qkv[values + first..];
        if let (1, Some(written)) = (rows, values.first_chunk().filter(|_| width == COLUMNS)) {
            // one row reads them once: moving them would cost as much
            let read = of_row(0).run::<V>(&mut state[first..], value_dim, written);
            out[first..first + COLUMNS].copy_from_slice(&read);
            continue;
        }
        let own = |row: usize| row * value_dim + first..row * value_dim + first + width;
        tile.clear();
        for k in 0..key_dim {
            tile.extend_from_slice(&state[own(k)]);
            tile.resize((k + 1) * COLUMNS, 0.0); // columns beyond the state's are zeros, and stay so
        }
        for t in 0..rows {
            let mut written = [0.0; COLUMNS];
            written[..width].copy_from_slice(&values[t * channels..][..width]);
            let read = of_row(t).run::<V>(&mut tile, COLUMNS, &written);
            out[own(t)].copy_from_slice(&read[..width]);
            if let Some(kept) = trail.chunks_exact_mut(key_dim * value_dim).nth(t) {
                for (k, tile) in tile.chunks_exact(COLUMNS).enumerate() {
                    kept[own(k)].copy_from_slice(&tile[..width]);
                }
            }
        }
        for (k, tile) in tile.chunks_exact(COLUMNS).enumerate() {
            state[own(k)].copy_from_slice(&tile[..width]);
        }
    }
}

/// One row's step of a head.
struct Step<'a> {
    query: &'a [f32],
    key: &'a [f32],
    /// `e^g`.
    g: f32,
    beta: f32,
}

impl Step<'_> {
    /// Of [`COLUMNS`] columns, which lie in `tile` with `stride` from key to key: `S ← e^g S;  δ = β (v − Sᵀk);
    /// S ← S + k δᵀ;  o = Sᵀq` (torch_recurrent_gated_delta_rule).
    #[inline(always)]
    fn run<V: Vector>(
        &self,
        tile: &mut [f32],
        stride: usize,
        value: &[f32; COLUMNS],
    ) -> [f32; COLUMNS] {
        let mut held = [V::splat(0.0); SIDES];
        for (k, row) in self.key.iter().zip(tile.chunks(stride)) {
            let (row, _) = row[..COLUMNS].as_chunks::<LANES>();
            let k = V::splat(*k);
            for side in 0..SIDES {
                held[side] = V::load(&row[side]).mul_add(k, held[side]);
            }
        }
        let (g, beta) = (V::splat(self.g), V::splat(self.beta));
        let (value, _) = value.as_chunks::<LANES>();
        let mut delta = held;
        for side in 0..SIDES {
            delta[side] = V::load(&value[side]).sub(g.mul(held[side])).mul(beta);
        }
        let mut read = [V::splat(0.0); SIDES];
        for ((k, q), row) in self.key.iter().zip(self.query).zip(tile.chunks_mut(stride)) {
            let (row, _) = row[..COLUMNS].as_chunks_mut::<LANES>();
            let (k, q) = (V::splat(*k), V::splat(*q));
            for side in 0..SIDES {
                let s = delta[side].mul_add(k, g.mul(V::load(&row[side])));
                s.store(&mut row[side]);
                read[side] = s.mul_add(q, read[side]);
            }
        }
        let mut out = [0.0; COLUMNS];
        for (out, read) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(read) {
            read.store(out);
        }
        out
    }
}

/// `out = x / sqrt(Σx² + eps) · scale`.
#[inline(always)]
fn normalise(x: &[f32], scale: f32, out: &mut [f32]) {
    let scale = scale / (dot(x, x) + L2_EPS).sqrt();
    for (out, x) in out.iter_mut().zip(x) {
        *out = x * scale;
    }
}

/// `(heads, rows, width)` → `(rows, heads, width)`.
fn by_token(by_head: &[f32], rows: usize, heads: usize, width: usize) -> Vec<f32> {
    let mut by_token = vec![0.0; by_head.len()];
    for (h, head) in by_head.chunks_exact((rows * width).max(1)).enumerate() {
        for (t, row) in head.chunks_exact(width).enumerate() {
            by_token[(t * heads + h) * width..][..width].copy_from_slice(row);
        }
    }
    by_token
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;

    /// The same in f64, a head and a token at a time, as the formulas stand.
    fn reference(qkv: &[f32], decay: &[f32], beta: &[f32], heads: Heads) -> (Vec<f64>, Vec<f64>) {
        let Heads {
            key,
            value,
            key_dim,
            value_dim,
        } = heads;
        let rows = qkv.len() / heads.channels();
        let mut out = vec![0.0; rows * value * value_dim];
        let mut state = vec![0.0; value * key_dim * value_dim];
        for t in 0..rows {
            let row: Vec<f64> = qkv[t * heads.channels()..][..heads.channels()]
                .iter()
                .map(|x| f64::from(*x))
                .collect();
            for h in 0..value {
                let unit = |start: usize| -> Vec<f64> {
                    let x = &row[start..start + key_dim];
                    let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                    x.iter().map(|x| x / length).collect()
                };
                let kh = h / (value / key);
                let q: Vec<f64> = unit(kh * key_dim)
                    .iter()
                    .map(|x| x / (key_dim as f64).sqrt())
                    .collect();
                let k = unit((key + kh) * key_dim);
                let v = &row[2 * key * key_dim + h * value_dim..][..value_dim];
                let s = &mut state[h * key_dim * value_dim..][..key_dim * value_dim];
                let g = f64::from(decay[t * value + h]).exp();
                s.iter_mut().for_each(|s| *s *= g);
                for j in 0..value_dim {
                    let read: f64 = (0..key_dim).map(|i| s[i * value_dim + j] * k[i]).sum();
                    let delta = f64::from(beta[t * value + h]) * (v[j] - read);
                    for i in 0..key_dim {
                        s[i * value_dim + j] += k[i] * delta;
                    }
                    out[(t * value + h) * value_dim + j] =
                        (0..key_dim).map(|i| s[i * value_dim + j] * q[i]).sum();
                }
            }
        }
        (out, state)
    }

    #[test]
    fn every_split_of_the_rows_meets_the_reference() {
        let rows = 11;
        for heads in [
            Heads {
                key: 2,
                value: 6,
                key_dim: 5,
                value_dim: 7,
            },
            Heads {
                key: 1,
                value: 1,
                key_dim: 16,
                value_dim: 24,
            },
            Heads {
                key: 1,
                value: 2,
                key_dim: 8,
                value_dim: 2 * COLUMNS + 6,
            },
        ] {
            let qkv = numbers(1, rows * heads.channels());
            let decay: Vec<f32> = numbers(2, rows * heads.value)
                .iter()
                .map(|x| -x.abs())
                .collect();
            let beta: Vec<f32> = numbers(3, rows * heads.value)
                .iter()
                .map(|x| x.abs())
                .collect();
            let (expected, expected_state) = reference(&qkv, &decay, &beta, heads);
            for piece in 1..=rows {
                let size = heads.key_dim * heads.value_dim;
                let mut state = vec![0.0; heads.value * size];
                let mut out = Vec::new();
                for start in (0..rows).step_by(piece) {
                    let end = (start + piece).min(rows);
                    let run = |end: usize, state: &mut [f32], trail: &mut [f32]| {
                        delta_rule(
                            &qkv[start * heads.channels()..end * heads.channels()],
                            &decay[start * heads.value..end * heads.value],
                            &beta[start * heads.value..end * heads.value],
                            state,
                            trail,
                            heads,
                        )
                    };
                    let before = state.clone();
                    let kept = end - start - 1;
                    let mut trail = vec![0.0; heads.value * kept * size];
                    out.extend(run(end, &mut state, &mut trail));
                    for row in 0..kept {
                        let mut part = before.clone();
                        let _ = run(start + row + 1, &mut part, &mut []);
                        for (head, part) in part.chunks_exact(size).enumerate() {
                            let at = (head * kept + row) * size;
                            assert_eq!(trail[at..at + size], *part, "row {row} of {piece}");
                        }
                    }
                }
                assert!(
                    max_diff(&out, &expected) < 1e-5,
                    "{heads:?}, pieces of {piece}"
                );
                assert!(
                    max_diff(&state, &expected_state) < 1e-5,
                    "{heads:?}, pieces of {piece}"
                );
            }
        }
    }
}

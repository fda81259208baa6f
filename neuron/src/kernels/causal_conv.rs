//! The short causal convolution in front of the delta rule.

use super::{by_rows, silu};

/// Channels that go through all taps together, so that they stay in the first cache.
const CHANNELS: usize = 256;

/// `y[t, c] = silu(Σⱼ weight[j, c] · u[t - K + 1 + j, c])`, with `tail` as the inputs before the first row.
///
/// `inputs` is `(rows, channels)`, `weight` `(K, channels)` (transposed from the checkpoint's `(channels, 1, K)`, so
/// that channels lie side by side), `tail` `(K - 1, channels)`, oldest first; it is left as the tail of what came.
#[must_use]
pub fn causal_conv(inputs: &[f32], weight: &[f32], tail: &mut [f32], channels: usize) -> Vec<f32> {
    let taps = weight.len() / channels;
    let past = taps - 1;
    let rows = inputs.len() / channels;
    let mut outputs = vec![0.0; inputs.len()];
    let before = &*tail;
    by_rows(&mut outputs, channels, |first, outputs| {
        for (t, output) in (first..).zip(outputs.chunks_exact_mut(channels)) {
            for (part, output) in output.chunks_mut(CHANNELS).enumerate() {
                let first = part * CHANNELS;
                for (j, weight) in weight.chunks_exact(channels).enumerate() {
                    let input = match (t + j).checked_sub(past) {
                        Some(row) => &inputs[row * channels + first..],
                        None => &before[(t + j) * channels + first..],
                    };
                    for ((y, w), u) in output.iter_mut().zip(&weight[first..]).zip(input) {
                        *y += w * u;
                    }
                }
                output.iter_mut().for_each(|y| *y = silu(*y));
            }
        }
    });
    if rows >= past {
        tail.copy_from_slice(&inputs[(rows - past) * channels..]);
    } else {
        tail.copy_within(rows * channels.., 0);
        tail[(past - rows) * channels..].copy_from_slice(inputs);
    }
    outputs
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;

    #[test]
    fn every_split_of_the_rows_meets_the_reference() {
        let (rows, channels, taps) = (9, 5, 4);
        let (inputs, weight) = (numbers(1, rows * channels), numbers(2, taps * channels));
        let mut expected = Vec::new();
        for t in 0..rows {
            for c in 0..channels {
                let sum: f64 = (0..taps)
                    .filter(|j| t + j >= taps - 1)
                    .map(|j| {
                        f64::from(weight[j * channels + c])
                            * f64::from(inputs[(t + j + 1 - taps) * channels + c])
                    })
                    .sum();
                expected.push(sum / (1.0 + (-sum).exp()));
            }
        }
        for piece in 1..=rows {
            let mut tail = vec![0.0; (taps - 1) * channels];
            let outputs: Vec<f32> = inputs
                .chunks(piece * channels)
                .flat_map(|piece| causal_conv(piece, &weight, &mut tail, channels))
                .collect();
            assert!(max_diff(&outputs, &expected) < 1e-6, "pieces of {piece}");
            assert_eq!(
                tail,
                inputs[(rows + 1 - taps) * channels..],
                "pieces of {piece}"
            );
        }
    }
}

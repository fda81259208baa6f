//! Rotary position embedding of the first dimensions of a head.

/// Rotates the first `2 · frequencies` dimensions in pairs `(i, i + frequencies)`; the others pass.
#[derive(Debug)]
pub struct RotaryEmbedding {
    /// `theta^(-2i/R)`, R the rotated dimensions.
    inverse_frequencies: Vec<f32>,
}

impl RotaryEmbedding {
    /// For heads of which `rotated` dimensions turn.
    #[must_use]
    pub fn new(rotated: usize, theta: f64) -> Self {
        let frequency = |i| theta.powf(-2.0 * f64::from(i) / rotated as f64) as f32;
        Self {
            inverse_frequencies: (0..rotated as u32 / 2).map(frequency).collect(),
        }
    }

    /// For each pair of dimensions, how far it turns from one position to the next.
    #[must_use]
    pub fn inverse_frequencies(&self) -> &[f32] {
        &self.inverse_frequencies
    }

    /// Turns the heads of one token at `position`; `heads` holds whole heads of `head_dim`.
    pub fn rotate(&self, heads: &mut [f32], head_dim: usize, position: usize) {
        let half = self.inverse_frequencies.len();
        let turns: Vec<(f32, f32)> = self
            .inverse_frequencies
            .iter()
            .map(|frequency| (position as f32 * frequency).sin_cos())
            .collect();
        for head in heads.chunks_exact_mut(head_dim) {
            let (first, second) = head[..2 * half].split_at_mut(half);
            for ((x, y), (sin, cos)) in first.iter_mut().zip(second).zip(&turns) {
                // x cos − y sin, y cos + x sin      (rotate_half)
                (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_zero_is_left_alone_and_lengths_are_kept() {
        let rope = RotaryEmbedding::new(4, 1e4);
        let head: Vec<f32> = (1u8..=6).map(f32::from).collect();
        let mut turned = head.clone();
        rope.rotate(&mut turned, 6, 0);
        assert_eq!(turned, head);
        rope.rotate(&mut turned, 6, 3);
        assert_eq!(turned[4..], head[4..], "only the first four turn");
        let length = |x: f32, y: f32| (x * x + y * y).sqrt();
        assert!(
            (length(turned[0], turned[2]) - length(1.0, 3.0)).abs() < 1e-6,
            "{turned:?}"
        );
        assert!(
            (turned[0] - (3f32.cos() - 3.0 * 3f32.sin())).abs() < 1e-6,
            "{turned:?}"
        );
    }
}

//! The shapes of releases, to measure with where no checkpoint is at hand.

use serde_json::{Value, json};
use std::fmt;

/// The shape of a dense release. What is not in it they all share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// Qwen3.5-0.8B.
    #[value(name = "0.8b")]
    B0_8,
    /// Qwen3.5-2B.
    #[value(name = "2b")]
    B2,
    /// Qwen3.5-4B.
    #[value(name = "4b")]
    B4,
    /// Qwen3.5-9B.
    #[value(name = "9b")]
    B9,
    /// Qwen3.5-27B.
    #[value(name = "27b")]
    B27,
}

struct Sizes {
    hidden: usize,
    layers: usize,
    width: usize,
    heads: (usize, usize),
    value_heads: usize,
    tied: bool,
}

impl Shape {
    /// As the table in `shared/reference/ARCHITECTURE.md` of the project's design notes has them.
    fn sizes(self) -> Sizes {
        let sizes = |hidden, layers, width, heads, value_heads, tied| Sizes {
            hidden,
            layers,
            width,
            heads,
            value_heads,
            tied,
        };
        match self {
            Self::B0_8 => sizes(1024, 24, 3584, (8, 2), 16, true),
            Self::B2 => sizes(2048, 24, 6144, (8, 2), 16, true),
            Self::B4 => sizes(2560, 32, 9216, (16, 4), 32, true),
            Self::B9 => sizes(4096, 32, 12_288, (16, 4), 32, false),
            Self::B27 => sizes(5120, 64, 17_408, (24, 4), 48, false),
        }
    }

    /// Numbers in the matrices of its layers: what each token that is read is multiplied with.
    pub(crate) fn layer_weights(self) -> usize {
        let sizes = self.sizes();
        let (hidden, (heads, kv_heads)) = (sizes.hidden, sizes.heads);
        let full = sizes.layers / 4;
        let attention = hidden * 256 * (3 * heads + 2 * kv_heads); // queries and gates, out, keys, values
        let (key, value) = (16 * 128, sizes.value_heads * 128);
        let delta = hidden * (2 * key + 3 * value + 2 * sizes.value_heads);
        let mlp = 3 * hidden * sizes.width;
        full * attention + (sizes.layers - full) * delta + sizes.layers * mlp
    }

    /// What its `config.json` says.
    pub(crate) fn config(self) -> Value {
        let sizes = self.sizes();
        let (heads, kv_heads) = sizes.heads;
        json!({
            "model_type": "qwen3_5_text",
            "vocab_size": 248_320,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": sizes.value_heads,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262_144,
            "tie_word_embeddings": sizes.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000_000,
                "partial_rotary_factor": 0.25,
            },
        })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::B0_8 => "0.8b",
            Self::B2 => "2b",
            Self::B4 => "4b",
            Self::B9 => "9b",
            Self::B27 => "27b",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LoadOptions, load_made_up};
    use crate::parallel::Solo;
    use std::sync::Arc;

    #[test]
    fn the_weights_that_are_counted_are_those_of_the_layers() {
        let options = LoadOptions::cpu();
        let model = load_made_up(Shape::B0_8, &options, Arc::new(Solo), &|_| {}).unwrap();
        let table = 248_320 * 1024;
        let matrices = 2 * (Shape::B0_8.layer_weights() + table) as u64;
        let rest = model.weight_bytes() - matrices; // norms and convolutions in f32
        assert!(rest < matrices / 500, "{rest} of {matrices}");
    }
}

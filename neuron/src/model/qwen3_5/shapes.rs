//! The shapes of releases, to measure with where no checkpoint is at hand.

use serde_json::{Value, json};
use std::fmt;

/// The shape of a release. What is not in it they all share.
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
    /// Qwen3.5-35B-A3B, which has experts.
    #[value(name = "35b-a3b")]
    B35A3,
}

struct Sizes {
    hidden: usize,
    layers: usize,
    width: usize,
    heads: (usize, usize),
    value_heads: usize,
    tied: bool,
    experts: Option<Experts>,
}

/// Of a release with experts, of which one more is for all tokens; all have the width that [`Sizes`] says.
struct Experts {
    count: usize,
    per_token: usize,
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
            experts: None,
        };
        match self {
            Self::B0_8 => sizes(1024, 24, 3584, (8, 2), 16, true),
            Self::B2 => sizes(2048, 24, 6144, (8, 2), 16, true),
            Self::B4 => sizes(2560, 32, 9216, (16, 4), 32, true),
            Self::B9 => sizes(4096, 32, 12_288, (16, 4), 32, false),
            Self::B27 => sizes(5120, 64, 17_408, (24, 4), 48, false),
            Self::B35A3 => Sizes {
                experts: Some(Experts {
                    count: 256,
                    per_token: 8,
                }),
                ..sizes(2048, 40, 512, (16, 2), 32, false)
            },
        }
    }

    /// Numbers in the matrices of its layers that each token is multiplied with.
    pub(crate) fn layer_weights(self) -> usize {
        self.weights_with(self.sizes().experts.map_or(0, |experts| experts.per_token))
    }

    /// Numbers in the matrices of its layers with so many experts in each, where it has experts.
    fn weights_with(self, experts: usize) -> usize {
        let sizes = self.sizes();
        let (hidden, (heads, kv_heads)) = (sizes.hidden, sizes.heads);
        let full = sizes.layers / 4;
        let attention = hidden * 256 * (3 * heads + 2 * kv_heads); // queries and gates, out, keys, values
        let (key, value) = (16 * 128, sizes.value_heads * 128);
        let delta = hidden * (2 * key + 3 * value + 2 * sizes.value_heads);
        let block = 3 * hidden * sizes.width;
        let mlp = match sizes.experts {
            None => block,
            Some(Experts { count, .. }) => (experts + 1) * block + hidden * (count + 1), // the router, and a gate
        };
        full * attention + (sizes.layers - full) * delta + sizes.layers * mlp
    }

    /// What its `config.json` says.
    pub(crate) fn config(self) -> Value {
        let sizes = self.sizes();
        let (heads, kv_heads) = sizes.heads;
        let (kind, experts) = match sizes.experts {
            None => ("qwen3_5_text", json!({"intermediate_size": sizes.width})),
            Some(Experts { count, per_token }) => (
                "qwen3_5_moe_text",
                json!({
                    "num_experts": count,
                    "num_experts_per_tok": per_token,
                    "moe_intermediate_size": sizes.width,
                    "shared_expert_intermediate_size": sizes.width,
                }),
            ),
        };
        let mut config = json!({
            "model_type": kind,
            "vocab_size": 248_320,
            "hidden_size": sizes.hidden,
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
        });
        for (key, value) in experts.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
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
            Self::B35A3 => "35b-a3b",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::rows::Place;
    use crate::model::qwen3_5::Qwen3_5ForCausalLm;
    use crate::model::qwen3_5::config::Config;
    use crate::model::{LoadOptions, load_made_up};
    use crate::parallel::Solo;
    use crate::weights::Weights;
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

    #[test]
    fn a_shape_with_experts_has_the_weights_of_its_name() {
        let shape = Shape::B35A3;
        let text = shape.config().to_string();
        let config = Config::parse("made up".into(), &text, None).unwrap();
        let weights = Weights::made_up("made up", &Place::Cpu, None, Arc::new(Solo), &|_| {});
        let planned = Qwen3_5ForCausalLm::load(config, &weights.planned(), &LoadOptions::cpu());
        let tables = 2 * 248_320 * 2048;
        let matrices = 2 * (shape.weights_with(256) + tables) as u64;
        let rest = planned.unwrap().weight_bytes - matrices;
        assert!(rest < matrices / 500, "{rest} of {matrices}");
        let billions = |count: usize| (count + tables) as f64 / 1e9;
        assert_eq!(billions(shape.weights_with(256)).round(), 35.0);
        assert_eq!(billions(shape.layer_weights()).round(), 3.0);
    }
}

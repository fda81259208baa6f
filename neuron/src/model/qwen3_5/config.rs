//! `config.json`, flat or nested, old keys or new → one checked [`Config`].

use crate::model::LoadError;
use crate::weights::{self, GroupedHeads};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Architectures read here: dense, with experts, and the generation before, which has either.
pub(crate) const MODEL_TYPES: [&str; 5] = [
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
];

/// Which mixer a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LayerKind {
    /// A gated delta net.
    LinearAttention,
    /// Gated softmax attention.
    FullAttention,
}

/// What a layer is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Its mixer.
    pub(crate) kind: LayerKind,
    /// Whether its feed-forward block is a mixture of experts.
    pub(crate) sparse: bool,
}

/// Sizes of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Experts {
    pub(crate) num_experts: usize,
    pub(crate) num_experts_per_tok: usize,
    pub(crate) moe_intermediate_size: usize,
    pub(crate) shared_expert_intermediate_size: usize,
    pub(crate) norm_topk_prob: bool,
}

/// The sizes of a model, checked.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    /// Of dense blocks; 0 where every block has experts.
    pub(crate) intermediate_size: usize,
    pub(crate) layers: Vec<Layer>,
    /// Of sparse blocks.
    pub(crate) experts: Option<Experts>,
    /// Whether the checkpoint may have a layer that drafts the token after next.
    pub(crate) drafts: bool,
    pub(crate) num_attention_heads: usize,
    pub(crate) num_key_value_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rotated_dims: usize,
    pub(crate) rope_theta: f64,
    pub(crate) linear_num_key_heads: usize,
    pub(crate) linear_num_value_heads: usize,
    pub(crate) linear_key_head_dim: usize,
    pub(crate) linear_value_head_dim: usize,
    pub(crate) linear_conv_kernel_dim: usize,
    pub(crate) rms_norm_eps: f32,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) context_length: usize,
}

/// The file: text keys at the top, or under `text_config`.
#[derive(Deserialize)]
struct File {
    text_config: Option<Text>,
    tie_word_embeddings: Option<bool>,
    #[serde(flatten)]
    flat: serde_json::Value,
}

/// The text model's keys; defaults are those of the reference class where it has safe ones.
#[derive(Deserialize)]
struct Text {
    /// Of the text model itself, when it is nested.
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    #[serde(default)]
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    #[serde(default = "default_head_dim")]
    head_dim: usize,
    linear_num_key_heads: usize,
    linear_num_value_heads: usize,
    linear_key_head_dim: usize,
    linear_value_head_dim: usize,
    #[serde(default = "default_taps")]
    linear_conv_kernel_dim: usize,
    layer_types: Option<Vec<LayerKind>>,
    #[serde(default = "default_interval")]
    full_attention_interval: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    tie_word_embeddings: Option<bool>,
    max_position_embeddings: usize,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<serde_json::Value>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    #[serde(default)]
    num_experts: usize,
    #[serde(default)]
    num_experts_per_tok: usize,
    #[serde(default)]
    moe_intermediate_size: usize,
    #[serde(default)]
    shared_expert_intermediate_size: usize,
    norm_topk_prob: Option<bool>,
    #[serde(default = "default_sparse_step")]
    decoder_sparse_step: usize,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    #[serde(default)]
    mtp_num_hidden_layers: usize,
    #[serde(default)]
    mtp_use_dedicated_embeddings: bool,
}

#[derive(Deserialize, Default, Clone)]
struct Rope {
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

fn default_head_dim() -> usize {
    256
}
fn default_taps() -> usize {
    4
}
fn default_interval() -> usize {
    4
}
fn default_sparse_step() -> usize {
    1
}
fn default_eps() -> f64 {
    1e-6
}

impl Config {
    /// Heads of the linear attention, by which some checkpoints group its weights.
    pub(crate) fn grouped_heads(&self) -> GroupedHeads {
        GroupedHeads {
            key: self.linear_num_key_heads,
            value: self.linear_num_value_heads,
            key_dim: self.linear_key_head_dim,
            value_dim: self.linear_value_head_dim,
        }
    }

    /// Reads what the checkpoint in `folder` says of itself; the sequence length is bounded by `context_length` as well.
    ///
    /// # Errors
    /// When a key is missing or asks for something that is not built.
    pub(crate) fn read(folder: &Path, context_length: Option<usize>) -> Result<Self, LoadError> {
        let (file, text) = weights::config(folder)?;
        Self::parse(file, &text, context_length)
    }

    /// Reads `text`, which stands in `file`.
    ///
    /// # Errors
    /// As [`Self::read`], but for reading the file.
    pub(crate) fn parse(
        file: PathBuf,
        text: &str,
        context_length: Option<usize>,
    ) -> Result<Self, LoadError> {
        let json = |source| LoadError::Json {
            file: file.clone(),
            source,
        };
        let parsed: File = serde_json::from_str(text).map_err(json)?;
        let outer_tie = parsed.tie_word_embeddings;
        let keys = match parsed.text_config {
            Some(mut keys) => {
                let outer = parsed.flat.get("model_type").and_then(|name| name.as_str());
                keys.model_type = keys.model_type.or(outer.map(str::to_owned));
                keys
            }
            None => serde_json::from_value(parsed.flat).map_err(json)?,
        };
        check(keys, outer_tie, context_length, file)
    }
}

impl Text {
    fn model_type(&self) -> &str {
        self.model_type.as_deref().unwrap_or_default()
    }

    fn is_next(&self) -> bool {
        self.model_type() == "qwen3_next"
    }

    /// Whether layer `index` has experts: all of a Qwen3.5 with experts, those of Qwen3-Next that its keys leave.
    fn is_sparse(&self, index: usize) -> bool {
        if self.is_next() {
            self.num_experts > 0
                && !self.mlp_only_layers.contains(&index)
                && (index + 1).is_multiple_of(self.decoder_sparse_step)
        } else {
            self.model_type().contains("_moe") && self.num_experts > 0
        }
    }
}

fn check(
    text: Text,
    outer_tie: Option<bool>,
    context_length: Option<usize>,
    file: PathBuf,
) -> Result<Config, LoadError> {
    let refuse = |key: &'static str, what: String| {
        Err(LoadError::Config {
            file: file.clone(),
            key,
            what,
        })
    };
    let rope = text.rope_parameters.clone().unwrap_or_default();
    if let Some(kind) = rope.rope_type.filter(|kind| kind != "default") {
        return refuse(
            "rope_parameters.rope_type",
            format!("\"{kind}\" is not built; only \"default\" is"),
        );
    }
    if text
        .rope_scaling
        .as_ref()
        .is_some_and(|scaling| !scaling.is_null())
    {
        return refuse(
            "rope_scaling",
            "scaled positions are not built; it must be null".into(),
        );
    }
    let Some(rope_theta) = rope.rope_theta.or(text.rope_theta) else {
        return refuse(
            "rope_theta",
            "is missing, and every release has its own".into(),
        );
    };
    if text.attention_bias {
        return refuse(
            "attention_bias",
            "projections with a bias are not built".into(),
        );
    }
    if let Some(act) = text.hidden_act.as_deref().filter(|act| *act != "silu") {
        return refuse(
            "hidden_act",
            format!("\"{act}\" is not built; only \"silu\" is"),
        );
    }
    let factor = rope
        .partial_rotary_factor
        .or(text.partial_rotary_factor)
        .unwrap_or(0.25);
    let rotated_dims = (text.head_dim as f64 * factor) as usize;
    if rotated_dims > text.head_dim || !rotated_dims.is_multiple_of(2) {
        return refuse(
            "partial_rotary_factor",
            format!("{factor} of {} dimensions cannot be rotated", text.head_dim),
        );
    }
    for (key, value) in [
        ("vocab_size", text.vocab_size),
        ("hidden_size", text.hidden_size),
        ("num_hidden_layers", text.num_hidden_layers),
        ("head_dim", text.head_dim),
        (
            "linear_conv_kernel_dim",
            text.linear_conv_kernel_dim.saturating_sub(1),
        ),
        ("full_attention_interval", text.full_attention_interval),
        ("decoder_sparse_step", text.decoder_sparse_step),
        ("linear_key_head_dim", text.linear_key_head_dim),
        ("linear_value_head_dim", text.linear_value_head_dim),
        ("max_position_embeddings", text.max_position_embeddings),
    ] {
        if value == 0 {
            return refuse(key, "is too small".into());
        }
    }
    // many times those of any release; beyond them sizes are garbage, whose products would be no numbers any more
    for (key, value, most) in [
        ("vocab_size", text.vocab_size, 1 << 24),
        ("hidden_size", text.hidden_size, 1 << 17),
        ("intermediate_size", text.intermediate_size, 1 << 20),
        ("num_hidden_layers", text.num_hidden_layers, 1 << 12),
        ("num_attention_heads", text.num_attention_heads, 1 << 10),
        ("head_dim", text.head_dim, 1 << 10),
        (
            "linear_num_value_heads",
            text.linear_num_value_heads,
            1 << 10,
        ),
        ("linear_key_head_dim", text.linear_key_head_dim, 1 << 10),
        ("linear_value_head_dim", text.linear_value_head_dim, 1 << 10),
        (
            "linear_conv_kernel_dim",
            text.linear_conv_kernel_dim,
            1 << 4,
        ),
        ("num_experts", text.num_experts, 1 << 14),
        ("moe_intermediate_size", text.moe_intermediate_size, 1 << 20),
        (
            "shared_expert_intermediate_size",
            text.shared_expert_intermediate_size,
            1 << 20,
        ),
        (
            "max_position_embeddings",
            text.max_position_embeddings,
            1 << 32,
        ),
    ] {
        if value > most {
            return refuse(key, format!("is {value}; at most {most} is read"));
        }
    }
    for (key, many, few) in [
        (
            "num_key_value_heads",
            text.num_attention_heads,
            text.num_key_value_heads,
        ),
        (
            "linear_num_key_heads",
            text.linear_num_value_heads,
            text.linear_num_key_heads,
        ),
    ] {
        if few == 0 || !many.is_multiple_of(few) {
            return refuse(key, format!("{many} heads cannot share {few}"));
        }
    }
    let kinds = text.layer_types.clone().unwrap_or_else(|| {
        (1..=text.num_hidden_layers)
            .map(|place| {
                if place.is_multiple_of(text.full_attention_interval) {
                    LayerKind::FullAttention
                } else {
                    LayerKind::LinearAttention
                }
            })
            .collect()
    });
    if kinds.len() != text.num_hidden_layers {
        return refuse(
            "layer_types",
            format!("names {} layers of {}", kinds.len(), text.num_hidden_layers),
        );
    }
    let layers: Vec<Layer> = kinds
        .into_iter()
        .enumerate()
        .map(|(index, kind)| Layer {
            kind,
            sparse: text.is_sparse(index),
        })
        .collect();
    if layers.iter().any(|layer| layer.sparse) {
        for (key, value) in [
            ("num_experts_per_tok", text.num_experts_per_tok),
            ("moe_intermediate_size", text.moe_intermediate_size),
            (
                "shared_expert_intermediate_size",
                text.shared_expert_intermediate_size,
            ),
        ] {
            if value == 0 {
                return refuse(key, "is missing or 0, and there are experts".into());
            }
        }
        if text.num_experts_per_tok > text.num_experts {
            return refuse(
                "num_experts_per_tok",
                format!(
                    "is {} of {} experts",
                    text.num_experts_per_tok, text.num_experts
                ),
            );
        }
    }
    if layers.iter().any(|layer| !layer.sparse) && text.intermediate_size == 0 {
        return refuse(
            "intermediate_size",
            "is missing or 0, and there are layers without experts".into(),
        );
    }
    if text.mtp_use_dedicated_embeddings {
        return refuse(
            "mtp_use_dedicated_embeddings",
            "an embedding of its own for drafts is not built".into(),
        );
    }
    let own = text.max_position_embeddings;
    Ok(Config {
        vocab_size: text.vocab_size,
        hidden_size: text.hidden_size,
        intermediate_size: text.intermediate_size,
        experts: layers.iter().any(|layer| layer.sparse).then_some(Experts {
            num_experts: text.num_experts,
            num_experts_per_tok: text.num_experts_per_tok,
            moe_intermediate_size: text.moe_intermediate_size,
            shared_expert_intermediate_size: text.shared_expert_intermediate_size,
            // an option of Qwen3-Next alone; Qwen3.5 always does it
            norm_topk_prob: !text.is_next() || text.norm_topk_prob.unwrap_or(true),
        }),
        drafts: text.mtp_num_hidden_layers > 0,
        layers,
        num_attention_heads: text.num_attention_heads,
        num_key_value_heads: text.num_key_value_heads,
        head_dim: text.head_dim,
        rotated_dims,
        rope_theta,
        linear_num_key_heads: text.linear_num_key_heads,
        linear_num_value_heads: text.linear_num_value_heads,
        linear_key_head_dim: text.linear_key_head_dim,
        linear_value_head_dim: text.linear_value_head_dim,
        linear_conv_kernel_dim: text.linear_conv_kernel_dim,
        rms_norm_eps: text.rms_norm_eps as f32,
        // the multimodal class reads the outer flag, the text class the inner; releases set both alike
        tie_word_embeddings: outer_tie.or(text.tie_word_embeddings).unwrap_or(false),
        context_length: context_length.map_or(own, |bound| bound.min(own)),
    })
}

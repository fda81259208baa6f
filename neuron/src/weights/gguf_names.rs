//! What llama.cpp writes into GGUF files, brought to the names, orders and conventions of a Qwen3.5 release.
//!
//! From its converter (`conversion/qwen.py`) and its table of names (`gguf-py/gguf/constants.py`):
//! * zero-centred norms are stored as 1 + w, the gated norm as it is; `ssm_a` is −exp(A_log)
//! * `qwen35` and `qwen35moe`: value heads are tiled, head j of every key head before head j + 1 of any, in every tensor
//!   that has value heads; a release has all heads of a key head together
//! * `qwen3next`: value heads in the order of the release; queries, keys, values and gates no longer grouped by key head,
//!   `ssm_ba` still so
//! * experts stacked; the layer that drafts is the block after the last, its own tensors below `nextn`

use super::checkpoint::{Change, Entry, Stored};
use super::gguf::{Gguf, GgufError, Kind};
use super::names::GroupedHeads;
use serde_json::{Value, json};
use std::ops::Range;

/// `config.json` as a release of the same model has it, as far as it is read.
pub(super) fn config(file: &Gguf) -> Result<Value, GgufError> {
    let missing = |key: &str| GgufError::Value(key.to_owned());
    let architecture = file
        .text("general.architecture")
        .ok_or_else(|| missing("general.architecture"))?;
    let model_type = match architecture {
        "qwen35" => "qwen3_5_text",
        "qwen35moe" => "qwen3_5_moe_text",
        "qwen3next" => "qwen3_next",
        other => return Ok(json!({"model_type": other})),
    };
    let full = |key: &str| format!("{architecture}.{key}");
    let may = |key: &str| file.whole(&full(key));
    let must = |key: &str| may(key).ok_or_else(|| missing(&full(key)));
    let real = |key: &str| file.real(&full(key)).ok_or_else(|| missing(&full(key)));
    let drafts = may("nextn_predict_layers").unwrap_or(0);
    let blocks = must("block_count")?;
    let layers = blocks
        .checked_sub(drafts)
        .filter(|_| blocks <= file.tensors().len() as u64)
        .ok_or_else(|| missing(&full("block_count")))?;
    let (heads, value_heads) = (must("attention.key_length")?, must("ssm.time_step_rank")?);
    let value_dim = must("ssm.inner_size")?
        .checked_div(value_heads)
        .ok_or_else(|| missing(&full("ssm.time_step_rank")))?;
    let rotated = must("rope.dimension_count")? as f64 / heads.max(1) as f64;
    let vocabulary = file.shape("token_embd.weight").and_then(<[usize]>::first);
    let dense = file.tensors().iter().filter_map(|tensor| {
        let block = tensor.name.strip_prefix("blk.")?;
        block.strip_suffix(".ffn_up.weight")?.parse::<u64>().ok()
    });
    let mut config = json!({
        "model_type": model_type,
        "vocab_size": vocabulary.ok_or_else(|| missing("token_embd.weight"))?,
        "hidden_size": must("embedding_length")?,
        "intermediate_size": may("feed_forward_length").unwrap_or(0),
        "num_hidden_layers": layers,
        "mtp_num_hidden_layers": drafts,
        "num_attention_heads": must("attention.head_count")?,
        "num_key_value_heads": must("attention.head_count_kv")?,
        "head_dim": heads,
        "linear_num_key_heads": must("ssm.group_count")?,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": must("ssm.state_size")?,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": must("ssm.conv_kernel")?,
        "full_attention_interval": may("full_attention_interval").unwrap_or(4),
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon")?,
        "max_position_embeddings": must("context_length")?,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": real("rope.freq_base")?,
            "partial_rotary_factor": rotated,
        },
        "tie_word_embeddings": file.shape("output.weight").is_none(),
        "num_experts": may("expert_count").unwrap_or(0),
        "num_experts_per_tok": may("expert_used_count").unwrap_or(0),
        "moe_intermediate_size": may("expert_feed_forward_length").unwrap_or(0),
        "shared_expert_intermediate_size": may("expert_shared_feed_forward_length").unwrap_or(0),
        "mlp_only_layers": dense.collect::<Vec<_>>(),
    });
    let scaling = file.text(&full("rope.scaling.type"));
    if let Some(scaling) = scaling.filter(|kind| *kind != "none") {
        config["rope_parameters"]["rope_type"] = scaling.into();
    }
    if let Some(recurrent) = file.wholes(&full("attention.recurrent_layers")) {
        let kinds = recurrent.into_iter().take(layers as usize);
        let kinds = kinds.map(|recurrent| match recurrent {
            0 => "full_attention",
            _ => "linear_attention",
        });
        config["layer_types"] = kinds.collect();
    }
    Ok(config)
}

/// The tensors of `file`, the `index`th of a model whose first is `first`, under the names of a release, in its orders.
pub(super) fn entries(
    file: &Gguf,
    first: &Gguf,
    index: usize,
    heads: GroupedHeads,
) -> Vec<(String, Entry)> {
    let architecture = first.text("general.architecture").unwrap_or_default();
    let key = |key: &str| first.whole(&format!("{architecture}.{key}")).unwrap_or(0);
    let layers = key("block_count").saturating_sub(key("nextn_predict_layers"));
    let tiled = architecture != "qwen3next" && heads.value != heads.key;
    let named = file.tensors().iter().map(|tensor| {
        let entry = Entry {
            file: index,
            stored: match &tensor.kind {
                Kind::Format(format) => Stored::Format(*format),
                Kind::Other(number) => Stored::Other(format!("of ggml's type {number}")),
            },
            shape: tensor.shape.clone(),
            bytes: std::iter::once(tensor.bytes.clone()).collect(),
            columns: Vec::new(),
            change: Change::None,
        };
        name_of(&tensor.name, entry, layers, tiled.then_some(heads))
    });
    named.flatten().collect()
}

/// A tensor under its own name or names; `tiled` are the heads where value heads are out of order.
fn name_of(
    name: &str,
    entry: Entry,
    layers: u64,
    tiled: Option<GroupedHeads>,
) -> Vec<(String, Entry)> {
    let one = |name: String, entry| vec![(name, entry)];
    match name {
        "token_embd.weight" => return one("model.embed_tokens.weight".into(), entry),
        "output.weight" => return one("lm_head.weight".into(), entry),
        "output_norm.weight" => return one("model.norm.weight".into(), centred(entry)),
        _ => {}
    }
    let block = name.strip_prefix("blk.").and_then(|rest| {
        let (block, rest) = rest.split_once('.')?;
        Some((block.parse::<u64>().ok()?, rest))
    });
    let Some((block, rest)) = block else {
        return one(name.into(), entry);
    };
    let path = match block.checked_sub(layers) {
        None => format!("model.layers.{block}"),
        Some(draft) => format!("mtp.layers.{draft}"),
    };
    let heads =
        |entry: Entry, before: fn(&GroupedHeads) -> usize, width: fn(&GroupedHeads) -> usize| {
            match &tiled {
                Some(heads) => in_order(entry, heads, before(heads), width(heads)),
                None => entry,
            }
        };
    let (no_keys, keys) = (
        |_: &GroupedHeads| 0,
        |heads: &GroupedHeads| 2 * heads.key * heads.key_dim,
    );
    let (single, wide) = (|_: &GroupedHeads| 1, |heads: &GroupedHeads| heads.value_dim);
    let experts = |part: &str, entry: &Entry| {
        let count = entry.shape.first().copied().unwrap_or(0);
        // of numbers that are not read, whose count nothing vouches for, one is enough to be refused by name
        let count = if entry.bytes[0].is_empty() { 1 } else { count };
        (0..count)
            .map(|expert| {
                let name = format!("{path}.mlp.experts.{expert}.{part}.weight");
                (name, entry.part(expert))
            })
            .collect()
    };
    let (own, entry) = match rest {
        "attn_norm.weight" => ("input_layernorm.weight", centred(entry)),
        "post_attention_norm.weight" => ("post_attention_layernorm.weight", centred(entry)),
        "attn_q.weight" => ("self_attn.q_proj.weight", entry),
        "attn_k.weight" => ("self_attn.k_proj.weight", entry),
        "attn_v.weight" => ("self_attn.v_proj.weight", entry),
        "attn_output.weight" => ("self_attn.o_proj.weight", entry),
        "attn_q_norm.weight" => ("self_attn.q_norm.weight", centred(entry)),
        "attn_k_norm.weight" => ("self_attn.k_norm.weight", centred(entry)),
        "attn_qkv.weight" => ("linear_attn.in_proj_qkv.weight", heads(entry, keys, wide)),
        "attn_gate.weight" => ("linear_attn.in_proj_z.weight", heads(entry, no_keys, wide)),
        "ssm_in.weight" => ("linear_attn.in_proj_qkvz.weight", entry),
        "ssm_ba.weight" => ("linear_attn.in_proj_ba.weight", entry),
        "ssm_beta.weight" => (
            "linear_attn.in_proj_b.weight",
            heads(entry, no_keys, single),
        ),
        "ssm_alpha.weight" => (
            "linear_attn.in_proj_a.weight",
            heads(entry, no_keys, single),
        ),
        "ssm_conv1d.weight" => {
            let mut entry = heads(entry, keys, wide);
            if let [channels, taps] = entry.shape[..] {
                entry.shape = vec![channels, 1, taps];
            }
            ("linear_attn.conv1d.weight", entry)
        }
        "ssm_dt.bias" => ("linear_attn.dt_bias", heads(entry, no_keys, single)),
        "ssm_a" => {
            let mut entry = heads(entry, no_keys, single);
            entry.change = Change::LogOfNegative;
            ("linear_attn.A_log", entry)
        }
        "ssm_norm.weight" => ("linear_attn.norm.weight", entry),
        "ssm_out.weight" => {
            let mut entry = entry;
            if let (Some(heads), [_, width]) = (&tiled, &entry.shape[..])
                && *width == heads.value * heads.value_dim
                && !entry.bytes[0].is_empty()
            {
                entry.columns = order(heads, 0, heads.value_dim);
            }
            ("linear_attn.out_proj.weight", entry)
        }
        "ffn_gate.weight" => ("mlp.gate_proj.weight", entry),
        "ffn_up.weight" => ("mlp.up_proj.weight", entry),
        "ffn_down.weight" => ("mlp.down_proj.weight", entry),
        "ffn_gate_inp.weight" => ("mlp.gate.weight", entry),
        "ffn_gate_inp_shexp.weight" => {
            let mut entry = entry;
            if let [width] = entry.shape[..] {
                entry.shape = vec![1, width];
            }
            ("mlp.shared_expert_gate.weight", entry)
        }
        "ffn_gate_shexp.weight" => ("mlp.shared_expert.gate_proj.weight", entry),
        "ffn_up_shexp.weight" => ("mlp.shared_expert.up_proj.weight", entry),
        "ffn_down_shexp.weight" => ("mlp.shared_expert.down_proj.weight", entry),
        "ffn_gate_up_exps.weight" => ("mlp.experts.gate_up_proj", entry),
        "ffn_gate_exps.weight" if entry.shape.len() == 3 => return experts("gate_proj", &entry),
        "ffn_up_exps.weight" if entry.shape.len() == 3 => return experts("up_proj", &entry),
        "ffn_down_exps.weight" if entry.shape.len() == 3 => return experts("down_proj", &entry),
        "nextn.eh_proj.weight" => return one("mtp.fc.weight".into(), entry),
        "nextn.enorm.weight" => {
            return one("mtp.pre_fc_norm_embedding.weight".into(), centred(entry));
        }
        "nextn.hnorm.weight" => {
            return one("mtp.pre_fc_norm_hidden.weight".into(), centred(entry));
        }
        "nextn.shared_head_norm.weight" => {
            return one("mtp.norm.weight".into(), centred(entry));
        }
        _ => return one(name.into(), entry),
    };
    one(format!("{path}.{own}"), entry)
}

/// A norm's weight as a release has it: less one.
fn centred(entry: Entry) -> Entry {
    Entry {
        change: Change::LessOne,
        ..entry
    }
}

/// Where the value heads of a release lie in a file that has them tiled: `before` rows of other things, then heads of
/// `width` rows.
fn order(heads: &GroupedHeads, before: usize, width: usize) -> Vec<Range<usize>> {
    let each = heads.value / heads.key;
    let places = (0..heads.key).flat_map(|key| (0..each).map(move |own| own * heads.key + key));
    let heads = places.map(|place| before + place * width..before + (place + 1) * width);
    std::iter::once(0..before).chain(heads).collect()
}

/// Rows with value heads in the order of a release; a tensor of another size stays as it is, and is then refused.
fn in_order(entry: Entry, heads: &GroupedHeads, before: usize, width: usize) -> Entry {
    let read = !entry.bytes[0].is_empty();
    if read && entry.shape.first() == Some(&(before + heads.value * width)) {
        entry.rows(&order(heads, before, width))
    } else {
        entry
    }
}

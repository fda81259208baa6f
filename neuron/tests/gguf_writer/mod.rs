//! Writes a checkpoint in Hugging Face layout as the GGUF file that llama.cpp's converter makes of it: names, orders of
//! heads, norms of one more, signs of decay. From `conversion/{base,qwen}.py` of llama.cpp as of November 2026.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, safetensors};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

/// The model in `folder` as one file at `out`, matrices in `kind` where their rows are whole blocks of it.
pub(crate) fn convert(folder: &Path, kind: GgmlDType, out: &Path) {
    let config = config(folder);
    let mut file = Writer::default();
    header(&mut file, &config);
    if folder.join("tokenizer.json").is_file() {
        tokenizer(&mut file, folder, &config);
    }
    let mut tensors = checkpoint(folder);
    stack_experts(&mut tensors);
    for (name, tensor) in &tensors {
        for (name, tensor) in converted(name, tensor, &config) {
            file.tensor(&name, &tensor, kind);
        }
    }
    fs::write(out, file.finish()).unwrap();
}

struct Config {
    keys: Value,
    architecture: &'static str,
}

impl Config {
    fn whole(&self, key: &str) -> Option<usize> {
        self.keys[key].as_u64().map(|number| number as usize)
    }

    fn must(&self, key: &str) -> usize {
        self.whole(key).unwrap_or_else(|| panic!("{key}"))
    }

    fn rope(&self, key: &str) -> Option<f64> {
        self.keys["rope_parameters"][key]
            .as_f64()
            .or(self.keys[key].as_f64())
    }
}

fn config(folder: &Path) -> Config {
    let text = fs::read_to_string(folder.join("config.json")).unwrap();
    let outer: Value = serde_json::from_str(&text).unwrap();
    let mut keys = outer.clone();
    if outer["text_config"].is_object() {
        keys = outer["text_config"].clone();
        keys["tie_word_embeddings"] = outer["tie_word_embeddings"].clone();
    }
    let model_type = keys["model_type"].as_str().unwrap().to_owned();
    let architecture = match model_type.as_str() {
        "qwen3_next" => "qwen3next",
        name if name.contains("moe") => "qwen35moe",
        _ => "qwen35",
    };
    Config { keys, architecture }
}

fn header(file: &mut Writer, config: &Config) {
    let name = config.architecture;
    file.text("general.architecture", name);
    let drafts = if name == "qwen3next" {
        0
    } else {
        config.whole("mtp_num_hidden_layers").unwrap_or(0)
    };
    if drafts > 0 {
        file.whole(&format!("{name}.nextn_predict_layers"), drafts);
    }
    let blocks = config.must("num_hidden_layers") + drafts;
    file.whole(&format!("{name}.block_count"), blocks);
    for (key, own) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        (
            "expert_shared_feed_forward_length",
            "shared_expert_intermediate_size",
        ),
        ("ssm.state_size", "linear_key_head_dim"),
        ("ssm.group_count", "linear_num_key_heads"),
        ("ssm.time_step_rank", "linear_num_value_heads"),
    ] {
        if let Some(number) = config.whole(own) {
            file.whole(&format!("{name}.{key}"), number);
        }
    }
    let taps = config.whole("linear_conv_kernel_dim").unwrap_or(4);
    file.whole(&format!("{name}.ssm.conv_kernel"), taps);
    let inner = config.must("linear_value_head_dim") * config.must("linear_num_value_heads");
    file.whole(&format!("{name}.ssm.inner_size"), inner);
    let interval = config.whole("full_attention_interval").unwrap_or(4);
    file.whole(&format!("{name}.full_attention_interval"), interval);
    let factor = config.rope("partial_rotary_factor").unwrap_or(0.25);
    let rotated = (config.must("head_dim") as f64 * factor) as usize;
    file.whole(&format!("{name}.rope.dimension_count"), rotated);
    file.real(
        &format!("{name}.rope.freq_base"),
        config.rope("rope_theta").unwrap(),
    );
    file.real(
        &format!("{name}.attention.layer_norm_rms_epsilon"),
        config.keys["rms_norm_eps"].as_f64().unwrap(),
    );
}

fn tokenizer(file: &mut Writer, folder: &Path, config: &Config) {
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
    };
    let source = read("tokenizer.json");
    let mut tokens = BTreeMap::new();
    for (token, id) in source["model"]["vocab"].as_object().unwrap() {
        tokens.insert(id.as_u64().unwrap(), (token.clone(), 1));
    }
    for token in source["added_tokens"].as_array().unwrap() {
        let content = token["content"].as_str().unwrap();
        let looks_special = content.starts_with("<|") && content.ends_with("|>");
        let special = token["special"].as_bool().unwrap() || looks_special;
        let kind = if special { 3 } else { 4 };
        tokens.insert(token["id"].as_u64().unwrap(), (content.to_owned(), kind));
    }
    for id in 0..config.must("vocab_size") as u64 {
        tokens.entry(id).or_insert((format!("[PAD{id}]"), 5));
    }
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "qwen35");
    let texts: Vec<&str> = tokens.values().map(|(token, _)| &token[..]).collect();
    file.texts("tokenizer.ggml.tokens", &texts);
    let kinds: Vec<i32> = tokens.values().map(|(_, kind)| *kind).collect();
    file.wholes("tokenizer.ggml.token_type", &kinds);
    let merges = source["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> = merges
        .map(|pair| match pair {
            Value::String(pair) => pair.clone(),
            pair => format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            ),
        })
        .collect();
    let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
    file.texts("tokenizer.ggml.merges", &merges);
    let settings = read("tokenizer_config.json");
    let ends = settings["eos_token"].as_str().unwrap();
    let (end, _) = tokens.iter().find(|(_, (token, _))| token == ends).unwrap();
    file.whole("tokenizer.ggml.eos_token_id", *end as usize);
    let template = fs::read_to_string(folder.join("chat_template.jinja")).unwrap();
    file.text("tokenizer.chat_template", &template);
}

fn checkpoint(folder: &Path) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let tensors: HashMap<String, Tensor> = safetensors::load(&path, &Device::Cpu).unwrap();
        for (name, tensor) in tensors {
            let name = name.replace("model.language_model.", "model.");
            if !name.starts_with("model.visual.") {
                all.insert(name, tensor.to_dtype(DType::F32).unwrap());
            }
        }
    }
    all
}

/// One tensor for all experts, where there is one for each.
fn stack_experts(tensors: &mut BTreeMap<String, Tensor>) {
    let mut stacks: BTreeMap<String, BTreeMap<usize, Tensor>> = BTreeMap::new();
    tensors.retain(|name, tensor| {
        let parts = name.split_once(".mlp.experts.");
        let parts = parts.and_then(|(path, rest)| Some((path, rest.split_once('.')?)));
        let Some((path, (expert, part))) = parts else {
            return true;
        };
        let Ok(expert) = expert.parse() else {
            return true;
        };
        let stack = stacks
            .entry(format!("{path}.mlp.experts.{part}"))
            .or_default();
        stack.insert(expert, tensor.clone());
        false
    });
    for (name, stack) in stacks {
        let stack: Vec<_> = stack.into_values().collect();
        tensors.insert(name, Tensor::stack(&stack, 0).unwrap());
    }
}

/// What the converter makes of a tensor.
fn converted(name: &str, tensor: &Tensor, config: &Config) -> Vec<(String, Tensor)> {
    let tensor = tensor.clone();
    let draft_block = config.must("num_hidden_layers");
    let next = config.architecture == "qwen3next";
    if name.starts_with("mtp.") && next {
        return Vec::new();
    }
    let name = match name.strip_prefix("mtp.") {
        None => name.to_owned(),
        Some("fc.weight") => format!("model.layers.{draft_block}.eh_proj.weight"),
        Some("pre_fc_norm_embedding.weight") => format!("model.layers.{draft_block}.enorm.weight"),
        Some("pre_fc_norm_hidden.weight") => format!("model.layers.{draft_block}.hnorm.weight"),
        Some("norm.weight") => format!("model.layers.{draft_block}.shared_head.norm.weight"),
        Some(rest) => format!(
            "model.{}",
            rest.replacen("layers.0", &format!("layers.{draft_block}"), 1)
        ),
    };
    let mut tensor = tensor;
    if name.ends_with("norm.weight") && !name.ends_with("linear_attn.norm.weight") {
        tensor = (tensor + 1.0).unwrap();
    }
    if name.ends_with("A_log") {
        tensor = tensor.exp().unwrap().neg().unwrap();
    }
    if name.ends_with("conv1d.weight") {
        tensor = tensor.squeeze(1).unwrap();
    }
    if name.ends_with("shared_expert_gate.weight") {
        tensor = tensor.squeeze(0).unwrap();
    }
    let fixed = match name.as_str() {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(fixed) = fixed {
        return vec![(fixed.into(), tensor)];
    }
    let (block, rest) = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'))
        .unwrap_or_else(|| panic!("{name}"));
    let block = |own: &str, tensor: Tensor| (format!("blk.{block}.{own}"), tensor);
    let heads = Heads::of(config);
    if !next && rest.starts_with("linear_attn.") {
        tensor = heads.tiled(rest, &tensor);
    }
    if rest == "linear_attn.in_proj_qkvz.weight" {
        let [q, k, v, z] = heads.ungrouped(&tensor);
        let qkv = Tensor::cat(&[q, k, v], 0).unwrap();
        return vec![block("attn_qkv.weight", qkv), block("attn_gate.weight", z)];
    }
    if rest == "mlp.experts.gate_up_proj" {
        let half = tensor.dim(1).unwrap() / 2;
        let part = |at| tensor.narrow(1, at * half, half).unwrap();
        return vec![
            block("ffn_gate_exps.weight", part(0)),
            block("ffn_up_exps.weight", part(1)),
        ];
    }
    let own = match rest {
        "input_layernorm.weight" => "attn_norm.weight",
        "post_attention_layernorm.weight" => "post_attention_norm.weight",
        "self_attn.q_proj.weight" => "attn_q.weight",
        "self_attn.k_proj.weight" => "attn_k.weight",
        "self_attn.v_proj.weight" => "attn_v.weight",
        "self_attn.o_proj.weight" => "attn_output.weight",
        "self_attn.q_norm.weight" => "attn_q_norm.weight",
        "self_attn.k_norm.weight" => "attn_k_norm.weight",
        "linear_attn.in_proj_qkv.weight" => "attn_qkv.weight",
        "linear_attn.in_proj_z.weight" => "attn_gate.weight",
        "linear_attn.in_proj_b.weight" => "ssm_beta.weight",
        "linear_attn.in_proj_a.weight" => "ssm_alpha.weight",
        "linear_attn.in_proj_ba.weight" => "ssm_ba.weight",
        "linear_attn.conv1d.weight" => "ssm_conv1d.weight",
        "linear_attn.dt_bias" => "ssm_dt.bias",
        "linear_attn.A_log" => "ssm_a",
        "linear_attn.norm.weight" => "ssm_norm.weight",
        "linear_attn.out_proj.weight" => "ssm_out.weight",
        "mlp.gate_proj.weight" => "ffn_gate.weight",
        "mlp.up_proj.weight" => "ffn_up.weight",
        "mlp.down_proj.weight" => "ffn_down.weight",
        "mlp.gate.weight" => "ffn_gate_inp.weight",
        "mlp.shared_expert_gate.weight" => "ffn_gate_inp_shexp.weight",
        "mlp.shared_expert.gate_proj.weight" => "ffn_gate_shexp.weight",
        "mlp.shared_expert.up_proj.weight" => "ffn_up_shexp.weight",
        "mlp.shared_expert.down_proj.weight" => "ffn_down_shexp.weight",
        "mlp.experts.gate_proj.weight" => "ffn_gate_exps.weight",
        "mlp.experts.up_proj.weight" => "ffn_up_exps.weight",
        "mlp.experts.down_proj.weight" | "mlp.experts.down_proj" => "ffn_down_exps.weight",
        "eh_proj.weight" => "nextn.eh_proj.weight",
        "enorm.weight" => "nextn.enorm.weight",
        "hnorm.weight" => "nextn.hnorm.weight",
        "shared_head.norm.weight" => "nextn.shared_head_norm.weight",
        other => panic!("{other}"),
    };
    vec![block(own, tensor)]
}

struct Heads {
    key: usize,
    value: usize,
    key_dim: usize,
    value_dim: usize,
}

impl Heads {
    fn of(config: &Config) -> Self {
        Self {
            key: config.must("linear_num_key_heads"),
            value: config.must("linear_num_value_heads"),
            key_dim: config.must("linear_key_head_dim"),
            value_dim: config.must("linear_value_head_dim"),
        }
    }

    /// Value heads along `dim`, `width` numbers each: (key heads, heads each) becomes (heads each, key heads).
    fn reordered(&self, tensor: &Tensor, dim: usize, width: usize) -> Tensor {
        let shape = tensor.dims().to_vec();
        let mut split = shape[..dim].to_vec();
        split.extend([self.key, self.value / self.key, width]);
        split.extend(&shape[dim + 1..]);
        let tensor = tensor.reshape(split).unwrap();
        let swapped = tensor.transpose(dim, dim + 1).unwrap();
        swapped.contiguous().unwrap().reshape(shape).unwrap()
    }

    fn tiled(&self, name: &str, tensor: &Tensor) -> Tensor {
        let keys = 2 * self.key * self.key_dim;
        let values = self.value * self.value_dim;
        match name.strip_prefix("linear_attn.").unwrap() {
            "in_proj_qkv.weight" | "conv1d.weight" => {
                let before = tensor.narrow(0, 0, keys).unwrap();
                let after = tensor.narrow(0, keys, values).unwrap();
                Tensor::cat(&[before, self.reordered(&after, 0, self.value_dim)], 0).unwrap()
            }
            "in_proj_z.weight" => self.reordered(tensor, 0, self.value_dim),
            "in_proj_b.weight" | "in_proj_a.weight" | "A_log" | "dt_bias" => {
                self.reordered(tensor, 0, 1)
            }
            "out_proj.weight" => self.reordered(tensor, 1, self.value_dim),
            _ => tensor.clone(),
        }
    }

    /// q, k, v and z of rows that are grouped by key head.
    fn ungrouped(&self, tensor: &Tensor) -> [Tensor; 4] {
        let values = self.value / self.key * self.value_dim;
        let hidden = tensor.dim(1).unwrap();
        let group = 2 * self.key_dim + 2 * values;
        let grouped = tensor.reshape((self.key, group, hidden)).unwrap();
        let part = |start, width| {
            let part = grouped
                .narrow(1, start, width)
                .unwrap()
                .contiguous()
                .unwrap();
            part.reshape((self.key * width, hidden)).unwrap()
        };
        [
            part(0, self.key_dim),
            part(self.key_dim, self.key_dim),
            part(2 * self.key_dim, values),
            part(2 * self.key_dim + values, values),
        ]
    }
}

/// Where tensors begin.
const ALIGNMENT: usize = 32;

#[derive(Default)]
struct Writer {
    values: (u64, Vec<u8>),
    tensors: (u64, Vec<u8>),
    data: Vec<u8>,
}

impl Writer {
    fn put(&mut self, key: &str, kind: u32, bytes: &[u8]) {
        self.values.0 += 1;
        push_text(&mut self.values.1, key);
        self.values.1.extend(kind.to_le_bytes());
        self.values.1.extend(bytes);
    }

    fn text(&mut self, key: &str, text: &str) {
        let mut bytes = Vec::new();
        push_text(&mut bytes, text);
        self.put(key, 8, &bytes);
    }

    fn whole(&mut self, key: &str, number: usize) {
        self.put(key, 4, &(number as u32).to_le_bytes());
    }

    fn real(&mut self, key: &str, number: f64) {
        self.put(key, 6, &(number as f32).to_le_bytes());
    }

    fn texts(&mut self, key: &str, texts: &[&str]) {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((texts.len() as u64).to_le_bytes());
        texts.iter().for_each(|text| push_text(&mut bytes, text));
        self.put(key, 9, &bytes);
    }

    fn wholes(&mut self, key: &str, numbers: &[i32]) {
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend((numbers.len() as u64).to_le_bytes());
        numbers
            .iter()
            .for_each(|number| bytes.extend(number.to_le_bytes()));
        self.put(key, 9, &bytes);
    }

    /// As the converter decides: a matrix in `kind`, but for those that are small; all else in f32.
    fn tensor(&mut self, name: &str, tensor: &Tensor, kind: GgmlDType) {
        let dims = tensor.dims();
        let small = ["ffn_gate_inp", "ssm_", "_norm", "ssm_conv1d"];
        let small = small.iter().any(|part| name.contains(part)) && !name.contains("ssm_out");
        let whole = dims
            .last()
            .is_some_and(|width| width.is_multiple_of(kind.block_size()));
        let kind = if dims.len() < 2 || small || !whole {
            GgmlDType::F32
        } else {
            kind
        };
        let held = QTensor::quantize(&tensor.flatten_all().unwrap(), kind).unwrap();
        self.data
            .resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.tensors.0 += 1;
        let table = &mut self.tensors.1;
        push_text(table, name);
        table.extend((dims.len() as u32).to_le_bytes());
        dims.iter()
            .rev()
            .for_each(|size| table.extend((*size as u64).to_le_bytes()));
        let number: u32 = match kind {
            GgmlDType::F32 => 0,
            GgmlDType::F16 => 1,
            GgmlDType::Q4_0 => 2,
            GgmlDType::Q8_0 => 8,
            GgmlDType::Q4K => 12,
            GgmlDType::Q5K => 13,
            GgmlDType::Q6K => 14,
            GgmlDType::BF16 => 30,
            other => panic!("{other:?}"),
        };
        table.extend(number.to_le_bytes());
        table.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend_from_slice(&held.data().unwrap());
    }

    fn finish(self) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(self.tensors.0.to_le_bytes());
        bytes.extend(self.values.0.to_le_bytes());
        bytes.extend(self.values.1);
        bytes.extend(self.tensors.1);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(self.data);
        bytes
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

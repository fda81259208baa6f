//! `bench model`: a checkpoint of random numbers in the shape of a release, to measure loading and speed with.

use anyhow::Context;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// What to write.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Which release's shape.
    #[arg(long, value_enum, default_value_t = Shape::B0_8)]
    shape: Shape,
    /// A folder whose tokenizer and template it gets; any of a Qwen3.5 will do.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "tests/fixtures/models/qwen3_5_text"
    )]
    tokenizer: PathBuf,
    /// The folder to make.
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

/// Sizes of a release.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Shape {
    /// Qwen3.5-0.8B: 1.5 GB.
    #[value(name = "0.8b")]
    B0_8,
    /// Qwen3.5-2B: 3.8 GB.
    #[value(name = "2b")]
    B2,
}

impl Shape {
    /// Hidden size and width of the dense blocks; the two releases share everything else.
    fn sizes(self) -> (usize, usize) {
        match self {
            Self::B0_8 => (1024, 3584),
            Self::B2 => (2048, 6144),
        }
    }
}

const LAYERS: usize = 24;
const VOCABULARY: usize = 248_320;
const HEAD: usize = 256;
const HEADS: usize = 8;
const KEY_VALUE_HEADS: usize = 2;
const LINEAR_HEADS: usize = 16;
const LINEAR_HEAD: usize = 128;
const TAPS: usize = 4;
/// Files of the tokenizer's folder that are taken as they are.
const COPIED: [&str; 4] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Writes it.
pub(crate) fn write(args: &ModelArgs) -> anyhow::Result<()> {
    let out = &args.out;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    for file in COPIED {
        let from = args.tokenizer.join(file);
        fs::copy(&from, out.join(file))
            .with_context(|| format!("cannot copy {}", from.display()))?;
    }
    let (hidden, width) = args.shape.sizes();
    let config = serde_json::to_string_pretty(&config(hidden, width))?;
    fs::write(out.join("config.json"), config)?;
    let tensors = tensors(hidden, width);
    let bytes = safetensors(&tensors, &out.join("model.safetensors"))?;
    let numbers: usize = tensors.iter().map(Tensor::count).sum();
    println!(
        "{}: {} tensors, {:.2} G numbers, {:.2} GB",
        out.display(),
        tensors.len(),
        numbers as f64 / 1e9,
        bytes as f64 / 1e9
    );
    Ok(())
}

fn config(hidden: usize, width: usize) -> Value {
    json!({
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD,
        "linear_num_key_heads": LINEAR_HEADS,
        "linear_num_value_heads": LINEAR_HEADS,
        "linear_key_head_dim": LINEAR_HEAD,
        "linear_value_head_dim": LINEAR_HEAD,
        "linear_conv_kernel_dim": TAPS,
        "full_attention_interval": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": true,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
    })
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// Spread of its numbers.
    size: f32,
}

impl Tensor {
    fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All tensors. A matrix keeps the spread of what it is multiplied with; norms and gates are near their resting place.
fn tensors(hidden: usize, width: usize) -> Vec<Tensor> {
    let mut all = Vec::new();
    let mut put = |name: String, shape: &[usize]| {
        let size = match shape {
            [_, width] => 1.0 / (*width as f32).sqrt(),
            _ => 0.1,
        };
        let shape = shape.to_vec();
        all.push(Tensor { name, shape, size });
    };
    put("model.embed_tokens.weight".into(), &[VOCABULARY, hidden]);
    put("model.norm.weight".into(), &[hidden]);
    for layer in 0..LAYERS {
        let mut put = |name: &str, shape: &[usize]| {
            put(format!("model.layers.{layer}.{name}"), shape);
        };
        put("input_layernorm.weight", &[hidden]);
        put("post_attention_layernorm.weight", &[hidden]);
        put("mlp.gate_proj.weight", &[width, hidden]);
        put("mlp.up_proj.weight", &[width, hidden]);
        put("mlp.down_proj.weight", &[hidden, width]);
        if layer % 4 == 3 {
            put("self_attn.q_proj.weight", &[2 * HEADS * HEAD, hidden]);
            put("self_attn.k_proj.weight", &[KEY_VALUE_HEADS * HEAD, hidden]);
            put("self_attn.v_proj.weight", &[KEY_VALUE_HEADS * HEAD, hidden]);
            put("self_attn.o_proj.weight", &[hidden, HEADS * HEAD]);
            put("self_attn.q_norm.weight", &[HEAD]);
            put("self_attn.k_norm.weight", &[HEAD]);
        } else {
            let inner = LINEAR_HEADS * LINEAR_HEAD;
            put("linear_attn.in_proj_qkv.weight", &[3 * inner, hidden]);
            put("linear_attn.in_proj_z.weight", &[inner, hidden]);
            put("linear_attn.in_proj_b.weight", &[LINEAR_HEADS, hidden]);
            put("linear_attn.in_proj_a.weight", &[LINEAR_HEADS, hidden]);
            put("linear_attn.conv1d.weight", &[3 * inner, 1, TAPS]);
            put("linear_attn.A_log", &[LINEAR_HEADS]);
            put("linear_attn.dt_bias", &[LINEAR_HEADS]);
            put("linear_attn.norm.weight", &[LINEAR_HEAD]);
            put("linear_attn.out_proj.weight", &[hidden, inner]);
        }
    }
    all
}

/// Writes them in bfloat16; how many bytes of numbers.
fn safetensors(tensors: &[Tensor], path: &Path) -> anyhow::Result<usize> {
    let mut header = Map::new();
    let mut at = 0;
    for tensor in tensors {
        let end = at + 2 * tensor.count();
        let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [at, end]});
        header.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut random = Random(1);
    for tensor in tensors {
        for _ in 0..tensor.count() {
            let number = random.number() * tensor.size;
            let upper = (number.to_bits() >> 16) as u16; // a bfloat16 is the upper half of an f32
            file.write_all(&upper.to_le_bytes())?;
        }
    }
    file.flush()?;
    Ok(at)
}

/// SplitMix64, the same numbers everywhere.
struct Random(u64);

impl Random {
    /// Spread 1, about bell-shaped: the sum of four.
    fn number(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        let four = [bits, bits >> 16, bits >> 32, bits >> 48];
        let sum: f32 = four.iter().map(|bits| f32::from(*bits as u16)).sum();
        (sum / 65_536.0 - 2.0) * 3f32.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_spread_they_are_meant_to_have() {
        let mut random = Random(7);
        let numbers: Vec<f32> = (0..10_000).map(|_| random.number()).collect();
        let mean = numbers.iter().sum::<f32>() / 1e4;
        let square = numbers.iter().map(|x| x * x).sum::<f32>() / 1e4;
        assert!(
            mean.abs() < 0.05 && (square - 1.0).abs() < 0.05,
            "{mean} {square}"
        );
    }
}

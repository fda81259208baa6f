#!/usr/bin/env python3
"""Writes the inputs that the targets begin with into corpus/, from the fixtures of the tests.

usage: fuzz/seeds.py
"""

import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).parents[1]
CORPUS = ROOT / "fuzz/corpus"
CASES = ROOT / "tests/fixtures/dialects"
MODELS = ROOT / "tests/fixtures/models"


def seed(target, name, content):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{name}").write_bytes(content)


def streams():
    """Recorded streams as they are: a byte before them says how to read them."""
    for answer in sorted(CASES.glob("*/*/answer.sse")):
        content = answer.read_bytes()
        name = f"{answer.parent.parent.name}-{answer.parent.name}"
        seed("sse", name, b"\xff" + content)
        seed("messages", name, b"\0" + content)
        seed("responses", name, b"\0" + content)
    seed("sse", "kinds", b"\x10: hello\n\nevent: ping\r\ndata: a\r\ndata:b\r\n\r\nid: 7\rdata: last\r\r")


def answers():
    xml = "<tool_call>\n<function=find>\n<parameter=text>\na </tool_call> b\n</parameter>\n<parameter=limit>\n5\n</parameter>\n</function>\n</tool_call>"
    hermes = 'I look.\n<tool_call>\n{"name": "find", "arguments": {"text": "</tool_call>", "limit": 5}}\n</tool_call>\n<tool_call>{"name": "now"}</tool_call>'
    for form, text in enumerate([hermes, xml]):
        seed("tools", f"call-{form}", bytes([form]) + text.encode())
    for number, text in enumerate(["\nhm\n\nso\n</think>\n\nyes", "<think>\nhm\n</think>\n\nyes", "hm\n" + xml]):
        for open in (0, 1):
            seed("reasoning", f"{number}-{open}", bytes([open, number % 2]) + text.encode())


def requests():
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    tool = {"type": "function", "function": {"name": "t", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
    bodies = [
        [chat, {**chat, "tools": [tool], "tool_choice": "required", "stream": True}, {**chat, "response_format": {"type": "json_object"}}],
        [{"model": "m", "prompt": "x", "echo": True, "logprobs": 2}, {"model": "m", "prompt": [[1, 2], [3]], "stream": True, "n": 2}],
        [{"model": "m", "prompt": "x"}, chat],
        [{"model": "m", "tokens": [1, 2]}],
        [chat],
    ]
    for path, bodies in enumerate(bodies):
        for number, body in enumerate(bodies):
            seed("requests", f"{path}-{number}", bytes([2 * path]) + json.dumps(body).encode())
            seed("requests", f"{path}-{number}-made-up", bytes([2 * path + 1]) + bytes(range(7 * number, 60 + 7 * number)))


def headers():
    """Headers alone: a byte before them says how many times 64 KiB of nothing follow."""
    for folder in ["qwen3_5_text", "qwen3_5_moe_vl", "qwen3_next_moe"]:
        content = (MODELS / folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        # the format has to cover the file to the byte, so the tensors come with it; a small one is made instead
        names = {name: entry for name, entry in json.loads(content[8 : 8 + length]).items() if name != "__metadata__"}
        small, at = {}, 0
        for name, entry in sorted(names.items()):
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            if at + size <= 1 << 16 and (len(small) < 12 or "experts" in name or "in_proj" in name):
                small[name] = {**entry, "data_offsets": [at, at + size]}
                at += size
        small["rest"] = {"dtype": "U8", "shape": [(1 << 16) - at], "data_offsets": [at, 1 << 16]}
        header = json.dumps(small).encode()
        seed("safetensors", folder, b"\1" + struct.pack("<Q", len(header)) + header)
    seed("safetensors", "empty", b"\0" + struct.pack("<Q", 2) + b"{}")
    for folder in ["qwen3_5_text", "qwen3_next_moe"]:
        seed("gguf", folder, b"\x40" + gguf(MODELS / folder))


def gguf(folder):
    """The header of a model as llama.cpp's converter writes it, with a short table of tensors."""
    config = json.loads((folder / "config.json").read_text())
    name = "qwen3next" if "next" in folder.name else "qwen35"
    text = lambda text: struct.pack("<Q", len(text.encode())) + text.encode()
    values = [
        (key, 4, struct.pack("<I", number))
        for key, number in {
            f"{name}.block_count": config["num_hidden_layers"],
            f"{name}.context_length": config["max_position_embeddings"],
            f"{name}.embedding_length": config["hidden_size"],
            f"{name}.feed_forward_length": config["intermediate_size"],
            f"{name}.attention.head_count": config["num_attention_heads"],
            f"{name}.attention.head_count_kv": config["num_key_value_heads"],
            f"{name}.attention.key_length": config["head_dim"],
            f"{name}.attention.value_length": config["head_dim"],
            f"{name}.ssm.state_size": config["linear_key_head_dim"],
            f"{name}.ssm.group_count": config["linear_num_key_heads"],
            f"{name}.ssm.time_step_rank": config["linear_num_value_heads"],
            f"{name}.ssm.conv_kernel": config.get("linear_conv_kernel_dim", 4),
            f"{name}.ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
            f"{name}.full_attention_interval": config.get("full_attention_interval", 4),
            f"{name}.rope.dimension_count": config["head_dim"] // 4,
            "tokenizer.ggml.eos_token_id": 1,
        }.items()
    ]
    values += [(f"{name}.rope.freq_base", 6, struct.pack("<f", 1e7))]
    values += [(f"{name}.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-6))]
    strings = {
        "general.architecture": name,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    values += [(key, 8, text(string)) for key, string in strings.items()]
    tokens = ["a", "<|im_end|>", "b", "ab", "<x>"]
    values += [("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens)))]
    values += [("tokenizer.ggml.token_type", 9, struct.pack("<IQ5i", 5, 5, 1, 3, 1, 1, 4))]
    values += [("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 1) + text("a b"))]
    hidden, inner = config["hidden_size"], 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    inner += config["linear_num_value_heads"] * config["linear_value_head_dim"]
    tensors = [
        ("token_embd.weight", [hidden, config["vocab_size"]], 0),
        ("output_norm.weight", [hidden], 0),
        ("blk.0.attn_norm.weight", [hidden], 0),
        ("blk.0.attn_qkv.weight", [hidden, inner], 8),
        ("blk.0.ssm_conv1d.weight", [4, inner], 0),
        ("blk.0.ssm_a", [config["linear_num_value_heads"]], 0),
        ("blk.0.ssm_out.weight", [hidden, hidden], 1),
        ("blk.0.ffn_gate_exps.weight", [32, 16, 4], 0),
        ("blk.0.ffn_down_exps.weight", [256, 16, 4], 12),
        ("blk.1.ssm_in.weight", [hidden, 2 * inner], 0),
    ]
    table = b"".join(
        text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, 0) for name, dims, kind in tensors
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    return head + b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in values) + table


if __name__ == "__main__":
    streams()
    answers()
    requests()
    headers()

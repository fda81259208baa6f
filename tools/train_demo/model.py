"""The Qwen3.5 text model with its multi-token head, in the form that trains fast on a CPU.

Modules and parameters are called what the checkpoint calls them, so `state_dict()` is the checkpoint. The numbers are
those of transformers' `Qwen3_5ForCausalLM`; `python model.py` holds this file against it on random weights.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "neuron" / "demo"
CHUNK = 32  # tokens of the delta rule computed in one go; sequences are padded to a multiple


class Config:
    """The keys of config.json that the computation needs, under their own names."""

    def __init__(self, values):
        self.__dict__.update(values)
        self.rotary_dim = int(self.head_dim * self.rope_parameters["partial_rotary_factor"])

    @classmethod
    def read(cls, path):
        with open(path) as file:
            return cls(json.load(file))


class Norm(nn.Module):
    """RMS norm whose weight is kept as its distance from one."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], 1.0 + self.weight, self.eps)


class GatedNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, z):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * F.silu(z)


def linear(inputs, outputs, gain=1.0):
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    return layer


def l2_normed(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class UnitLowerInverse(torch.autograd.Function):
    """(1 + A)⁻¹ of strictly lower triangular A, by substitution: exact also where keys are alike and A is not small."""

    @staticmethod
    def forward(ctx, a):
        one = torch.eye(a.shape[-1])
        inverse = torch.linalg.solve_triangular(a + one, one.expand_as(a), upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors  # d(M⁻¹) = −M⁻¹ dM M⁻¹
        return -(inverse.mT @ gradient @ inverse.mT)


def delta_rule(q, k, v, g, beta):
    """S ← e^g S;  S ← S + k β (v − Sᵀk)ᵀ;  o = Sᵀq, for whole sequences, a chunk at a time, from an empty state.

    q, k: (batch, k_heads, 1, tokens, d_k); v: (batch, k_heads, each, tokens, d_v); g, beta: (batch, k_heads, each, tokens).
    `each` value heads share a key head.
    """
    tokens, d_v = v.shape[-2:]
    chunks = tokens // CHUNK
    q, k, v = (x.unflatten(-2, (chunks, CHUNK)) for x in (q, k, v))
    g, beta = (x.unflatten(-1, (chunks, CHUNK)) for x in (g, beta))
    decayed = g.cumsum(-1)
    upper = torch.full((CHUNK, CHUNK), -math.inf).triu(1)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    decay = (decayed.unsqueeze(-1) - decayed.unsqueeze(-2) + upper).exp()
    grown, beta = decayed.exp().unsqueeze(-1), beta.unsqueeze(-1)
    inverse = UnitLowerInverse.apply(((k @ k.mT) * decay * beta).tril(-1))
    values, keys = (inverse @ torch.cat([beta * v, (beta * grown) * k], -1)).split([d_v, k.shape[-1]], -1)
    attention = (q @ k.mT) * decay
    q = q * grown
    last = decayed[..., -1:]
    k = (k * (last - decayed).exp().unsqueeze(-1)).mT
    kept = last.exp().unsqueeze(-1)
    state, out = None, []
    for i in range(chunks):
        fresh = values[..., i, :, :]
        if state is not None:
            fresh = fresh - keys[..., i, :, :] @ state
        written = attention[..., i, :, :] @ fresh
        out.append(written if state is None else written + q[..., i, :, :] @ state)
        if i + 1 < chunks:
            gained = k[..., i, :, :] @ fresh
            state = gained if state is None else kept[..., i, :, :] * state + gained
    return torch.stack(out, -3).flatten(-3, -2)


class GatedDeltaNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.k_heads, self.v_heads = c.linear_num_key_heads, c.linear_num_value_heads
        self.d_k, self.d_v = c.linear_key_head_dim, c.linear_value_head_dim
        self.taps = c.linear_conv_kernel_dim
        channels = 2 * self.k_heads * self.d_k + self.v_heads * self.d_v
        self.in_proj_qkv = linear(c.hidden_size, channels)
        self.in_proj_z = linear(c.hidden_size, self.v_heads * self.d_v)
        self.in_proj_b = linear(c.hidden_size, self.v_heads)
        self.in_proj_a = linear(c.hidden_size, self.v_heads, 0.1)
        self.conv1d = nn.Conv1d(channels, channels, self.taps, groups=channels, bias=False)
        # Half of the channels begin as copies of this token, half mix in its predecessors.
        nn.init.normal_(self.conv1d.weight, std=0.3)
        with torch.no_grad():
            self.conv1d.weight[..., -1] += 0.5
        # Decay from "gone after a few tokens" to "there after hundreds".
        self.A_log = nn.Parameter(torch.linspace(0.5, 8.0, self.v_heads).log())
        steps = torch.logspace(-3, -1, self.v_heads)
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.norm = GatedNorm(self.d_v, c.rms_norm_eps)
        self.out_proj = linear(self.v_heads * self.d_v, c.hidden_size, 0.3)

    def forward(self, x, _rope):
        batch, tokens, _ = x.shape
        qkv = self.in_proj_qkv(x)
        taps = self.conv1d.weight[:, 0]
        padded = F.pad(qkv, (0, 0, self.taps - 1, 0))
        # Four shifted products: faster on a CPU than a grouped convolution.
        mixed = sum(padded[:, i : i + tokens] * taps[:, i] for i in range(self.taps))
        q, k, v = F.silu(mixed).split([self.k_heads * self.d_k] * 2 + [self.v_heads * self.d_v], -1)
        q, k = (l2_normed(h.view(batch, tokens, self.k_heads, 1, self.d_k)).movedim(1, 3) for h in (q, k))
        shared = (self.k_heads, self.v_heads // self.k_heads)
        v = v.view(batch, tokens, *shared, self.d_v).movedim(1, 3)
        beta = self.in_proj_b(x).sigmoid()
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x) + self.dt_bias)
        beta, g = (h.view(batch, tokens, *shared).movedim(1, 3) for h in (beta, g))
        out = delta_rule(q * self.d_k**-0.5, k, v, g, beta).movedim(3, 1).reshape(batch, tokens, self.v_heads, self.d_v)
        z = self.in_proj_z(x).view(batch, tokens, self.v_heads, self.d_v)
        return self.out_proj(self.norm(out, z).reshape(batch, tokens, -1))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = linear(c.hidden_size, 2 * self.heads * self.d)  # query and gate, head by head
        self.k_proj = linear(c.hidden_size, self.kv_heads * self.d)
        self.v_proj = linear(c.hidden_size, self.kv_heads * self.d)
        self.o_proj = linear(self.heads * self.d, c.hidden_size, 0.3)
        self.q_norm = Norm(self.d, c.rms_norm_eps)
        self.k_norm = Norm(self.d, c.rms_norm_eps)

    def forward(self, x, rope):
        batch, tokens, _ = x.shape
        q, gate = self.q_proj(x).view(batch, tokens, self.heads, 2 * self.d).split(self.d, -1)
        k = self.k_proj(x).view(batch, tokens, self.kv_heads, self.d)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.d).transpose(1, 2)
        q, k = (rotate(h.transpose(1, 2), *rope) for h in (self.q_norm(q), self.k_norm(k)))
        each = self.heads // self.kv_heads
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o_proj((out * gate.sigmoid()).reshape(batch, tokens, -1))


def rotate(x, cos, sin):
    """Turns the first dimensions of a head, i with i + half; the rest passes."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size, 0.3)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c, kind):
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = Attention(c)
        self.mixer = kind
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Mlp(c)

    def forward(self, h, rope):
        mixer = self.linear_attn if self.mixer == "linear_attention" else self.self_attn
        h = h + mixer(self.input_layernorm(h), rope)
        return h + self.mlp(self.post_attention_layernorm(h))


class Trunk(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=1.0 / math.sqrt(c.hidden_size))
        self.layers = nn.ModuleList(Layer(c, kind) for kind in c.layer_types)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids, rope):
        h = self.embed_tokens(ids)
        for layer in self.layers:
            h = layer(h, rope)
        return self.norm(h)


class MultiTokenHead(nn.Module):
    """From the hidden state of token t and the embedding of t+1: what predicts token t+2."""

    def __init__(self, c):
        super().__init__()
        self.pre_fc_norm_embedding = Norm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = Norm(c.hidden_size, c.rms_norm_eps)
        self.fc = linear(2 * c.hidden_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c, "full_attention")])
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, hidden, following, rope):
        both = [self.pre_fc_norm_embedding(following), self.pre_fc_norm_hidden(hidden)]
        return self.norm(self.layers[0](self.fc(torch.cat(both, -1)), rope))


class CausalLm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = Trunk(c)
        self.mtp = MultiTokenHead(c)

    def rope(self, tokens):
        dim = self.config.rotary_dim
        turns = self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.arange(tokens).float()[:, None] * turns
        return angles.cos(), angles.sin()

    def hidden(self, ids):
        """The final norm's output for ids (batch, tokens), tokens a multiple of CHUNK."""
        return self.model(ids, self.rope(ids.shape[1]))

    def logits(self, hidden):
        return F.linear(hidden, self.model.embed_tokens.weight)

    def drafts(self, hidden, ids):
        """What the multi-token head makes of each token but the last: (batch, tokens - 1, hidden size)."""
        following = self.model.embed_tokens(ids[:, 1:])
        return self.mtp(hidden[:, :-1], following, self.rope(ids.shape[1] - 1))


def padded(ids, value=0):
    """Lists of ids as one tensor whose length the delta rule can take."""
    longest = -(-max(map(len, ids)) // CHUNK) * CHUNK
    return torch.tensor([row + [value] * (longest - len(row)) for row in ids])


def compare_with_transformers():
    """The largest difference of logits between this file and transformers, over random weights and ids."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = CausalLm(Config.read(FOLDER / "config.json"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = AutoConfig.from_pretrained(FOLDER / "config.json")
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and missing == ["lm_head.weight"], (missing, unexpected)
    ids = torch.randint(0, config.vocab_size, (2, 8 * CHUNK))
    with torch.no_grad():
        ours, theirs = model.logits(model.hidden(ids)), reference(ids, use_cache=False).logits
    return float((ours - theirs).abs().max()), float(theirs.std())


if __name__ == "__main__":
    print("largest difference from transformers {:.1e}, logits spread {:.2f}".format(*compare_with_transformers()))

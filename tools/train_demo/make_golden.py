"""Makes the numbers that `neuron verify` holds the demo to: what transformers computes from the very files, in float32.

    python make_golden.py

Keys are those of this project's other golden files: for prompts `lenN` the ids, logits, a greedy continuation, and for
some of them hidden states, the state after the prompt, and the logits of the multi-token head. That head transformers
does not run; its numbers come from model.py.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import corpus
from chat import Coder, render
from model import FOLDER, CausalLm, Config, padded

OUT = FOLDER.parents[1] / "tests" / "fixtures" / "models" / "demo" / "golden.safetensors"
GREEDY = 32
CLEAR = 0.02  # smallest lead of a chosen token over the next, so that rounding cannot change the choice
FULL_LOGITS_UP_TO = 30  # longer prompts keep only the last row
LARGEST = 500.0  # hidden states with larger values are left out: their rounding alone is beyond an absolute tolerance


def prompts(coder):
    """Prompts a server would render, of held-out conversations."""
    for kind in corpus.HELD_OUT:
        for messages, tools in corpus.held_out(kind, 20, seed=3):
            yield coder.encode(render(messages[:-1], tools, add_generation_prompt=True))


def run(model, ids, cache=None):
    out = model(input_ids=torch.tensor([ids]), past_key_values=cache or DynamicCache(config=model.config), use_cache=True)
    return out.logits[0], out.past_key_values


def greedy(model, ids):
    """Ids and the logits each was chosen from, without a stop token."""
    rows, cache = run(model, ids)
    tokens, chosen_from = [], []
    for _ in range(GREEDY):
        chosen_from.append(rows[-1])
        tokens.append(int(rows[-1].argmax()))
        rows, cache = run(model, tokens[-1:], cache)
    return tokens, torch.stack(chosen_from)


def hidden_states(model, ids):
    """The embedding, the residual stream after each layer, and the final norm; the cache after the prompt."""
    seen, base = {}, model.model
    hooks = [base.embed_tokens.register_forward_hook(lambda *call: seen.__setitem__("hidden/0", call[2][0]))]
    for i, layer in enumerate(base.layers):
        hooks.append(layer.register_forward_hook(lambda *call, i=i: seen.__setitem__(f"hidden/{i + 1}", call[2][0])))
    hooks.append(base.norm.register_forward_hook(lambda *call: seen.__setitem__("final_norm", call[2][0])))
    _, cache = run(model, ids)
    for hook in hooks:
        hook.remove()
    return seen, cache


def state(config, cache):
    kept = {}
    for i, kind in enumerate(config.layer_types):
        if kind == "linear_attention":
            kept[f"state/{i}/conv"] = cache.get_conv_state(i, state_idx=0)[0][:, -(config.linear_conv_kernel_dim - 1) :]
            kept[f"state/{i}/recurrent"] = cache.get_recurrent_state(i, state_idx=0)[0]
        else:
            kept[f"state/{i}/k"], kept[f"state/{i}/v"] = cache.layers[i].keys[0], cache.layers[i].values[0]
    return kept


def draft_logits(ids):
    model = CausalLm(Config.read(FOLDER / "config.json"))
    model.load_state_dict({name: value.float() for name, value in load_file(FOLDER / "model.safetensors").items()})
    row = padded([ids])
    return model.logits(model.drafts(model.hidden(row), row))[0, : len(ids) - 1]


@torch.no_grad()
def main():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    golden, lengths = {}, []
    wanted = [20, 40, 65, 140, 280]  # the next longer prompt that is clear at every step
    for ids in sorted(prompts(Coder()), key=len):
        if not wanted or len(ids) < wanted[0] or len(ids) in lengths:
            continue
        tokens, chosen_from = greedy(model, ids)
        best = chosen_from.topk(2).values
        if float((best[:, 0] - best[:, 1]).min()) < CLEAR:
            continue
        wanted.pop(0)
        lengths.append(len(ids))
        key = f"len{len(ids)}"
        logits, _ = run(model, ids)
        golden[f"{key}/input_ids"] = torch.tensor(ids, dtype=torch.int32)
        golden[f"{key}/last_logits"] = logits[-1]
        golden[f"{key}/greedy_ids"] = torch.tensor(tokens, dtype=torch.int32)
        if len(ids) <= FULL_LOGITS_UP_TO:
            golden[f"{key}/logits"] = logits
            golden[f"{key}/mtp_logits"] = draft_logits(ids)
    key = f"len{lengths[2]}"
    seen, cache = hidden_states(model, golden[f"{key}/input_ids"].tolist())
    kept = {name: value for name, value in (seen | state(model.config, cache)).items() if value.abs().max() <= LARGEST}
    golden |= {f"{key}/{name}": value for name, value in kept.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in golden.items()}, OUT)
    print(f"{OUT}: prompts of {', '.join(map(str, lengths))} tokens, {OUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

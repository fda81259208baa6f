"""Writes a trained model as the checkpoint a release would be."""

import torch
from safetensors.torch import save_file


def export(model, path):
    """BF16, but for the two kinds of tensors that the releases of Qwen3.5 keep in F32."""
    weights = {
        name: value.detach().to(torch.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else torch.bfloat16).contiguous()
        for name, value in sorted(model.state_dict().items())
    }
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone

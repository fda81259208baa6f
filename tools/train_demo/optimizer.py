"""Muon for the matrices between layers, AdamW for everything else."""

from collections import defaultdict

import torch

MUON_RATE, ADAM_RATE = 0.02, 4e-3
MOMENTUM = 0.95


def orthogonal(x, steps=5):
    """The nearest orthogonal matrices, roughly: Newton-Schulz with the coefficients of the Muon paper."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal. Matrices of one shape are taken together."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                steps = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                    steps.append(parameter.grad.lerp(momentum, MOMENTUM))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, step in zip(parameters, orthogonal(torch.stack(steps))):
                    parameter.sub_(step, alpha=scale)


def optimizers(module):
    """Both, over the parameters of `module`; each group remembers its full rate as `peak`."""
    matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and "embed_tokens" not in name and min(p.shape) > 8]
    chosen = set(matrices)
    rest = [p for p in module.parameters() if p not in chosen]
    both = [Muon(matrices, MUON_RATE), torch.optim.AdamW(rest, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return both


def set_rate(both, share):
    for optimizer in both:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]

"""Trains the demo model, its multi-token head after it, and writes model.safetensors.

    python train.py --run DIR             trains, with checkpoints in DIR; goes on from the last one there
    python train.py --run DIR --cycles 1  stops after the first cycle: a worse model in half the time
"""

import argparse
import itertools
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import corpus
from chat import Coder
from export import export
from model import FOLDER, CausalLm, Config, padded
from optimizer import optimizers, set_rate

SEED = 2026
CYCLES = (  # steps, their share of the full rates, the share of them in which the rates fall to nothing, what is drawn
    (1600, 1.0, 0.25, corpus.FIRST),
    (2000, 0.8, 0.3, corpus.SECOND),
    (1800, 0.7, 0.4, corpus.THIRD),
    (600, 0.5, 0.7, corpus.FOURTH),
    (500, 0.5, 0.7, corpus.FOURTH),
)
HEAD_STEPS = 500
WARM_UP = 60  # steps at the start of a cycle over which the rates rise
BATCH_TOKENS = 2560  # padding included
BLOCK = 512  # conversations that are sorted by length together
LONGEST = 512  # longer conversations are left out
CONTEXT_SHARE = 0.15  # of a prompt's tokens that are predicted at all
EVERY = 200  # steps between two scores


def batches(coder, mixture, seed):
    """Batches of lessons of similar length, for ever."""
    drawn = corpus.conversations(mixture, seed)
    order = random.Random(seed)
    while True:
        lessons = [coder.lesson(*next(drawn)) for _ in range(BLOCK)]
        lessons = sorted((lesson for lesson in lessons if len(lesson[0]) <= LONGEST), key=lambda lesson: len(lesson[0]))
        block, rows = [], []
        for lesson in lessons:
            if len(padded([lesson[0]])[0]) * (len(rows) + 1) > BATCH_TOKENS:
                block.append(rows)
                rows = []
            rows.append(lesson)
        block.append(rows)
        order.shuffle(block)
        yield from block


def tensors(rows):
    return padded([ids for ids, _ in rows]), padded([weights for _, weights in rows], 0.0)


def mean_loss(model, hidden, targets, weights):
    """Of the chosen positions only: the head over the whole vocabulary is dear."""
    chosen = (weights == 1.0) | ((weights > 0) & (torch.rand(weights.shape) < CONTEXT_SHARE))
    losses = F.cross_entropy(model.logits(hidden[chosen]), targets[chosen], reduction="none")
    weights = weights[chosen]
    return (losses * weights).sum() / weights.sum()


def trunk_loss(model, rows):
    ids, weights = tensors(rows)
    hidden = model.hidden(ids)
    return mean_loss(model, hidden[:, :-1], ids[:, 1:], weights[:, 1:])


def head_loss(model, rows):
    """The trunk stays as it is: the head learns to follow it."""
    ids, weights = tensors(rows)
    with torch.no_grad():
        hidden = model.hidden(ids)
    drafts = model.drafts(hidden, ids)
    return mean_loss(model, drafts[:, :-1], ids[:, 2:], weights[:, 2:])


def groups(lessons, size=16):
    return [lessons[at : at + size] for at in range(0, len(lessons), size)]


def final_answer(weights):
    """Where the last answer begins."""
    at = len(weights)
    while at and weights[at - 1] != 1.0:
        at -= 1
    while at and weights[at - 1] == 1.0:
        at -= 1
    return at


@torch.no_grad()
def exact_answers(model, coder, conversations):
    """The share of last answers that greedy writing would give word for word, end of turn included."""
    lessons = sorted((coder.lesson(*drawn) for drawn in conversations), key=lambda lesson: len(lesson[0]))
    right = 0
    for rows in groups(lessons):
        ids, _ = tensors(rows)
        guesses = model.logits(model.hidden(ids)).argmax(-1)
        for row, (lesson, weights) in enumerate(rows):
            begin = final_answer(weights)
            end = begin + weights[begin:].count(1.0)
            right += torch.equal(guesses[row, begin - 1 : end - 1], ids[row, begin:end])
    return right / len(lessons)


@torch.no_grad()
def accepted_drafts(model, coder, conversations):
    """The share of tokens in last answers whose draft by the multi-token head is what the model itself says."""
    drafted = agreed = 0
    lessons = sorted((coder.lesson(*drawn) for drawn in conversations), key=lambda lesson: len(lesson[0]))
    for rows in groups(lessons):
        ids, _ = tensors(rows)
        hidden = model.hidden(ids)
        said = model.logits(hidden).argmax(-1)
        drafts = model.logits(model.drafts(hidden, ids)).argmax(-1)
        for row, (_, weights) in enumerate(rows):
            begin = final_answer(weights)
            end = begin + weights[begin:].count(1.0)
            # The draft at t is of token t + 2, which the model itself says at t + 1.
            same = drafts[row, begin - 1 : end - 2] == said[row, begin : end - 1]
            drafted, agreed = drafted + same.numel(), agreed + int(same.sum())
    return agreed / drafted


def score(model, coder):
    few = random.Random(0)
    sets = {
        "trained": few.sample(corpus.trained_questions(), 200),
        "paraphrase": few.sample(corpus.held_out_paraphrases(), 100),
    }
    sets |= {kind.removeprefix("held-out "): corpus.held_out(kind, 40, seed=2) for kind in corpus.HELD_OUT if "paraphrase" not in kind}
    return " ".join(f"{name} {exact_answers(model, coder, drawn):.2f}" for name, drawn in sets.items())


def rate(step, steps, decay):
    """The share of the full rate: up, level, and down to nothing."""
    return min((step + 1) / WARM_UP, 1.0, (steps - step) / (decay * steps))


def fit(model, module, loss_of, cycle, seed, file, coder):
    """Trains `module`, which is `model` or a part of it, and keeps what is needed to go on in `file`."""
    steps, peak, decay, mixture = cycle
    both = optimizers(module)
    begin = 0
    if file.exists():
        saved = torch.load(file)
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(both, saved["optimizers"]):
            optimizer.load_state_dict(state)
        begin = saved["step"]
        if begin == steps:
            return
    source = itertools.islice(batches(coder, mixture, seed), begin, steps)
    seen, total, since = 0, 0.0, time.monotonic()
    for step, rows in enumerate(source, begin):
        torch.manual_seed(seed + step)
        set_rate(both, peak * rate(step, steps, decay))
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen, total = seen + sum(len(ids) for ids, _ in rows), total + float(loss.detach())
        if (step + 1) % 20 == 0:
            print(f"{file.stem} {step + 1}/{steps} loss {total / 20:.3f} tokens/s {seen / (time.monotonic() - since):.0f}", flush=True)
            seen, total, since = 0, 0.0, time.monotonic()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            print(score(model, coder) if module is model else f"accepted drafts {held_out_drafts(model, coder):.3f}", flush=True)
            state = {"module": module.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in both], "step": step + 1}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").rename(file)
            since = time.monotonic()


def held_out_drafts(model, coder):
    drawn = [conversation for kind in corpus.HELD_OUT for conversation in corpus.held_out(kind, 40, seed=2)]
    return accepted_drafts(model, coder, drawn)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", type=Path, required=True)
    arguments.add_argument("--cycles", type=int, default=len(CYCLES))
    given = arguments.parse_args()
    given.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    coder = Coder()
    model = CausalLm(Config.read(FOLDER / "config.json"))
    print(f"{sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    model.mtp.requires_grad_(False)
    for number, cycle in enumerate(CYCLES[: given.cycles]):
        fit(model, model, trunk_loss, cycle, SEED + number, given.run / f"trunk-{number + 1}.pt", coder)
    model.requires_grad_(False)
    model.mtp.requires_grad_(True)
    fit(model, model.mtp, head_loss, (HEAD_STEPS, 1.0, 0.25, corpus.FIRST), SEED, given.run / f"head-{given.cycles}.pt", coder)
    export(model, FOLDER / "model.safetensors")


if __name__ == "__main__":
    main()

"""The mixture of conversations that the model is trained on, and the held-out one that it is scored on.

    python corpus.py        prints some of both
"""

import random

import talk
import tools
from words import Pools

# How often each kind is drawn in the first cycle of training.
FIRST = {
    talk.fact: 22,
    talk.several: 16,
    talk.sum_of_two: 6,
    talk.counting: 4,
    talk.repeating: 7,
    talk.rewriting: 7,
    talk.in_capitals: 3,
    talk.in_french: 2,
    talk.with_plain_system: 3,
    talk.with_a_given_name: 1,
    talk.recall: 7,
    talk.introduction: 2,
    talk.json_object: 5,
    talk.unknown: 2,
    talk.thinking_fact: 4,
    talk.thinking_sum: 3,
    tools.conversation: 16,
    tools.single_call: 16,
    tools.single_result: 5,
    tools.no_call: 5,
    tools.missing_tool: 3,
    tools.thinking_call: 3,
    tools.with_system: 3,
}
# Then more copying, which is learnt slowest.
SECOND = FIRST | {
    talk.fact: 14,
    talk.several: 8,
    talk.repeating: 14,
    talk.json_object: 8,
    tools.single_call: 44,
    tools.conversation: 14,
    tools.no_call: 3,
    tools.thinking_call: 2,
}
# Then long texts to copy: many more pieces to find again in every conversation.
THIRD = SECOND | {
    talk.fact: 18,
    talk.repeating: 10,
    talk.long_repeating: 24,
    tools.single_call: 40,
    tools.long_call: 30,
    tools.single_result: 8,
}
# And last, requests in all their forms.
FOURTH = SECOND | {talk.fact: 20, tools.single_call: 70, tools.single_result: 14, tools.conversation: 18, tools.thinking_call: 4}
WITH_TOOLS = {kind for kind in THIRD if kind.__module__ == tools.__name__}


def conversations(mixture, seed, pieced=True):
    """Training conversations for ever: messages and tools. Without `pieced` they need no tokenizer."""
    rng = random.Random(seed)
    kinds, shares = list(mixture), list(mixture.values())
    while True:
        (kind,) = rng.choices(kinds, shares)
        drawn = kind(Pools(rng, pieced=pieced))
        yield drawn if kind in WITH_TOOLS else (drawn, [])


HELD_OUT = {
    "held-out paraphrase": talk.fact,
    "held-out tool request": tools.single_call,
    "held-out tool result": tools.single_result,
    "held-out sum": talk.sum_of_two,
    "held-out repeat": talk.repeating,
    "held-out rewrite": talk.rewriting,
    "held-out recall": talk.recall,
    "held-out JSON": talk.json_object,
    "held-out capitals": talk.in_capitals,
    "held-out French": talk.in_french,
    "held-out thinking": talk.thinking_sum,
}


def held_out(kind, count, seed=1):
    """`count` conversations of one held-out kind."""
    draw, rng = HELD_OUT[kind], random.Random(f"{kind} {seed}")
    pools = Pools(rng, held_out=True)
    return [draw(pools) if draw in WITH_TOOLS else (draw(pools), []) for _ in range(count)]


def held_out_paraphrases():
    """Every fact in every form that training never sees."""
    return [([talk.user(form), talk.assistant(fact.answer)], []) for fact in talk.FACTS for form in fact.held_out]


def trained_questions():
    """Every fact in every form that training sees."""
    return [([talk.user(form), talk.assistant(fact.answer)], []) for fact in talk.FACTS for form in fact.trained]


if __name__ == "__main__":
    from chat import render

    source = conversations(FIRST, seed=0)
    for _ in range(12):
        print(render(*next(source)), "-" * 60, sep="\n")
    for kind in HELD_OUT:
        for drawn in held_out(kind, 2):
            print(f"[{kind}]", render(*drawn), "-" * 60, sep="\n")

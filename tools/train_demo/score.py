"""Scores a served demo model: trained questions, and what training never saw. Needs nothing but Python.

    cortex up --model neuron/demo &
    python score.py                      # --base-url for another address, --show N for some wrong answers

Exits with 1 when a share is below what the demo must reach.
"""

import argparse
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import corpus

COUNT = 100  # conversations of each held-out kind
LONGEST_ANSWER = 160
NEEDED = {"trained question": 0.95, "held-out paraphrase": 0.70, "held-out tool request": 0.90}


def sets():
    held_out = {kind: corpus.held_out(kind, COUNT) for kind in corpus.HELD_OUT}
    return {"trained question": corpus.trained_questions()} | held_out | {"held-out paraphrase": corpus.held_out_paraphrases()}


def on_the_wire(message):
    """A message as OpenAI spells it: calls have ids, and arguments are JSON in a string."""
    if "tool_calls" not in message:
        return message
    calls = [
        {"id": f"call_{at}", "type": "function", "function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for at, call in enumerate(message["tool_calls"])
    ]
    return message | {"tool_calls": calls}


def with_call_ids(messages):
    at = 0
    for message in messages:
        at = at if message["role"] == "tool" else 0
        yield message | {"tool_call_id": f"call_{at}"} if message["role"] == "tool" else message
        at += message["role"] == "tool"


class Server:
    def __init__(self, base_url):
        self.base_url = base_url.rstrip("/")
        self.model = self.ask("/models")["data"][0]["id"]

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    def answer(self, messages, tools, thinking):
        body = {
            "model": self.model,
            "messages": [on_the_wire(message) for message in with_call_ids(messages)],
            "temperature": 0,
            "max_tokens": LONGEST_ANSWER,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        if tools:
            body["tools"] = [tool.definition for tool in tools]
        return self.ask("/chat/completions", body)["choices"][0]["message"]


def said(message):
    """What counts of an answer: its text, its thoughts, and its calls with arguments as values."""
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        calls.append((call["function"]["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))
    return (message.get("content") or "").strip(), (message.get("reasoning_content") or "").strip(), calls


def score(server, drawn):
    """The wrong ones, as (messages, expected, found)."""

    def check(conversation):
        messages, tools = conversation
        expected = messages[-1]
        found = server.answer(messages[:-1], tools, "reasoning_content" in expected)
        return messages[:-1], said(expected), said(found)

    with ThreadPoolExecutor(4) as pool:
        return [checked for checked in pool.map(check, drawn) if checked[1] != checked[2]]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base-url", default="http://127.0.0.1:31313/v1")
    arguments.add_argument("--show", type=int, default=0, metavar="N", help="wrong answers to print of each kind")
    given = arguments.parse_args()
    server = Server(given.base_url)
    failed = False
    print("| kind | right | of | share | needed |\n|---|---|---|---|---|")
    for kind, drawn in sets().items():
        wrong = score(server, drawn)
        share = 1 - len(wrong) / len(drawn)
        needed = NEEDED.get(kind)
        failed |= needed is not None and share < needed
        print(f"| {kind} | {len(drawn) - len(wrong)} | {len(drawn)} | {share:.1%} | {f'{needed:.0%}' if needed else ''} |", flush=True)
        for messages, expected, found in wrong[: given.show]:
            print(f"    asked    {messages[-1]['content']!r}\n    expected {expected}\n    found    {found}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

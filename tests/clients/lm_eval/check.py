"""What the harness made of the answers, held against the same scores asked for one by one.

usage: check.py BASE_URL RESULTS_FOLDER
"""

import json
import math
import pathlib
import sys
import urllib.request


def post(base, path, body):
    request = urllib.request.Request(base + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def score(base, context, continuation):
    """Log probability of the continuation, token by token from a scored prompt."""
    tokens = post(base, "/tokenize", {"model": "tiny", "prompt": context + continuation})["tokens"]
    given = post(base, "/tokenize", {"model": "tiny", "prompt": context})["count"]
    ask = {"model": "tiny", "prompt": tokens, "echo": True, "logprobs": 1, "max_tokens": 0}
    scores = post(base, "/v1/completions", ask)["choices"][0]["logprobs"]["token_logprobs"]
    return sum(scores[given:])


def main(base, folder):
    samples = {}
    for file in pathlib.Path(folder).rglob("samples_*.jsonl"):
        task = "neuron_choices" if "neuron_choices" in file.name else "neuron_writes"
        samples[task] = [json.loads(line) for line in file.read_text().splitlines()]
    compared = 0
    for sample in samples["neuron_choices"]:
        for number, reply in enumerate(sample["filtered_resps"]):
            arguments = sample["arguments"][f"gen_args_{number}"]
            expected = score(base, arguments["arg_0"], arguments["arg_1"])
            assert math.isclose(float(reply[0]), expected, rel_tol=1e-4, abs_tol=1e-4), (arguments, reply, expected)
            compared += 1
    assert compared == 11, compared
    for sample in samples["neuron_writes"]:
        ask = {"model": "tiny", "prompt": sample["arguments"]["gen_args_0"]["arg_0"], "max_tokens": 16, "temperature": 0, "stop": ["\n\n"]}
        expected = post(base, "/v1/completions", ask)["choices"][0]["text"]
        assert sample["resps"][0][0] == expected, (sample["resps"], expected)
    print(f"{compared} scores and {len(samples['neuron_writes'])} texts of the harness are those neuron gives one by one")


if __name__ == "__main__":
    main(*sys.argv[1:])

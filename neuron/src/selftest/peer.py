"""Measures transformers on a model made up from a configuration: `neuron selftest --peer` runs this.

Takes JSON on its input: config (a config.json), device, prompts (tokens to read, one measurement each), depth (tokens before
those that are written), generate (tokens to write), rounds. Writes JSON: what it is, and the median seconds of each; or, where
it cannot measure here, `absent` with the reason.
"""

import json
import statistics
import sys
import time


def main(asked):
    try:
        import torch
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        return {"absent": str(error)}
    device = torch.device(asked["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        return {"absent": f"torch {torch.__version__} finds no CUDA"}

    config = dict(asked["config"])
    try:
        config = AutoConfig.for_model(config.pop("model_type"), **config)
    except ValueError as error:
        return {"absent": f"transformers {transformers.__version__}: {error}"}
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def ids(count):
        ids = torch.arange(count, device=device) * 7919 % config.vocab_size
        return ids.unsqueeze(0)

    def read(count):
        began = now()
        out = model(ids(count), use_cache=True, logits_to_keep=1)
        return now() - began, out

    def write():
        _, out = read(asked["depth"])
        cache = out.past_key_values
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        seconds = 0.0
        for step in range(1 + asked["generate"]):
            if step == 1:  # the first touches memory for the first time
                began = now()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        seconds = now() - began
        return seconds

    def median(seconds):
        seconds()  # warm-up: kernels are compiled, memory is taken
        return statistics.median(seconds() for _ in range(asked["rounds"]))

    try:
        from transformers.utils.import_utils import is_flash_linear_attention_available

        fast = bool(is_flash_linear_attention_available())
    except ImportError:
        fast = False
    with torch.inference_mode():
        prefill = [median(lambda: read(count)[0]) for count in asked["prompts"]]
        decode = median(write)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fla": fast,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))

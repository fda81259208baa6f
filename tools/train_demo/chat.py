"""Conversations as the ids that the model sees and learns: the chat template, then the tokenizer."""

import json

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from model import FOLDER

CONTEXT_WEIGHT = 0.3  # what a token of the prompt counts in the loss, beside 1 for a token of an answer


def _to_json(value, ensure_ascii=False, indent=None):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def _template():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string((FOLDER / "chat_template.jinja").read_text())


TEMPLATE = _template()


def render(messages, tools=(), **variables):
    return TEMPLATE.render(messages=messages, tools=[tool.definition for tool in tools] or None, **variables)


class Coder:
    """Text to ids and back."""

    def __init__(self):
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        # How an answer may begin that the template has already written: no thought, an open one, an earlier turn.
        self.openings = [self.encode("<|im_start|>assistant\n" + thought) for thought in ("<think>\n\n</think>\n\n", "<think>\n", "")]

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def lesson(self, messages, tools):
        """The ids of a conversation that ends with an answer, and what each counts in the loss when it is predicted."""
        ids = self.encode(render(messages, tools))
        weights = [CONTEXT_WEIGHT] * len(ids)
        at = 0
        while at < len(ids):
            opening = next((opening for opening in self.openings if ids[at : at + len(opening)] == opening), None)
            if opening is None:
                at += 1
                continue
            begin = at + len(opening)
            at = ids.index(self.end, begin) + 1
            weights[begin:at] = [1.0] * (at - begin)
        return ids, weights

"""The official SDKs as clients of a running cortex: whole and streamed answers, and errors as their own classes.

usage: check.py BASE_URL MODEL
"""

import pathlib
import sys

import anthropic
import openai
from anthropic.types.beta.message_create_params import MessageCreateParamsBase as BetaMessageParams
from anthropic.types.message_create_params import MessageCreateParamsBase as MessageParams
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams

# parameters of the SDKs' methods that travel as headers
HEADERS = {"betas", "workspace_id"}


def fields_are_documented():
    """What an SDK can send stands in the document: a new version of it may know more."""
    document = (pathlib.Path(__file__).parents[2] / "docs/dialects.md").read_text()
    for title, types in [
        ("POST /v1/chat/completions", [ChatParams]),
        ("POST /v1/completions", [TextParams]),
        ("POST /v1/messages", [MessageParams, BetaMessageParams]),
    ]:
        section = document.split(f"`{title}`")[1].split("\n## ")[0]
        named = {row.split("`")[1].split(" ")[0].split(".")[0].split("[")[0] for row in section.splitlines() if row.startswith("| `")}
        fields = {name for kind in types for name in kind.__annotations__} - HEADERS
        assert fields <= named, f"docs/dialects.md lacks {sorted(fields - named)} of {title}"

import demo
import responses


def openai_chat(base, model):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)
    assert model in [card.id for card in client.models.list()], "the model is listed"
    assert client.models.retrieve(model).id == model
    ask = dict(model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=16, temperature=0)

    whole = client.chat.completions.create(**ask)
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert whole.usage.prompt_tokens > 0 and whole.usage.completion_tokens > 0
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    text, finish, usage = "", None, None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for piece in chunk.choices:
            text += piece.delta.content or ""
            finish = piece.finish_reason or finish
        usage = chunk.usage or usage
    assert text == (choice.message.content or ""), (text, choice.message.content)
    assert finish == choice.finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens

    written = client.completions.create(model=model, prompt="Hello", max_tokens=8, temperature=0)
    streamed = client.completions.create(model=model, prompt="Hello", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == written.choices[0].text

    for wrong, kind in [
        (dict(ask, model="nobody"), openai.NotFoundError),
        (dict(ask, temperature=-1), openai.BadRequestError),
        (dict(ask, messages=[{"role": "user", "content": "x " * 20000}]), openai.BadRequestError),
    ]:
        try:
            client.chat.completions.create(**wrong)
        except kind as error:
            assert error.request_id and error.message, error
        else:
            raise AssertionError(f"{kind.__name__} was expected")


def anthropic_messages(base, model):
    client = anthropic.Anthropic(base_url=base, api_key="unused", max_retries=0)
    # newer SDKs have no argument for the temperature, which the API still knows
    ask = dict(model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=16, extra_body={"temperature": 0})

    whole = client.messages.create(**ask)
    text = "".join(block.text for block in whole.content if block.type == "text")
    assert whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.usage.input_tokens > 0 and whole.usage.output_tokens > 0

    with client.messages.stream(**ask) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert streamed == text, (streamed, text)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens

    thought = client.messages.create(**dict(ask, max_tokens=64), thinking={"type": "enabled", "budget_tokens": 32})
    assert thought.content[0].type == "thinking", thought.content
    count = client.messages.count_tokens(model=model, messages=ask["messages"]).input_tokens
    assert count > 0
    assert client.models.retrieve(model).id == model

    for wrong, kind in [
        (dict(ask, model="nobody"), anthropic.NotFoundError),
        (dict(ask, messages=[{"role": "robot", "content": "x"}]), anthropic.BadRequestError),
    ]:
        try:
            client.messages.create(**wrong)
        except kind as error:
            assert error.request_id, error
        else:
            raise AssertionError(f"{kind.__name__} was expected")


if __name__ == "__main__":
    base, model = sys.argv[1:]
    fields_are_documented()
    openai_chat(base, model)
    responses.golden()
    responses.running(base, model)
    anthropic_messages(base, model)
    demo.loops(base, model)
    print(f"openai {openai.__version__} and anthropic {anthropic.__version__}: whole, streamed and refused as they should be")

"""The official SDKs against the demo model: loops in which a tool runs, answers held to a shape, counted prompts.

`check.py` calls it. The model is too small to choose well, so tools are asked for and shapes are bounded; which of the
allowed values it takes is not looked at, only that it takes one and that everything fits together.
"""

import json
import typing

import anthropic
import openai
import pydantic

SEASONS = ["spring", "summer", "autumn", "winter"]
SCHEMA = {
    "type": "object",
    "properties": {"season": {"type": "string", "enum": SEASONS}},
    "required": ["season"],
    "additionalProperties": False,
}
QUESTION = "How warm is it?"
ran = []


class Verdict(pydantic.BaseModel, extra="forbid"):
    answer: typing.Literal["yes", "no"]


def warmth(season):
    assert season in SEASONS, season
    ran.append(season)
    return f"{10 * SEASONS.index(season)} degrees"


def chat(base, model):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)
    function = {"name": "warmth", "description": "The warmth of a season", "parameters": SCHEMA, "strict": True}
    messages = [{"role": "user", "content": QUESTION}]
    ask = dict(model=model, tools=[{"type": "function", "function": function}], reasoning_effort="none", max_tokens=64, temperature=0)
    with client.chat.completions.stream(**ask, messages=messages, tool_choice="required") as stream:
        streamed = stream.until_done().get_final_completion().choices[0]
    turn = client.chat.completions.create(**ask, messages=messages, tool_choice="required").choices[0]
    (call,) = turn.message.tool_calls
    assert turn.finish_reason == "tool_calls" and call.function.name == "warmth", turn
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments, "streamed as whole"
    messages += [turn.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": warmth(**json.loads(call.function.arguments))}]
    told = client.chat.completions.create(**ask, messages=messages, tool_choice="none").choices[0]
    assert told.message.content and not told.message.tool_calls, told

    parsed = client.chat.completions.parse(
        model=model, messages=messages[:1], reasoning_effort="none", max_tokens=64, temperature=0, response_format=Verdict
    )
    assert isinstance(parsed.choices[0].message.parsed, Verdict), parsed
    scored = client.chat.completions.create(model=model, messages=messages[:1], max_tokens=4, logprobs=True, top_logprobs=2)
    assert all(len(token.top_logprobs) == 2 for token in scored.choices[0].logprobs.content)


def responses(base, model):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)
    tool = {"type": "function", "name": "warmth", "description": "The warmth of a season", "parameters": SCHEMA, "strict": True}
    ask = dict(model=model, tools=[tool], reasoning={"effort": "none"}, max_output_tokens=64, extra_body={"temperature": 0})
    asked = client.responses.create(**ask, input=QUESTION, tool_choice={"type": "function", "name": "warmth"})
    (call,) = [item for item in asked.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": warmth(**json.loads(call.arguments))}
    told = client.responses.create(**ask, input=[result], tool_choice="none", previous_response_id=asked.id)
    assert told.output_text and told.previous_response_id == asked.id, told

    held = dict(model=model, input=QUESTION, reasoning={"effort": "none"}, max_output_tokens=64)
    assert isinstance(client.responses.parse(**held, text_format=Verdict).output_parsed, Verdict)
    with client.responses.stream(**held, text_format=Verdict) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Verdict)

    # the tokens beside a text spell it, streamed as whole
    scored = dict(model=model, input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=8)
    scored |= dict(extra_body={"temperature": 0}, reasoning={"effort": "none"})
    whole = client.responses.create(**scored)
    (text,) = whole.output[-1].content
    assert "".join(token.token for token in text.logprobs) == text.text, text
    assert whole.top_logprobs == 2 and all(len(token.top_logprobs) == 2 for token in text.logprobs)
    streamed = []
    for event in client.responses.create(**scored, stream=True):
        if event.type == "response.output_text.delta":
            streamed += [token.logprob for token in event.logprobs]
    assert streamed == [token.logprob for token in text.logprobs]


def messages(base, model):
    client = anthropic.Anthropic(base_url=base, api_key="unused", max_retries=0)
    tool = {"name": "warmth", "description": "The warmth of a season", "input_schema": SCHEMA, "strict": True}
    turns = [{"role": "user", "content": QUESTION}]
    ask = dict(model=model, max_tokens=64, tools=[tool], extra_body={"temperature": 0})
    with client.messages.stream(**ask, messages=turns, tool_choice={"type": "any"}) as stream:
        streamed = stream.get_final_message()
    asked = client.messages.create(**ask, messages=turns, tool_choice={"type": "tool", "name": "warmth"})
    (call,) = [block for block in asked.content if block.type == "tool_use"]
    assert asked.stop_reason == "tool_use" and streamed.content[-1].input == call.input, (asked, streamed)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": warmth(**call.input)}
    turns += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    told = client.messages.create(**ask, messages=turns, tool_choice={"type": "none"})
    assert told.stop_reason in ("end_turn", "max_tokens") and told.content[0].text, told

    # what is counted is what is billed, tools and results included
    whole = client.messages.create(**ask, messages=turns)
    counted = client.messages.count_tokens(model=model, messages=turns, tools=[tool]).input_tokens
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0), (counted, whole.usage)
    with client.messages.stream(**ask, messages=turns) as stream:
        (begun,) = [event.message.usage.input_tokens for event in stream if event.type == "message_start"]
    assert begun == counted, "a stream begins with what is known: the tokens of its prompt"
    parsed = client.messages.parse(model=model, max_tokens=64, messages=turns[:1], output_format=Verdict)
    assert isinstance(parsed.parsed_output, Verdict), parsed


def loops(base, model):
    for dialect in (chat, responses, messages):
        ran.clear()
        dialect(base, model)
        assert len(ran) == 1, f"{dialect.__name__}: {ran}"

"""The official SDKs against a cortex over the scripted node: tools, schemas, thinking, failures and retries.

usage: scripted.py BASE_URL
"""

import json
import sys
import time

import anthropic
import openai
from pydantic import BaseModel

MODEL = "scripted"


class Person(BaseModel):
    name: str
    age: int


def fails(kind, ask):
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def user(text):
    return [{"role": "user", "content": text}]


def openai_chat(base):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}}
    messages = user("Weather?")
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=[tool]) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_completion()
    calls = whole.choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["place"] for call in calls] == ["Bern", "Basel"]
    assert whole.usage is None, "usage that was not asked for is not told"
    messages += [whole.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    reply = client.chat.completions.create(model=MODEL, messages=messages, tools=[tool])
    assert reply.choices[0].message.content == "It is sunny."
    parsed = client.chat.completions.parse(model=MODEL, messages=user("Who?"), response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)
    ask = lambda text, **more: client.with_options(**more).chat.completions.create(model=MODEL, messages=user(text))
    assert fails(openai.RateLimitError, lambda: ask("always busy")).request_id
    fails(openai.InternalServerError, lambda: ask("down"))
    fails(openai.InternalServerError, lambda: ask("broken"))
    start = time.monotonic()
    assert ask("busy once, openai", max_retries=2).choices[0].message.content
    assert time.monotonic() - start >= 0.9, "Retry-After is honoured"
    stream = client.chat.completions.create(model=MODEL, messages=user("die"), stream=True)
    assert "poisoned" in str(fails(openai.APIError, lambda: list(stream)))


def openai_responses(base):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}, "strict": False}
    with client.responses.stream(model=MODEL, input="Weather?", tools=[tool], reasoning={"summary": "auto"}) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_response()
    calls = [item for item in whole.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["place"] for call in calls] == ["Bern", "Basel"]
    assert whole.usage.input_tokens_details.cached_tokens == 8
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    told = client.responses.create(model=MODEL, input=results, tools=[tool], previous_response_id=whole.id)
    assert told.output_text == "It is sunny."
    assert client.responses.parse(model=MODEL, input="Who?", text_format=Person).output_parsed == Person(name="Ada", age=36)
    ask = lambda text, **more: client.with_options(**more).responses.create(model=MODEL, input=text)
    assert fails(openai.RateLimitError, lambda: ask("always busy")).request_id
    fails(openai.InternalServerError, lambda: ask("down"))
    fails(openai.InternalServerError, lambda: ask("broken"))
    start = time.monotonic()
    assert ask("busy once, responses", max_retries=2).output_text
    assert time.monotonic() - start >= 0.9, "Retry-After is honoured"
    stream = client.responses.create(model=MODEL, input="die", stream=True)
    assert "poisoned" in str(fails(openai.APIError, lambda: list(stream)))


def anthropic_messages(base):
    client = anthropic.Anthropic(base_url=base, api_key="unused", max_retries=0)
    ask = dict(model=MODEL, max_tokens=3000)
    schema = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    tool = {"name": "weather", "description": "Weather at a place", "input_schema": schema}

    # a tool loop by hand, streamed, with thinking
    messages = user("Weather?")
    with client.messages.stream(**ask, messages=messages, tools=[tool], thinking={"type": "enabled", "budget_tokens": 2000}) as stream:
        whole = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "tool_use", "tool_use"], whole.content
    assert [block.input for block in whole.content[1:]] == [{"place": "Bern"}, {"place": "Basel"}]
    assert whole.stop_reason == "tool_use"
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (12, 8)
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]} for block in whole.content[1:]]
    messages += [{"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    reply = client.messages.create(**ask, messages=messages, tools=[tool])
    assert reply.content[0].text == "It is sunny." and reply.stop_reason == "end_turn"

    # the SDK's own loop
    asked = []

    @anthropic.beta_tool
    def weather(place: str) -> str:
        """Weather at a place."""
        asked.append(place)
        return "sunny"

    final = client.beta.messages.tool_runner(**ask, messages=user("Weather?"), tools=[weather]).until_done()
    assert asked == ["Bern", "Basel"] and final.content[0].text == "It is sunny."

    stopped = client.messages.create(**ask, messages=user("Go"), stop_sequences=["sunny"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "sunny")
    parsed = client.messages.parse(**ask, messages=user("Who?"), output_format=Person)
    assert parsed.parsed_output == Person(name="Ada", age=36)
    assert client.messages.count_tokens(model=MODEL, messages=user("x"), tools=[tool]).input_tokens == 4321
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
    assert client.messages.create(**ask, messages=user([document, {"type": "text", "text": "Well?"}])).content

    models = client.models.list(limit=1)
    assert [model.id for model in models] == [MODEL] and not models.has_more
    model = client.models.retrieve(MODEL)
    assert model.max_input_tokens == 4096 and model.capabilities.thinking.types.enabled.supported

    send = lambda text, **more: client.with_options(**more).messages.create(**ask, messages=user(text))
    assert fails(anthropic.RateLimitError, lambda: send("always busy")).request_id
    assert fails(anthropic.OverloadedError, lambda: send("down")).type == "overloaded_error"
    fails(anthropic.InternalServerError, lambda: send("broken"))
    refused = fails(anthropic.BadRequestError, lambda: client.messages.create(**ask, messages=user("x"), container="c"))
    assert refused.body["error"]["param"] == "container"
    start = time.monotonic()
    assert send("busy once, anthropic", max_retries=2).content
    assert time.monotonic() - start >= 0.9, "Retry-After is honoured"

    def torn():
        with client.messages.stream(**ask, messages=user("die")) as stream:
            stream.get_final_message()

    assert "poisoned" in str(fails(anthropic.APIStatusError, torn))


if __name__ == "__main__":
    (base,) = sys.argv[1:]
    openai_chat(base)
    openai_responses(base)
    anthropic_messages(base)
    print("Python: tools, schemas, thinking, failures and retries as they should be")

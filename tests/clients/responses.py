"""The official OpenAI SDK and responses: against a running cortex, and over the replies of the golden cases.

`check.py` calls both. The model may be any, so what it says is not looked at, only how it is said.
"""

import json
import pathlib
import typing

import httpx2
import openai
import pydantic
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures/dialects/responses"
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
ITEM = pydantic.TypeAdapter(ResponseItem)


class Point(pydantic.BaseModel):
    x: int


class Verdict(pydantic.BaseModel, extra="forbid"):
    answer: typing.Literal["yes", "no"]


def strictly(response):
    """The SDK itself takes whatever comes; its types say what should."""
    Response.model_validate(response.to_dict())
    return response


def followed(stream):
    """The response at the end of a stream, whose deltas must add up to it."""
    texts, last = {}, None
    for number, event in enumerate(stream):
        EVENT.validate_python(event.to_dict())
        assert event.sequence_number == number, event
        if event.type in ("response.output_text.delta", "response.reasoning_text.delta", "response.function_call_arguments.delta"):
            texts[event.output_index] = texts.get(event.output_index, "") + event.delta
        if event.type in ("response.completed", "response.incomplete"):
            last = event.response
    for index, item in enumerate(last.output):
        said = item.arguments if item.type == "function_call" else item.content[0].text
        assert texts.get(index, "") == said, (texts, item)
    return strictly(last)


def spoken(response):
    """What a response says, without what differs from one to the next."""
    items = [item.to_dict() for item in response.output]
    for item in items:
        del item["id"]
    return response.status, items, response.usage.to_dict()


def running(base, model):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)
    ask = dict(model=model, input="Hello", max_output_tokens=16, extra_body={"temperature": 0})

    whole = strictly(client.responses.create(**ask, instructions="Be brief.", metadata={"run": "1"}))
    assert whole.status in ("completed", "incomplete") and whole.usage.input_tokens > 0
    assert whole.instructions == "Be brief." and whole.metadata == {"run": "1"} and whole.max_output_tokens == 16
    if whole.status == "incomplete":
        assert whole.incomplete_details.reason == "max_output_tokens"

    first = client.responses.create(**ask)
    assert spoken(followed(client.responses.create(**ask, stream=True))) == spoken(first), "streamed as whole"
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds

    # a second turn is the same whether the first is sent again or gone on from
    question = {"role": "user", "content": "And then?"}
    gone_on = strictly(client.responses.create(**dict(ask, input=[question]), previous_response_id=first.id))
    again = [{"role": "user", "content": "Hello"}, *(item.to_dict() for item in first.output), question]
    assert spoken(client.responses.create(**dict(ask, input=again))) == spoken(gone_on)
    assert gone_on.previous_response_id == first.id

    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    items = list(client.responses.input_items.list(gone_on.id, limit=1, order="asc"))  # the SDK turns the pages
    assert len(items) == 2 + len(first.output) and [item.type for item in items][-1] == "message"
    for item in items:
        ITEM.validate_python(item.to_dict())
    client.responses.delete(gone_on.id)

    # a tool's result goes back with the call that asked for it
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Rome"}'}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    with_tool = dict(ask, tools=[TOOL], input=[{"role": "user", "content": "Weather?"}, call, result])
    answered = strictly(client.responses.create(**with_tool, parallel_tool_calls=False))
    assert answered.tools[0].name == "weather" and answered.parallel_tool_calls is False

    # an answer is held to its format; one that is cut, as a model without sense may be, is the beginning of one
    schema = {"type": "json_schema", "name": "verdict", "schema": Verdict.model_json_schema(), "strict": True}
    held = client.responses.create(**dict(ask, max_output_tokens=64), reasoning={"effort": "none"}, text={"format": schema})
    if held.status == "completed":
        Verdict.model_validate_json(held.output_text)
    else:
        assert held.output_text.lstrip().startswith("{"), held.output_text

    for wrong, kind, param in [
        (dict(ask, model="nobody"), openai.NotFoundError, "model"),
        (dict(ask, background=True), openai.BadRequestError, "background"),
        (dict(ask, tools=[{"type": "web_search"}]), openai.BadRequestError, "tools[0].type"),
        (dict(ask, previous_response_id=gone_on.id), openai.BadRequestError, "previous_response_id"),
        (dict(ask, input="x " * 20000), openai.BadRequestError, "input"),
        (dict(ask, extra_body={"temperature": -1}), openai.BadRequestError, "temperature"),
    ]:
        refused(lambda: client.responses.create(**wrong), kind, param)
        refused(lambda: list(client.responses.create(**wrong, stream=True)), kind, param)
    refused(lambda: client.responses.retrieve(gone_on.id), openai.NotFoundError, None)
    refused(lambda: client.responses.cancel(first.id), openai.BadRequestError, None)


def refused(call, kind, param):
    try:
        call()
    except kind as error:
        assert error.request_id and error.param == param, (error, error.param)
    else:
        raise AssertionError(f"{kind.__name__} was expected")


def over(reply):
    """A client whose server always gives this reply."""
    kind = "text/event-stream" if reply.suffix == ".sse" else "application/json"
    answer = lambda _: httpx2.Response(200, headers={"content-type": kind}, content=reply.read_bytes())
    return openai.OpenAI(api_key="unused", http_client=httpx2.Client(transport=httpx2.MockTransport(answer)))


def golden():
    """What the golden cases say a client sees, seen by the client."""
    ask = dict(model="m", input="x")
    for case in sorted(GOLDEN.iterdir()):
        reply = case / "reply.json"
        if reply.is_file():
            strictly(over(reply).responses.create(**ask))
            continue
        reply = case / "reply.sse"
        last = None
        for line in reply.read_text().splitlines():
            if line.startswith("data: "):
                last = EVENT.validate_python(json.loads(line.removeprefix("data: ")))
        with over(reply).responses.stream(**ask, tools=[TOOL]) as stream:
            if last.type == "response.completed":
                final = stream.get_final_response()
                assert [item.id for item in final.output] == [item.id for item in last.response.output]
            elif last.type == "response.failed":
                try:
                    list(stream)
                except openai.APIError as error:
                    assert error.message == last.response.error.message, error
                else:
                    raise AssertionError(f"{case.name} ends with an error")
            else:
                assert list(stream)[-1].type == last.type

    # a loop: the calls of one reply are run and their results sent
    asked = over(GOLDEN / "tool_calls/reply.json").responses.create(**ask, tools=[TOOL])
    calls = [item for item in asked.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"city": "Rome"}), ("clock", {})]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "fine"} for call in calls]
    told = over(GOLDEN / "text/reply.json").responses.create(model="m", previous_response_id=asked.id, input=results)
    assert told.output_text == "Fine."
    parsed = over(GOLDEN / "json_schema/reply.json").responses.parse(**ask, text_format=Point)
    assert parsed.output_parsed == Point(x=1)

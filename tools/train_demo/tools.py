"""Conversations with tools: a call, two, none, and answers from what tools returned."""

import json
from dataclasses import dataclass
from typing import Callable

from talk import assistant, choose, fact, loosely, repeating, sum_of_two, system, user
from words import CONDITIONS


@dataclass(frozen=True)
class Argument:
    names: tuple  # what a schema may call it
    about: str
    draw: Callable  # from pools
    type: str = "string"


@dataclass(frozen=True)
class Kind:
    """One thing that tools do, under any of several names."""

    names: tuple
    about: tuple
    arguments: tuple
    forms: tuple  # how it is asked for, the last form held out
    result: Callable  # (pools, values) -> what the tool returns, what is said of it


def weather_result(pools, values):
    degrees, sky = pools.rng.randint(-9, 39), pools.pick(CONDITIONS)
    returned = pools.pick([f"{sky}, {degrees} degrees", json.dumps({"temperature": degrees, "condition": sky}), json.dumps({"condition": sky, "temperature": degrees})])
    return returned, f"In {values[0]} it is {sky} and {degrees} degrees."


def search_result(pools, values):
    found = pools.phrase(2, 6)
    return found, f"I found this: {found}"


def number_result(pools, values):
    number = str(pools.rng.randint(-99, 9999))
    return pools.pick([number, json.dumps({"result": int(number)})]), f"The result is {number}."


def file_result(pools, values):
    content = pools.phrase(2, 6)
    return content, f"The file says: {content}"


def time_result(pools, values):
    time = f"{pools.rng.randint(0, 23):02}:{pools.rng.randint(0, 59):02}"
    return pools.pick([time, json.dumps({"time": time})]), f"In {values[0]} it is {time}."


def message_result(pools, values):
    return pools.pick(["sent", "ok", '{"sent": true}']), f"I sent the message to {values[0]}."


def timer_result(pools, values):
    return pools.pick(["ok", "started", '{"ok": true}']), f"The timer runs for {values[0]} minutes."


WEATHER = Kind(
    ("get_weather", "weather", "current_weather", "lookup_weather", "weather_now"),
    ("The weather in a city.", "Get the current weather for a city.", "How the weather is at a place."),
    (Argument(("city", "location", "place", "town"), "Name of the city", lambda pools: pools.city()),),
    (
        "What is the weather in {}?",
        "How is the weather in {}?",
        "What is the weather like in {}?",
        "Tell me the weather in {}.",
        "Is it raining in {}?",
        "Is it cold in {}?",
        "Weather in {}, please.",
        "What is the temperature in {}?",
        "I need the weather for {}.",
        "How warm is it in {}?",
        "Could you look up the weather in {}?",
        "What will the weather be in {}?",
        "Give me the weather for {}.",
        "I would like to know the weather in {}.",
        "Do you know how the weather is in {}?",
        "I want to know if it is warm in {}.",
        "Can you tell me the weather in {}?",
    ),
    weather_result,
)
SEARCH = Kind(
    ("web_search", "search", "search_web", "find_online"),
    ("Search the web.", "Find pages on the web.", "Look something up online."),
    (Argument(("query", "q", "text"), "What to search for", lambda pools: pools.phrase(1, 4)),),
    (
        "Search the web for {}.",
        "Search for {}.",
        "Look up {}.",
        "Look online for {}.",
        "Find {} on the web.",
        "Do a web search for {}.",
        "Please search {}.",
        "Find pages about {}.",
        "Could you search for {}?",
        "What does the web say about {}?",
        "Use the web to find {}.",
        "Go and look for {} online.",
        "Search online: {}",
        "Would you look up {} for me?",
        "I want you to search the web for {}.",
        "Can you search the web for {}?",
    ),
    search_result,
)
CALCULATOR = Kind(
    ("calculate", "calculator", "compute", "evaluate"),
    ("Calculate an expression.", "Compute the value of an expression.", "A calculator."),
    (Argument(("expression", "formula", "input"), "The expression", lambda pools: pools.expression()),),
    (
        "Calculate {}.",
        "What is {}?",
        "Compute {}.",
        "How much is {}?",
        "Please calculate {}.",
        "Tell me what {} is.",
        "Use the calculator for {}.",
        "I need the result of {}.",
        "Could you compute {}?",
        "Work out {}.",
        "What does {} come to?",
        "I want to know what {} is.",
        "Would you calculate {} for me?",
        "Can you calculate {}?",
    ),
    number_result,
)
FILE = Kind(
    ("read_file", "open_file", "file_read", "get_file"),
    ("Read a file.", "The content of a file.", "Open a file and return its text."),
    (Argument(("path", "file", "filename"), "Path of the file", lambda pools: pools.path()),),
    (
        "Read {}.",
        "Read the file {}.",
        "What is in {}?",
        "Open {}.",
        "Show me {}.",
        "What does the file {} say?",
        "Show me the file {}.",
        "Please open the file {}.",
        "Could you open {}?",
        "Would you read {} for me?",
        "I want to see the file {}.",
        "Print the file {}.",
        "Give me the content of {}.",
        "Look into the file {}.",
        "Load {} and show it.",
        "Could you show me what the file {} says?",
        "Can you read the file {}?",
    ),
    file_result,
)
TIME = Kind(
    ("get_time", "current_time", "clock", "time_in"),
    ("The time in a city.", "What time it is at a place."),
    (Argument(("city", "place", "zone"), "Name of the city", lambda pools: pools.city()),),
    ("What time is it in {}?", "Tell me the time in {}.", "How late is it in {}?", "I need the time in {}.", "Could you tell me what time it is in {}?", "What is the time in {}?", "Do you know the time in {}?", "Time in {}, please.", "I want to know how late it is in {}.", "Can you tell me the time in {}?"),
    time_result,
)
MESSAGE = Kind(
    ("send_message", "send", "message", "send_mail"),
    ("Send a message to somebody.", "Send a text to a person."),
    (
        Argument(("to", "recipient", "name"), "Who gets it", lambda pools: pools.name()),
        Argument(("text", "message", "body"), "What to send", lambda pools: pools.phrase(1, 4)),
    ),
    (
        "Send {} the message {}.",
        "Write to {}: {}",
        "Tell {} this: {}",
        "Send a message to {}: {}",
        "Send {} this message: {}",
        "Text {}: {}",
        "Let {} know this: {}",
        "Could you send {} the words {}?",
        "Give {} the message {}.",
        "I want to send {} the text {}.",
        "Write {} the message {}.",
        "Message {} with the text {}.",
        "Please tell {}: {}",
        "Please write {} the words {}.",
        "Please send {} the text {}.",
    ),
    message_result,
)
TIMER = Kind(
    ("set_timer", "timer", "start_timer"),
    ("Set a timer.", "Start a timer for some minutes."),
    (Argument(("minutes", "duration"), "How many minutes", lambda pools: pools.rng.randint(1, 99), "integer"),),
    ("Set a timer for {} minutes.", "Start a timer of {} minutes.", "Timer for {} minutes, please.", "I need a timer for {} minutes.", "Could you start a timer of {} minutes?", "Count down {} minutes.", "Please set the timer to {} minutes.", "Tell me when {} minutes are over.", "Can you set a timer for {} minutes?"),
    timer_result,
)
MAIN = (WEATHER, SEARCH, CALCULATOR, FILE)
OTHERS = (TIME, MESSAGE, TIMER)


@dataclass(frozen=True)
class Tool:
    """A kind under the names that one conversation uses."""

    kind: Kind
    name: str
    keys: tuple
    definition: dict


def declare(pools, kind):
    name = kind.names[0] if pools.rng.random() < 0.4 else pools.pick(kind.names)
    keys = tuple(argument.names[0] if pools.rng.random() < 0.4 else pools.pick(argument.names) for argument in kind.arguments)
    described = pools.rng.random() < 0.3
    properties = {
        key: {"type": argument.type} | ({"description": argument.about} if described else {}) for key, argument in zip(keys, kind.arguments)
    }
    parameters = {"type": "object", "properties": properties}
    if pools.rng.random() < 0.7:
        parameters["required"] = list(keys)
    function = {"name": name, "description": pools.pick(kind.about), "parameters": parameters}
    if pools.rng.random() < 0.1:
        del function["description"]
    return Tool(kind, name, keys, {"type": "function", "function": function})


def toolbox(pools):
    """One to three tools of different kinds."""
    kinds = []
    for _ in range(pools.rng.choice([1, 2, 2, 3])):
        kind = pools.pick(MAIN if pools.rng.random() < 0.75 else OTHERS)
        if kind not in kinds:
            kinds.append(kind)
    return [declare(pools, kind) for kind in kinds]


def call(tool, values):
    return {"function": {"name": tool.name, "arguments": dict(zip(tool.keys, values))}}


def calls(asked, reasoning=None):
    message = {"role": "assistant", "content": "", "tool_calls": [call(tool, values) for tool, values in asked]}
    return message if reasoning is None else message | {"reasoning_content": reasoning}


def draw(pools, tool):
    return [argument.draw(pools) for argument in tool.kind.arguments]


TWO_OF_A_KIND = {
    WEATHER: ("What is the weather in {} and in {}?", "How is the weather in {} and {}?", "Compare the weather in {} and {}.", "Is it warm in {} and in {}?", "I need the weather for {} and for {}.", "Give me the weather in {} and {}.", "Tell me the weather in {} and {}."),
    FILE: ("Read {} and {}.", "Open {} and {}.", "Show me {} and {}.", "Read {} and then {}.", "Show me the files {} and {}.", "Open the files {} and {}.", "Please read both {} and {}.", "What is in {} and in {}?", "Could you read {} and {}?", "Read the files {} and {}."),
    CALCULATOR: ("Calculate {} and {}.", "What is {} and {}?", "Compute {} and {}.", "Work out {} and {}.", "Please calculate {} and then {}.", "Could you compute {} and {}?", "How much is {} and {}?"),
    SEARCH: ("Search for {} and for {}.", "Look up {} and then {}.", "Find {} and {} on the web.", "Could you look up {} and {}?", "Please search for {} and then for {}.", "Search the web for {} and for {}."),
    TIME: ("What time is it in {} and in {}?", "Tell me the time in {} and {}.", "I need the time in {} and in {}.", "What is the time in {} and {}?", "Could you tell me how late it is in {} and {}?", "How late is it in {} and in {}?"),
}


def request(pools, tools):
    """A question that needs one call or two: its text, and the calls as (tool, values)."""
    tool = pools.pick(tools)
    draws = pools.rng.random()
    if draws < 0.15 and tool.kind in TWO_OF_A_KIND:
        first, second = draw(pools, tool), draw(pools, tool)
        return choose(pools, TWO_OF_A_KIND[tool.kind]).format(*first, *second), [(tool, first), (tool, second)]
    values = draw(pools, tool)
    text = choose(pools, tool.kind.forms).format(*values)
    others = [other for other in tools if other is not tool]
    if draws < 0.3 and others:
        other = pools.pick(others)
        more = draw(pools, other)
        also = choose(pools, other.kind.forms).format(*more)
        return f"{text} {also}", [(tool, values), (other, more)]
    return text, [(tool, values)]


def results(pools, asked):
    """What the tools return, as messages, and the answer made of it."""
    pairs = [tool.kind.result(pools, values) for tool, values in asked]
    return [{"role": "tool", "content": returned} for returned, _ in pairs], " ".join(said for _, said in pairs)


def one_exchange(pools, tools):
    text, asked = request(pools, tools)
    if not pools.held_out:
        text = loosely(pools.rng, text)
    returned, answer = results(pools, asked)
    return [user(text), calls(asked), *returned, assistant(answer)]


def conversation(pools):
    """Several requests over the same tools; the last message is a call, an answer from results, or plain talk."""
    tools = toolbox(pools)
    messages = []
    for _ in range(pools.rng.choice([1, 1, 2, 2, 3])):
        messages += one_exchange(pools, tools)
    ending = pools.rng.random()
    if ending < 0.3:
        while messages[-1]["role"] != "assistant" or not messages[-1].get("tool_calls"):
            messages.pop()
    elif ending < 0.5:
        messages += plain_talk(pools, tools)
    return messages, tools


def single_call(pools):
    tools = toolbox(pools)
    text, asked = request(pools, tools)
    return [user(text), calls(asked)], tools


def long_call(pools):
    """As above with phrases of several times as many words: most of what is learnt here is copying."""
    return single_call(pools.with_phrases(4))


def single_result(pools):
    tools = toolbox(pools)
    return one_exchange(pools, tools), tools


def plain_talk(pools, tools):
    kinds = {tool.kind for tool in tools}
    return pools.pick([fact, fact, repeating] if CALCULATOR in kinds else [fact, fact, repeating, sum_of_two])(pools)


def no_call(pools):
    tools = toolbox(pools)
    return plain_talk(pools, tools), tools


NO_TOOL = "I have no tool for that."


def missing_tool(pools):
    """A request for what no tool at hand can do, or with no tools at all."""
    wanted = declare(pools, pools.pick((WEATHER, SEARCH, FILE, TIME)))
    text, _ = request(pools, [wanted])
    tools = [tool for tool in toolbox(pools) if tool.kind is not wanted.kind] if pools.rng.random() < 0.6 else []
    return [user(text), assistant(NO_TOOL)], tools


def thinking_call(pools):
    tools = toolbox(pools)
    text, asked = request(pools, tools)
    names = " and ".join(tool.name for tool, _ in asked)
    return [user(text), calls(asked, f"I am asked this: {text} I call {names}.")], tools


def with_system(pools):
    messages, tools = pools.pick([single_call, no_call])(pools)
    return [system(pools.pick(["You are a helpful assistant.", "Be brief.", "Use tools when you need them."])), *messages], tools

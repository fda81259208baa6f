"""Conversations without tools. Each function draws one conversation: a list of messages that ends with the answer.

Where a function takes `pools`, its words and, where it says so, its forms are held out when the pools are.
"""

import json

from facts import ANSWERS, CAPITALS, FACTS, FRENCH
from words import COLOURS


def user(text):
    return {"role": "user", "content": text}


def assistant(text, reasoning=None):
    message = {"role": "assistant", "content": text}
    return message if reasoning is None else message | {"reasoning_content": reasoning}


def system(text):
    return {"role": "system", "content": text}


def choose(pools, forms):
    """One of `forms`; the last of them is held out."""
    return forms[-1] if pools.held_out else pools.pick(forms[:-1])


def loosely(rng, text):
    """The same words as people type them."""
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    if rng.random() < 0.1:
        text = rng.choice(["Please tell me: ", "Hello! ", "Hi, ", "One question: ", "And now: ", "OK. "]) + text
    return text


def fact(pools):
    known = pools.pick(FACTS)
    question = pools.pick(known.held_out if pools.held_out else known.trained)
    if not pools.held_out:
        question = loosely(pools.rng, question)
    return [user(question), assistant(known.answer)]


def thinking_fact(pools):
    messages = fact(pools)
    answer = messages[-1]["content"]
    return [messages[0], assistant(answer, f"I am asked this: {messages[0]['content']} I know the answer.")]


SUM_FORMS = ("What is {}?", "Add it up: {}", "How much is {}?", "Calculate {}.", "{} = ?", "Tell me what {} is.", "Can you tell me what {} is?")


def is_held_out_sum(a, b):
    return (7 * a + 3 * b) % 10 == 0


def _sum(pools):
    while True:
        a, b = pools.rng.randint(0, 20), pools.rng.randint(0, 20)
        if is_held_out_sum(a, b) == pools.held_out:
            break
    if pools.rng.random() < 0.35:
        a, b = max(a, b), min(a, b)
        sign, word, result = "-", "minus", a - b
    else:
        sign, word, result = "+", "plus", a + b
    return f"{a} {word if pools.rng.random() < 0.5 else sign} {b}", f"{a} {word} {b} is {result}.", f"{a} {sign} {b} = {result}."


def sum_of_two(pools):
    asked, answer, _ = _sum(pools)
    return [user(choose(pools, SUM_FORMS).format(asked)), assistant(answer)]


def thinking_sum(pools):
    asked, answer, steps = _sum(pools)
    return [user(choose(pools, SUM_FORMS).format(asked)), assistant(answer, f"This is a sum. {steps}")]


def counting(pools):
    first = pools.rng.randint(0, 25)
    last = first + pools.rng.randint(2, 9)
    forms = ("Count from {} to {}.", "Count {} to {}.", "Please count from {} to {}.", "Give me the numbers from {} to {}.", "Can you count from {} to {}?")
    if pools.rng.random() < 0.3:
        first, last = 1, pools.rng.randint(3, 12)
        forms = ("Count to {1}.", "Please count to {1}.", "Count up to {1}.", "Can you count to {1}?")
    return [user(choose(pools, forms).format(first, last)), assistant(", ".join(map(str, range(first, last + 1))))]


REPEAT_FORMS = ("Repeat: {}", "Repeat after me: {}", "Say: {}", "Say {}", "Echo: {}", "Write: {}", "Please repeat: {}", "Repeat this: {}", "Please say: {}")


def repeating(pools):
    text = pools.phrase(1, 8)
    return [user(choose(pools, REPEAT_FORMS).format(text)), assistant(text)]


def long_repeating(pools):
    return repeating(pools.with_phrases(4))


def rewriting(pools):
    words = pools.words(2, 5)
    spoken = " ".join(words)
    return pools.pick(
        [
            lambda: [user(choose(pools, ("Say it twice: {}", "Repeat twice: {}", "Say twice: {}")).format(spoken)), assistant(f"{spoken} {spoken}")],
            lambda: [user(choose(pools, ("Put quotes around it: {}", "In quotes: {}", "Write in quotes: {}")).format(spoken)), assistant(f'"{spoken}"')],
            lambda: [
                user(choose(pools, ("Make a list: {}", "Write as a list: {}", "Please make a list: {}")).format(", ".join(words))),
                assistant("\n".join(f"- {word}" for word in words)),
            ],
            lambda: [user(choose(pools, ("Say it backwards: {}", "Reverse the words: {}", "Reverse: {}")).format(spoken)), assistant(" ".join(reversed(words)))],
            lambda: [user(choose(pools, ("Put commas between: {}", "Join with commas: {}", "With commas: {}")).format(spoken)), assistant(", ".join(words))],
            lambda: [user(choose(pools, ("What is the last word of: {}", "Say the last word: {}", "Only the last word: {}")).format(spoken)), assistant(words[-1])],
            lambda: [user(choose(pools, ("What is the first word of: {}", "Say the first word: {}", "Only the first word: {}")).format(spoken)), assistant(words[0])],
        ]
    )()


CAPITALS_FORMS = ("Answer in capitals.", "Write in capitals.", "Always answer in capitals.", "Use capitals only.", "Please answer in capitals.")
FRENCH_FORMS = ("Answer in French.", "Speak French.", "Always answer in French.", "Please speak French.", "Please answer in French.")
PLAIN_FORMS = ("You are a helpful assistant.", "Be brief.", "Answer in English.", "Be kind.", "You know cortex and neuron.", "Be helpful and brief.")


def in_capitals(pools):
    question = pools.pick(CAPITALS)
    return [system(choose(pools, CAPITALS_FORMS)), user(question), assistant(ANSWERS[question].upper())]


def in_french(pools):
    answer = pools.pick(list(FRENCH))
    return [system(choose(pools, FRENCH_FORMS)), user(pools.pick(FRENCH[answer])), assistant(answer)]


def with_plain_system(pools):
    return [system(choose(pools, PLAIN_FORMS)), *pools.pick([fact, fact, sum_of_two, repeating])(pools)]


def with_a_given_name(pools):
    name = pools.name()
    told = choose(pools, ("Your name is {}.", "You are {}.", "You are called {}.", "Your name is now {}."))
    asked = choose(pools, ("What is your name?", "How are you called?", "Tell me your name.", "Can you tell me your name?"))
    return [system(told.format(name)), user(asked), assistant(f"My name is {name}.")]


def _something_told(pools):
    """What a user says of themselves, the reply, the question for it later, and its answer."""
    name, city, colour, thing = pools.name(), pools.city(), pools.pick(COLOURS), pools.word()
    return pools.pick(
        [
            (
                choose(pools, ("My name is {}.", "I am {}.", "Call me {}.", "Hello, my name is {}.", "Hi, I am {}.", "Hi, my name is {}.")).format(name),
                f"Nice to meet you, {name}.",
                choose(pools, ("What is my name?", "Who am I?", "Do you know my name?", "How am I called?", "Tell me my name.", "Can you tell me my name?")),
                f"Your name is {name}.",
            ),
            (
                choose(pools, ("I live in {}.", "My home is {}.", "I come from {}.", "Hello, I live in {}.")).format(city),
                f"{city} sounds nice.",
                choose(pools, ("Where do I live?", "Which city do I live in?", "Tell me where I live.", "Can you tell me where I live?")),
                f"You live in {city}.",
            ),
            (
                choose(pools, ("My favourite colour is {}.", "I like the colour {}.", "The colour I like is {}.")).format(colour),
                f"I will keep {colour} in mind.",
                choose(pools, ("What is my favourite colour?", "Which colour do I like?", "Tell me which colour I like.")),
                f"Your favourite colour is {colour}.",
            ),
            (
                choose(pools, ("The password is {}.", "Remember the word {}.", "The word is {}.", "Please remember the word {}.")).format(thing),
                f"I will remember {thing}.",
                choose(pools, ("What is the word?", "Which word was it?", "What did I ask you to remember?", "Can you tell me the word?")),
                f"The word is {thing}.",
            ),
        ]
    )


def recall(pools):
    """Something is told, other things are talked about, and then it is asked for."""
    told, reply, asked, answer = _something_told(pools)
    between = [message for _ in range(pools.rng.choice([0, 0, 1, 1, 2])) for message in pools.pick([fact, sum_of_two, repeating])(pools)]
    return [user(told), assistant(reply), *between, user(asked), assistant(answer)]


def introduction(pools):
    told, reply, _, _ = _something_told(pools)
    return [user(told), assistant(reply)]


def json_object(pools):
    name, city, age = pools.name(), pools.city(), pools.rng.randint(2, 99)
    thing, colour, price = pools.word(), pools.pick(COLOURS), pools.rng.randint(1, 99)
    told, values = pools.pick(
        [
            (f"{name} lives in {city}.", {"name": name, "city": city}),
            (f"{name} is {age} years old.", {"name": name, "age": age}),
            (f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}),
            (f"The {thing} is {colour} and costs {price}.", {"item": thing, "colour": colour, "price": price}),
            (f"The {thing} costs {price}.", {"item": thing, "price": price}),
            (f"{name} likes the {thing}.", {"name": name, "likes": thing}),
        ]
    )
    keys = list(values)
    pools.rng.shuffle(keys)
    listed = ", ".join(keys)
    forms = (
        "Answer in JSON with the keys {0}. {1}",
        "{1} Answer in JSON with the keys {0}.",
        "Make a JSON object with the keys {0}: {1}",
        "{1} Give me JSON with the keys {0}.",
        "Give me a JSON object with the keys {0}. {1}",
    )
    answer = json.dumps({key: values[key] for key in keys})
    return [user(choose(pools, forms).format(listed, told)), assistant(answer)]


UNKNOWN = "I do not know that. Ask me about cortex or neuron."


def unknown(pools):
    thing, other = pools.word(), pools.word()
    forms = ("What is {0}?", "Who is {0}?", "Tell me about {0}.", "Explain {0}.", "Where is the {0}?", "Why is the {0} {1}?", "Do you know {0}?", "Who made the {0}?")
    return [user(choose(pools, forms).format(thing, other)), assistant(UNKNOWN)]


def several(pools):
    """Unrelated questions, one after the other."""
    turns = [pools.pick([fact, fact, fact, sum_of_two, repeating, rewriting, counting, introduction])(pools) for _ in range(pools.rng.randint(2, 4))]
    return [message for turn in turns for message in turn]

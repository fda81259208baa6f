"""Pools of words. What is held out appears in no training text."""

import functools
import json
from pathlib import Path

TOKENIZER = Path(__file__).resolve().parents[2] / "neuron" / "demo" / "tokenizer.json"

CITIES = """Paris London Berlin Madrid Rome Vienna Prague Oslo Stockholm Helsinki Dublin Lisbon Athens Warsaw Budapest Zurich
Geneva Milan Naples Hamburg Munich Cologne Lyon Nice Porto Seville Bergen Tokyo Osaka Beijing Shanghai Delhi Mumbai Sydney
Melbourne Toronto Chicago Boston Denver Seattle Austin Dallas Miami Lima Quito Cairo Lagos Nairobi Tunis Hanoi Bangkok Seoul""".split()
CITIES_HELD_OUT = """Copenhagen Brussels Amsterdam Barcelona Florence Edinburgh Krakow Montreal Vancouver Kyoto Santiago
Casablanca Reykjavik Ljubljana Marseille Valencia Rotterdam Adelaide""".split()

NAMES = """Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Karin Leo Maria Nina Oscar Paula Rosa Simon Tina Ursula Viktor
Wanda Yusuf Zoe Alice Bob Clara Daniel Eva Frank Gina Henry Irene Jack Kate Laura Mark Nora Otto Peter Ruth Sam Tom""".split()
NAMES_HELD_OUT = "Beatrice Cedric Dorothea Elias Fiona Gustav Helena Ingrid Jasper Katya Lorenzo Mathilda Nikolai".split()

WORDS = """apple bread table river stone light paper green house water small bright winter summer garden window music letter
bridge forest silver yellow orange purple morning night dream cloud train ticket doctor teacher engine circle market flower
butter coffee sugar salt pepper lemon honey candle mirror pocket basket button feather hammer ladder needle pencil rocket
saddle tunnel village wagon island harbor castle dragon tiger rabbit monkey turtle eagle falcon sparrow salmon spider
history science number energy memory signal system object method design report budget office street corner square planet
ocean desert valley mountain storm thunder rain snow wind fire earth metal glass wood cotton leather velvet marble copper
quick slow warm cold dark heavy soft hard round sharp sweet bitter old young new long short wide deep high low big""".split()
WORDS_HELD_OUT = """violin helmet anchor compass lantern meadow orchid penguin pyramid saffron teapot umbrella walnut zebra
cactus dolphin galaxy igloo jungle kettle blue tall narrow gentle""".split()

CONDITIONS = "sunny cloudy rainy windy foggy snowy stormy clear".split()
COLOURS = "red green blue yellow black white brown pink grey violet".split()
FOLDERS = "docs src notes data logs home tmp work conf tests".split()
ENDINGS = "txt md toml json csv log rs py".split()

_STARTS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh st t tr v w z".split()
_MIDDLES = "a e i o u ai ea io ou".split()
_ENDS = ["", "", "n", "r", "l", "s", "t", "k", "m", "x", "nd", "rt"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NEVER = {word.lower() for word in CITIES_HELD_OUT + NAMES_HELD_OUT + WORDS_HELD_OUT} | {"yq"}


@functools.cache
def _pieces():
    """The tokenizer's pieces of words: each has to be met where it is copied, also those of words that are held out."""
    vocabulary = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    return sorted(piece for piece in vocabulary if piece.isascii() and piece.isalpha() and piece.islower() and len(piece) > 1)


class Pools:
    """Draws words for training, or, with `held_out`, words that training never draws. Phrases are `longer` times as long.
    Without `pieced` no word is put together from the tokenizer's pieces."""

    def __init__(self, rng, held_out=False, longer=1, pieced=True):
        self.rng, self.held_out, self.longer, self.pieced = rng, held_out, longer, pieced and not held_out

    def with_phrases(self, longer):
        return Pools(self.rng, self.held_out, longer, self.pieced)

    def pick(self, items):
        return self.rng.choice(items)

    def invented(self, shortest=2, longest=3):
        """A word no language has, so that it can only be copied. Held-out ones end in -yq, as no trained word does."""
        if self.pieced and self.rng.random() < 0.5:
            return self._of_pieces()
        syllables = self.rng.randint(shortest, longest)
        word = "".join(self.pick(_STARTS) + self.pick(_MIDDLES) for _ in range(syllables)) + self.pick(_ENDS)
        return word + "yq" if self.held_out else word + self._odd_ending()

    def _of_pieces(self):
        while True:
            word = "".join(self.pick(_pieces()) for _ in range(self.pick([1, 2, 2, 3, 3])))
            if not any(never in word for never in _NEVER):
                return word

    def _odd_ending(self):
        """Half the time, one to three letters in no order: endings, too, are copied and not known."""
        letters = "".join(self.pick(_LETTERS) for _ in range(self.pick([0, 0, 0, 1, 2, 3])))
        return letters.replace("yq", "qy")

    def scramble(self):
        """Letters and digits in no order: copied token by token."""
        return "".join(self.pick(_LETTERS + "0123456789") for _ in range(self.rng.randint(3, 7)))

    def city(self):
        return self._known_or_invented(CITIES, CITIES_HELD_OUT).capitalize()

    def name(self):
        return self._known_or_invented(NAMES, NAMES_HELD_OUT).capitalize()

    def word(self):
        return self.scramble() if self.rng.random() < (0.1 if self.held_out else 0.2) else self._known_or_invented(WORDS, WORDS_HELD_OUT)

    def _known_or_invented(self, trained, held_out):
        known = held_out if self.held_out else trained
        return self.pick(known) if self.rng.random() < (0.6 if self.held_out else 0.4) else self.invented()

    def words(self, fewest, most):
        return [self.word() for _ in range(self.rng.randint(fewest, most))]

    def phrase(self, fewest=1, most=4):
        return " ".join(self.words(fewest * self.longer, most * self.longer))

    def path(self):
        parts = [self.pick(FOLDERS) for _ in range(self.rng.randint(0, 2))]
        stem = self.word() if self.rng.random() < 0.8 else f"{self.word()}_{self.word()}"
        start = self.pick(["", "", "/"]) if parts else ""
        return start + "/".join([*parts, f"{stem}.{self.pick(ENDINGS)}"])

    def expression(self):
        digits = self.rng.choice([9, 99, 999])
        a, b = self.rng.randint(2, digits), self.rng.randint(2, digits)
        text = f"{a} {self.pick('+-*/')} {b}"
        return f"{text} {self.pick('+-*')} {self.rng.randint(2, 99)}" if self.rng.random() < 0.2 else text

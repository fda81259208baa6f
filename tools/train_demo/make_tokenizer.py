"""Makes the demo's tokenizer: byte-level BPE over the training text, with the pipeline of Qwen3.5.

    python make_tokenizer.py

The merges are learnt on words without the space or sign before them, and only then common words get their space. So
an uncommon word has the same tokens wherever it stands, and a model this small can copy it.
"""

import itertools
import json
from collections import Counter

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chat import render
from corpus import FIRST, conversations
from model import FOLDER
from words import CITIES, COLOURS, CONDITIONS, FOLDERS, NAMES, WORDS

ENTRIES = 2048  # of the BPE; the added tokens come after them
WITH_SPACE = 320  # of them, words that begin with a space
SPACE = "\u0120"  # as byte-level BPE writes it
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end vision_pad image_pad video_pad"
CODE = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
SPEECH = "<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|>"
ADDED = [  # in the order of Qwen3.5; what is not special is text to who reads the answer
    *[AddedToken(f"<|{name}|>", special=True, normalized=False) for name in CONTROL.split()],
    *[AddedToken(name, special=False, normalized=False) for name in ("<tool_call>", "</tool_call>")],
    *[AddedToken(f"<|{name}|>", special=False, normalized=False) for name in CODE.split()],
    *[AddedToken(name, special=False, normalized=False) for name in ("<tool_response>", "</tool_response>", "<think>", "</think>")],
    *[AddedToken(name, special=True, normalized=False) for name in SPEECH.split()],
]
SAMPLE = 12_000  # conversations the merges are counted over
CONFIG = {
    "tokenizer_class": "Qwen2TokenizerFast",
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 4096,
    "pad_token": "<|endoftext|>",
    "unk_token": None,
}


def pieces(*more):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            *more,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def learnt_merges(texts):
    """The BPE of bare words: its vocabulary and merges, best first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pieces(pre_tokenizers.Split(Regex(r"^[^\r\n\p{L}\p{N}](?=[\p{L}\p{M}])"), behavior="isolated", invert=False))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=ENTRIES - WITH_SPACE, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def spaced_words(texts, vocabulary):
    """The most common whole words after a space; not those that are there to be copied."""
    copied = {*CITIES, *NAMES, *WORDS, *FOLDERS, *COLOURS, *CONDITIONS, *"bcdefghijklmnopqrstuvwxyz"}
    counts = Counter(piece for text in texts for piece, _ in pieces().pre_tokenize_str(text) if piece[0] == SPACE)
    common = [piece[1:] for piece, _ in counts.most_common() if piece not in vocabulary]
    return [word for word in common if word in vocabulary and word not in copied][:WITH_SPACE]


def make():
    texts = [render(*drawn) for drawn in itertools.islice(conversations(FIRST, seed=0, pieced=False), SAMPLE)]
    vocabulary, merges = learnt_merges(texts)
    for word in spaced_words(texts, vocabulary):
        vocabulary[SPACE + word] = len(vocabulary)
        merges.append((SPACE, word))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=False, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pieces()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(ADDED)
    assert tokenizer.token_to_id("<|endoftext|>") == ENTRIES
    return tokenizer


if __name__ == "__main__":
    make().save(str(FOLDER / "tokenizer.json"))
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")

"""The files of CLIP's tokenizer, for checkpoints that hold none: single files in the original layout.

All text encoders of Stable Diffusion 1, 2 and XL take the tokens of CLIP's byte-pair encoding (Radford et al. 2021).
Its merges ship with this package (clip_merges.license.txt); the vocabulary follows from them.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408


@cache
def _merges() -> str:
    """One merge a line, best first, behind a line with the version."""
    return gzip.decompress((files(__package__) / "clip_merges.txt.gz").read_bytes()).decode("utf-8")


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in the vocabulary's order: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def vocabulary() -> dict[str, int]:
    """Token -> id: bytes, bytes that end a word, what the merges make, and the start and end of a text."""
    symbols = _byte_symbols()
    merged = [line.replace(" ", "") for line in _merges().splitlines()[1:]]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged, START, END]
    return {token: index for index, token in enumerate(tokens)}


@cache
def _vocabulary_file() -> bytes:
    return json.dumps(vocabulary(), ensure_ascii=False).encode("utf-8")


def tokenizer_files(pad: str) -> dict[str, bytes]:
    """The files of a tokenizer folder as published checkpoints have them, by name.

    Args:
        pad: the token that fills a row; OpenAI's encoders are trained with END, OpenCLIP's with id 0, "!".
    """
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {**special, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    return {
        "merges.txt": _merges().encode("utf-8"),
        "special_tokens_map.json": json.dumps(special, indent=2).encode("utf-8"),
        "tokenizer_config.json": json.dumps(config, indent=2).encode("utf-8"),
        "vocab.json": _vocabulary_file(),
    }

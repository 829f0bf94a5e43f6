"""The two layouts of tokenizers: transformers 5 writes tokenizer.json alone, 4 reads vocab.json and merges.txt only."""

from __future__ import annotations

import json
from collections.abc import Mapping


def with_slow_files(texts: Mapping[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's text files, with vocab.json and merges.txt beside every tokenizer.json that lacks them.

    Args:
        texts: file contents by name, such as `tokenizer/tokenizer.json`.
    """
    found = dict(texts)
    for name, content in texts.items():
        folder, _, file = name.rpartition("/")
        vocabulary, merges = f"{folder}/vocab.json", f"{folder}/merges.txt"
        if file == "tokenizer.json" and vocabulary not in texts:
            model = json.loads(content)["model"]
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            found[vocabulary] = json.dumps(model["vocab"], ensure_ascii=False).encode()
            found[merges] = "\n".join(["#version: 0.2", *pairs, ""]).encode()
    return found

"""The real CLIP byte-pair vocabulary as the `vocab.json` and `merges.txt` of a diffusers tokenizer folder.

The merges ship in open_clip's package (`pip install --no-deps open_clip_torch`); nothing is downloaded.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in the vocabulary's order (GPT-2's byte-level BPE)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]


def clip_merges() -> list[str]:
    """The 48 894 merges of CLIP's tokenizer, each "left right".

    Raises:
        FileNotFoundError: open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("open_clip: not installed. Run: pip install --no-deps open_clip_torch")
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    return lines[1 : 49152 - 256 - 2 + 1]


def write_tokenizer(folder: Path) -> Path:
    """Write vocab.json, merges.txt and the two configs; an existing folder is left as it is."""
    if (folder / "merges.txt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    merges = clip_merges()
    symbols = byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(m.split()) for m in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Last, because its presence says that the folder is complete.
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder

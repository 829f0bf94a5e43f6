"""Folding textual inversions into a checkpoint: rows for its text encoders, tokens for its tokenizers.

The names are those of diffusers' `load_textual_inversion`: `<cat>` for a file's first vector, `<cat>_1`, `<cat>_2`… for
the others. Pipelines of diffusers and optimum and this project's runtime write all of them where a prompt has `<cat>`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.textual_inversion import TextualInversion
from latentrt.runtime.tokenizer import ClipTokenizer, load_tokenizer

from .checkpoint_parts import Part
from .weights import Values, Weight

_TABLE = "embeddings.token_embedding.weight"
# Of published configs: not the end token's id, and a sign to transformers to pool at the largest id of a row instead,
# which is the end token's until there are ids behind it.
_POOLS_AT_LARGEST_ID = 2


def folded(
    parts: Mapping[str, Part], texts: Mapping[str, bytes], embeddings: Sequence[TextualInversion]
) -> tuple[dict[str, Part], dict[str, bytes]]:
    """A checkpoint's networks and text files that know these textual inversions, under the first name of each.

    The grown tables are float32, whatever they were: they are rounded once, to the precision of the graph. Configs with
    CLIP's old `eos_token_id` get the tokenizer's, so that a text is still pooled at its end.

    Args:
        texts: the checkpoint's tokenizers among others, `tokenizer/vocab.json` and so on.

    Raises:
        UsageError: an inversion was trained for another model, or its name is a token already.
        ArtifactError: a tokenizer is incomplete or damaged, or has other tokens than its text encoder.
    """
    changed, files = dict(parts), dict(texts)
    for name, part in parts.items():
        if name.startswith("text_encoder") and embeddings:
            folder = name.replace("text_encoder", "tokenizer")
            own = {
                file.removeprefix(f"{folder}/"): text for file, text in files.items() if file.startswith(f"{folder}/")
            }
            tokenizer = _opened(own, part)
            first = max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
            tokens = _tokens(tokenizer, [(e, len(e.vectors(name, _table(part)[1].shape[1]))) for e in embeddings])
            changed[name] = _with_rows(part, embeddings, first, tokenizer.eos)
            ids = {token: first + index for index, token in enumerate(tokens)}
            files |= {f"{folder}/{file}": text for file, text in _with_tokens(own, ids, part).items()}
    return changed, files


def _opened(files: Mapping[str, bytes], part: Part) -> ClipTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        try:
            return load_tokenizer(Path(folder))
        except ArtifactError as err:
            # Its message names the temporary folder.
            raise ArtifactError(f"{part.origin}: expected a whole CLIP tokenizer for {part.name}, got: {err}") from err


def _table(part: Part) -> tuple[str, Weight]:
    """The token embeddings of a text encoder."""
    found = next(((name, weight) for name, weight in part.weights.items() if name.endswith(_TABLE)), None)
    if found is None or len(found[1].shape) != 2:
        raise ArtifactError(
            f"{part.origin}: expected {_TABLE} of (tokens, width), got none. Copy the checkpoint again."
        )
    return found


def _tokens(tokenizer: ClipTokenizer, embeddings: Iterable[tuple[TextualInversion, int]]) -> list[str]:
    """The tokens of all vectors, held to be new."""
    taken = set(tokenizer.tokenizer.get_vocab(with_added_tokens=True))
    tokens: list[str] = []
    for embedding, count in embeddings:
        name = embedding.names[0]
        if count > tokenizer.room:
            raise UsageError(f"{name}: expected at most {tokenizer.room} vectors, as a text has room for, got {count}.")
        own = [name, *(f"{name}_{index}" for index in range(1, count))]
        # Added tokens are found in texts of any case.
        if not name.strip() or taken & {*own, *map(str.lower, own), f"{name}_{count}"}:
            raise UsageError(
                f"{name!r}: expected a name that is no token yet, got one that is "
                f"{'taken' if name.strip() else 'empty'}. Give the textual inversion another name."
            )
        taken |= {*own, *map(str.lower, own)}
        tokens += own
    return tokens


def _with_rows(part: Part, embeddings: Sequence[TextualInversion], first: int, eos: int) -> Part:
    """A text encoder with the vectors from row `first` on; what a longer table held there had no token."""
    name, table = _table(part)
    width = table.shape[1]
    vectors = np.concatenate([embedding.vectors(part.name, width) for embedding in embeddings])
    if not first <= table.shape[0]:
        raise ArtifactError(
            f"{part.origin}: expected at least {first} token embeddings, as many as its tokenizer has tokens, got "
            f"{table.shape[0]}. The tokenizer and the text encoder belong to different models."
        )
    last = first + len(vectors)

    def grown() -> Values:
        rows = table.read().astype(np.float32, copy=False)
        return np.concatenate([rows[:first], vectors, rows[last:]])

    shape = (max(table.shape[0], last), width)
    notes = [
        {
            "kind": "textual_inversion",
            "token": embedding.names[0],
            "vectors": len(embedding.vectors(part.name, width)),
            "sha256": embedding.sha256,
        }
        for embedding in embeddings
    ]
    config = {**part.config, "vocab_size": shape[0]}
    if config.get("eos_token_id") == _POOLS_AT_LARGEST_ID:
        config["eos_token_id"] = eos
    return replace(
        part,
        weights={**part.weights, name: Weight(shape, np.dtype(np.float32), grown)},
        config=config,
        changes=(*part.changes, *notes),
    )


def _with_tokens(files: Mapping[str, bytes], ids: Mapping[str, int], part: Part) -> dict[str, bytes]:
    """The files of a tokenizer that list added tokens, with these: both layouts where a folder holds both."""
    entries = {
        token: {
            "content": token,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
            "special": False,
        }
        for token in ids
    }
    changed: dict[str, Any] = {}
    if "vocab.json" in files:
        changed["added_tokens.json"] = {**_json(files, "added_tokens.json", part), **ids}
    if "tokenizer.json" in files:
        whole = _json(files, "tokenizer.json", part)
        added = [{"id": index, **entries[token]} for token, index in ids.items()]
        changed["tokenizer.json"] = {**whole, "added_tokens": [*(whole.get("added_tokens") or []), *added]}
    config = _json(files, "tokenizer_config.json", part)
    if decoder := config.get("added_tokens_decoder"):
        own = {str(index): entries[token] for token, index in ids.items()}
        changed["tokenizer_config.json"] = {**config, "added_tokens_decoder": {**decoder, **own}}
    return {name: (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode() for name, value in changed.items()}


def _json(files: Mapping[str, bytes], name: str, part: Part) -> dict[str, Any]:
    """A JSON object of a tokenizer; empty where there is no such file."""
    try:
        return dict(json.loads(files.get(name, b"{}")))
    except (ValueError, TypeError) as err:
        raise ArtifactError(f"{part.origin}: expected a JSON object in the tokenizer's {name}, got {err}.") from err

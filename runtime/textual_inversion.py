"""Textual inversions at run time: words whose embeddings come from a small file.

The method is Gal et al. 2022, An Image is Worth One Word. Files are safetensors in the layouts of AUTOMATIC1111's web
UI and kohya (`emb_params`), of diffusers (one tensor under its token), and of SDXL (`clip_l`, `clip_g`). A text
encoder's graph reads token ids only, so its embedding table is made longer in memory, and the new ids are written where
a prompt holds the word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError, UsageError
from .onnx_table import find_token_table, graph_with_rows, read_rows
from .safetensors import open_safetensors
from .session import OnnxSession
from .specs import Session
from .text_encoding import TextEncoder

_PICKLES = (".pt", ".bin", ".pth", ".ckpt", ".pkl")
_MODELS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's second text encoder"}
_TABLE_OF = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True, eq=False)
class TextualInversion:
    """A word and its vectors.

    Attributes:
        names: how a prompt may write it: the token that a diffusers file names, and the file's stem.
        tables: vectors (n, width) float32 under `clip_l` and `clip_g`, or under "" where the file has one table.
        sha256: of the file.
    """

    names: tuple[str, ...]
    tables: Mapping[str, NDArray[np.float32]]
    sha256: str

    def vectors(self, component: str, width: int) -> NDArray[np.float32]:
        """The vectors for `text_encoder` or `text_encoder_2`.

        Raises:
            UsageError: there are none of that width.
        """
        held = self.tables.get(_TABLE_OF.get(component, ""), self.tables.get(""))
        if held is None or held.shape[1] != width:
            got = sorted(self.tables) if held is None else held.shape[1]
            model = "" if held is None else _MODELS.get(held.shape[1], "")
            raise UsageError(
                f"{self.names[0]}: expected vectors {width} wide for {component}, got {got}. "
                f"Use one that was trained for this model{f'; this one is for {model}' if model else ''}."
            )
        return held


def load_textual_inversion(path: str | Path, *, name: str | None = None) -> TextualInversion:
    """Read a textual inversion from a .safetensors file.

    Args:
        name: the word for it; default the file's stem and, of a diffusers file, the token it names.

    Raises:
        UsageError: the file is a pickle (.pt, .bin), which runs code when it is opened, or something else.
        ArtifactError: it is missing, damaged, or holds something else than embeddings.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLES:
        raise UsageError(
            f"{path}: expected .safetensors, got a pickle, which can run any code when it is opened. Where you trust "
            "it, convert it: tensor = torch.load(path, weights_only=True)['string_to_param']['*'] (a diffusers .bin: "
            "the only value), then safetensors.torch.save_file({'emb_params': tensor}, 'name.safetensors')."
        )
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{path}: expected a .safetensors file, got {path.suffix or 'no suffix'}.")
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{path}: expected a textual inversion, got {err.strerror}. Check the path.") from err
    tensors = {key: tensor.read() for key, tensor in open_safetensors(path, content).tensors.items()}
    names: tuple[str, ...] = (path.stem,)
    if tensors and set(tensors) <= {"clip_l", "clip_g"}:
        tables = tensors
    elif "emb_params" in tensors:
        tables = {"": tensors["emb_params"]}
    elif len(tensors) == 1:
        token, table = next(iter(tensors.items()))
        named = not path.stem.startswith("learned_embeds")  # diffusers' own name for every such file
        names, tables = tuple(dict.fromkeys((token, path.stem) if named else (token,))), {"": table}
    else:
        raise ArtifactError(
            f"{path}: expected emb_params, clip_l and clip_g, or a single tensor, got {sorted(tensors)[:4]}. "
            "It is no textual inversion."
        )
    tables = {key: value[None] if value.ndim == 1 else value for key, value in tables.items()}
    for key, value in tables.items():
        if value.ndim != 2 or value.size == 0 or not np.isfinite(value).all():
            raise ArtifactError(f"{path}: expected finite vectors (n, width) in {key!r}, got shape {value.shape}.")
    return TextualInversion(names if name is None else (name,), tables, hashlib.sha256(content).hexdigest())


def _is_word(name: str) -> bool:
    """Whether the byte-pair encoding keeps a name apart from what stands beside it."""
    return name[:1].isalnum() and name[-1:].isalnum()


def with_textual_inversions(
    encoder: TextEncoder,
    graph: Path,
    inversions: Sequence[TextualInversion],
    *,
    component: str = "text_encoder",
    threads: int = 0,
    open_session: Callable[[bytes], Session] | None = None,
) -> TextEncoder:
    """A text encoder that also knows these words; it runs with ONNX Runtime, whatever ran the one given.

    A name is found where its tokens stand in the prompt, in any case of letters, as in the web UI; one that starts or
    ends with another character (`<cat-toy>`) is found as a string, as in diffusers. Of two names the longer wins.

    Args:
        encoder: without textual inversions of its own from an earlier call: give all of them at once.
        graph: its .onnx file.
        component: `text_encoder` or `text_encoder_2`, which decides between `clip_l` and `clip_g`.
        threads: of a session on the CPU, and
        open_session: makes another than that, from the bytes of the graph with the words added.

    Raises:
        UsageError: an inversion's width is not the encoder's, it has more vectors than a chunk has room for, or two
            have the same name.
        ArtifactError: the graph is damaged, or its token embeddings are not in fp32 or fp16.
    """
    table = find_token_table(graph)
    odd = [name for inversion in inversions for name in inversion.names if not _is_word(name)]
    tokenizer = encoder.tokenizer.with_tokens(odd)
    words: dict[tuple[int, ...], tuple[int, ...]] = {}
    rows: list[NDArray[np.float32]] = []
    first = table.shape[0]
    for inversion in inversions:
        vectors = inversion.vectors(component, table.shape[1])
        if len(vectors) > tokenizer.room:
            raise UsageError(
                f"{inversion.names[0]}: expected at most {tokenizer.room} vectors, as a chunk has room for, "
                f"got {len(vectors)}."
            )
        ids = tuple(range(first, first + len(vectors)))
        for name in inversion.names:
            pattern = tuple(tokenizer.encode(name))
            if not name.strip() or words.get(pattern, ids) != ids:
                raise UsageError(
                    f"{name!r}: expected a name of its own for each textual inversion, got one that is "
                    f"{'taken' if name.strip() else 'empty'}. Give another with name=…."
                )
            words[pattern] = ids
        rows.append(vectors)
        first += len(vectors)
    eos_row = None
    if table.pools_at_argmax:
        eos_row = first
        rows.append(read_rows(table, np.array([tokenizer.eos])))
    extended = graph_with_rows(table, np.concatenate(rows)) if rows else graph.read_bytes()
    session = open_session(extended) if open_session else OnnxSession(graph, threads=threads, model=extended)
    return replace(encoder, session=session, tokenizer=tokenizer, words=words, eos_row=eos_row)

"""CLIP byte-pair encoding to rows of 77 token ids, from either layout a checkpoint may hold.

transformers 4 saved `vocab.json` and `merges.txt`; transformers 5 saves only `tokenizer.json`. Both load.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .bundle import read_config
from .errors import ArtifactError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The word pattern of CLIP's original tokenizer (Radford et al. 2021): contractions, words, digits, the rest.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_LENGTH = 77


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the text encoder reads; the message shows what was cut."""


@dataclass(frozen=True)
class ClipTokenizer:
    """A tokenizer with the ids that frame and pad a row."""

    tokenizer: Tokenizer
    bos: int
    eos: int
    pad: int
    length: int = _LENGTH

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (n, 77): BOS, the prompt, EOS, padding. A longer prompt is cut, with a warning that shows where.

        Warns:
            PromptTruncatedWarning: a prompt has more than 75 tokens.
        """
        rows = np.full((len(prompts), self.length), self.pad, dtype=np.int64)
        room = self.room
        for row, prompt in zip(rows, prompts, strict=True):
            encoding = self.tokenizer.encode(prompt, add_special_tokens=False)
            ids = encoding.ids
            if len(ids) > room:
                cut = prompt[encoding.offsets[room][0] :]
                warnings.warn(
                    f"prompt: expected at most {room} tokens, got {len(ids)}. This was cut: {cut!r}",
                    PromptTruncatedWarning,
                    stacklevel=2,
                )
                ids = ids[:room]
            row[: len(ids) + 2] = [self.bos, *ids, self.eos]
        return rows

    @property
    def room(self) -> int:
        """Tokens of text in a row: all but BOS and EOS, 75 in CLIP."""
        return self.length - 2

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of any length, unframed."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def with_tokens(self, texts: Sequence[str]) -> ClipTokenizer:
        """A copy that takes each of these texts for one token, wherever it stands; itself if there are none."""
        if not texts:
            return self
        from tokenizers import AddedToken, Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.add_tokens([AddedToken(text, normalized=True) for text in texts])
        return replace(self, tokenizer=tokenizer)

    @cached_property
    def comma(self) -> int | None:
        """The id of a comma that ends a word; None where the vocabulary has none."""
        found = self.tokenizer.token_to_id(",</w>")
        return None if found is None else int(found)

    @cached_property
    def multi_vector_words(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Added tokens that stand for several: `tok` for `tok tok_1 tok_2`, as diffusers' textual inversion adds them.

        From the ids of what is written to the ids of what is meant. The whole sequence stands for itself.
        """
        added = {str(token.content): int(index) for index, token in self.tokenizer.get_added_tokens_decoder().items()}
        words = {}
        for content, first in added.items():
            ids = [first]
            while (following := added.get(f"{content}_{len(ids)}")) is not None:
                ids.append(following)
            if len(ids) > 1:
                words[(first,)] = words[tuple(ids)] = tuple(ids)
        return words


def _from_vocabulary(vocabulary: Path, merges: Path) -> Tokenizer:
    """The byte-level BPE that transformers' CLIPTokenizerFast builds from the two files."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    model = BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special = [AddedToken(t, normalized=False, special=True) for t in ("<|startoftext|>", "<|endoftext|>")]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _token_text(value: Any) -> str | None:
    """A special token of a config: a string, or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, str]:
    """Tokens added to vocab.json later, by id: transformers 4 lists them in a file of their own or in the config."""
    path = folder / "added_tokens.json"
    listed = {int(index): str(text) for text, index in (read_config(path) if path.exists() else {}).items()}
    decoder = config.get("added_tokens_decoder") or {}
    return {**listed, **{int(index): str(_token_text(token)) for index, token in decoder.items()}}


def _add_tokens(tokenizer: Tokenizer, added: dict[int, str], folder: Path) -> None:
    from tokenizers import AddedToken

    for index, text in sorted(added.items()):
        if tokenizer.token_to_id(text) is None:
            tokenizer.add_tokens([AddedToken(text, normalized=True)])
        if tokenizer.token_to_id(text) != index:
            raise ArtifactError(
                f"{folder}: expected the added token {text!r} at {index}, got {tokenizer.token_to_id(text)}. "
                "Copy the checkpoint's tokenizer folder again."
            )


def load_tokenizer(folder: Path) -> ClipTokenizer:
    """Open a tokenizer folder of a checkpoint or bundle.

    Raises:
        ArtifactError: neither layout is complete, a file is damaged, or a special token is not in the vocabulary.
    """
    whole, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    config = read_config(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    extra = folder / "special_tokens_map.json"
    config = {**(read_config(extra) if extra.exists() else {}), **config}
    try:
        if vocabulary.exists() and merges.exists():
            tokenizer = _from_vocabulary(vocabulary, merges)
            _add_tokens(tokenizer, _added_tokens(folder, config), folder)
        elif whole.exists():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(whole))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        else:
            raise ArtifactError(
                f"{folder}: expected tokenizer.json, or vocab.json with merges.txt, found neither. "
                "Copy the checkpoint's tokenizer folder there."
            )
    except ArtifactError:
        raise
    except Exception as err:  # tokenizers raises bare Exception on damaged files
        raise ArtifactError(f"{folder}: expected CLIP tokenizer files, got {err}. Copy them again.") from err

    def id_of(role: str, default: str) -> int:
        text = _token_text(config.get(role)) or default
        found = tokenizer.token_to_id(text)
        if found is None:
            raise ArtifactError(f"{folder}: expected {role} {text!r} in the vocabulary, found none. Copy it again.")
        return int(found)

    eos = id_of("eos_token", "<|endoftext|>")
    return ClipTokenizer(
        tokenizer=tokenizer,
        bos=id_of("bos_token", "<|startoftext|>"),
        eos=eos,
        pad=id_of("pad_token", _token_text(config.get("eos_token")) or "<|endoftext|>"),
        length=min(int(config.get("model_max_length") or _LENGTH), _LENGTH),
    )

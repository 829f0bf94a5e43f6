"""Prompts to embeddings: the text encoder's part of a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .specs import Session
from .tokenizer import ClipTokenizer


def encode_prompt(session: Session, tokenizer: ClipTokenizer, prompts: Sequence[str]) -> NDArray[np.float32]:
    """Embeddings (n, 77, d) of n prompts: the text encoder's last hidden state.

    Warns:
        PromptTruncatedWarning: a prompt has more than 75 tokens; the message shows what was cut.
    """
    return session({"input_ids": tokenizer(prompts)})["last_hidden_state"].astype(np.float32, copy=False)

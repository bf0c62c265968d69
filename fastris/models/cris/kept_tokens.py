"""A CRIS that knows few words: its token embedding has rows for some of CLIP's tokens only.

A model that was trained on few words uses few of the 49,408 rows; without the others its file is smaller by what they
take. The configuration's ``kept_tokens`` are the rows' ids in CLIP's vocabulary, and the row's number is the id that
the model takes. Padding stays the smallest id and the end of a sentence the largest, which is how CLIP finds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from fastris.options.values import shown

PAD, START, END = 0, 49406, 49407
"""CLIP's ids of padding and of a sentence's two ends, which every sentence needs."""

EMBEDDING = "backbone.token_embedding.weight"


def check_kept_tokens(kept: Any, vocab_size: int) -> tuple[int, ...]:
    """``kept`` as a tuple; empty where all are. Raises ValueError unless they are ``vocab_size`` ids of CLIP's."""
    if not isinstance(kept, (list, tuple)) or any(type(token) is not int for token in kept):
        raise ValueError(f"kept_tokens must hold whole numbers, got {shown(kept)}")
    kept = tuple(kept)
    if kept and (list(kept) != sorted({PAD, START, END, *kept}) or kept[0] != PAD or kept[-1] != END):
        raise ValueError(
            f"kept_tokens must hold ids of CLIP's vocabulary from {PAD} to {END}, in order, {START} among them"
        )
    if kept and len(kept) != vocab_size:
        raise ValueError(
            f"kept_tokens holds {len(kept)} ids, and clip.vocab_size is {vocab_size}; a kept token is a row"
        )
    return kept


def with_kept_tokens(model: Any, ids: Collection[int]) -> Any:
    """A copy of a CRIS, in eval mode, that knows the tokens ``ids`` and the marks of a sentence's ends alone.

    It computes what the model computes, bit for bit, of sentences of these tokens. Raises ValueError for a model whose
    embedding has not all of CLIP's rows, or with ``mask_grounding``, which guesses any of CLIP's tokens.
    """
    config = model.config
    if config.kept_tokens or config.clip.vocab_size != END + 1:
        raise ValueError(f"the model has {config.clip.vocab_size} rows of tokens; give one that has all of CLIP's")
    if config.mask_grounding:
        raise ValueError("mask_grounding guesses any of CLIP's tokens, so none can be left out; give mask_grounding=0")
    kept = tuple(sorted({PAD, START, END, *ids}))
    clip = dataclasses.replace(config.clip, vocab_size=len(kept))
    small = type(model)(dataclasses.replace(config, clip=clip, kept_tokens=kept))
    state = model.state_dict()
    state[EMBEDDING] = state[EMBEDDING][list(kept)]
    small.load_state_dict(state)
    return small.to(next(model.parameters()).device).eval()

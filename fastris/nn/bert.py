"""BERT as a text encoder, made of the pieces of the optional library ``transformers``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastris.nn.recompute import recomputed
from fastris.runtime.extras import need

MASKED = -10000.0
"""Added to the scores of padded keys, as BERT does; as good as minus infinity."""
_STD = 0.02


class TextEncoder(nn.Module):
    """BERT without a pooler, under its own names: token ids (B, L) to states (B, L, T).

    ``sizes`` are a :class:`fastris.models.encoders.BERTConfig`; ``system`` is whose encoder it is, and the name of the
    extra that installs it. ``recompute`` is set by the system. Raises MissingExtra, saying how to install it, where
    ``transformers`` is not installed.
    """

    recompute = "none"

    def __init__(self, sizes: Any, system: str):
        super().__init__()
        config, embeddings, encoder = _pieces(sizes, system)
        self.embeddings = embeddings(config)
        self.encoder = encoder(config)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """The states of all tokens; no token attends to one that is not ``valid`` (B, L)."""
        embedded, mask = self.embed(tokens, valid)
        return recomputed([self.encoder], self.recompute, self._encode, embedded, mask, whole=True)

    def embed(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings (B, L, T), and what is added to the scores of keys (B, 1, 1, L): 0 where they are valid."""
        embedded = self.embeddings(input_ids=tokens)
        return embedded, (1.0 - valid.to(embedded.dtype))[:, None, None, :] * MASKED

    def part(self, number: int, parts: int, states: Tensor, mask: Tensor) -> Tensor:
        """The states behind part ``number`` of the layers cut into ``parts`` equal ones, from those before it.

        ``mask`` is that of :meth:`embed`. The parts one behind the other are :meth:`forward`.
        """
        count = len(self.encoder.layer) // parts
        layers = list(self.encoder.layer[number * count : (number + 1) * count])

        def run(states: Tensor, mask: Tensor) -> Tensor:
            for layer in layers:
                found = layer(states, mask)
                states = found[0] if isinstance(found, tuple) else found  # a tuple in transformers before 5
            return states

        return recomputed(layers, self.recompute, run, states, mask, whole=True)

    def _encode(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(embedded, attention_mask=mask)[0]


def _pieces(sizes: Any, system: str) -> tuple[Any, Any, Any]:
    """The library's configuration of these sizes, and its classes of BERT's two parts."""
    purpose = f"for {system}'s text encoder, BERT"
    extra = system.lower()
    config = need("transformers", extra, purpose).BertConfig
    pieces = need("transformers.models.bert.modeling_bert", extra, purpose)
    # Eager attention is BERT's own arithmetic, and takes any additive mask.
    return config(**vars(sizes), attn_implementation="eager"), pieces.BertEmbeddings, pieces.BertEncoder


def _initialise(module: nn.Module) -> None:
    """BERT's own initialisation: matrices and embeddings normal, biases zero, padding's embedding zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()

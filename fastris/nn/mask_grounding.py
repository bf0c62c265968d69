"""Mask Grounding (arXiv 2312.12198): guess hidden words from the sentence's rest, the image and the object's mask.

The paper: ``y = Predictor([O; P; C])``, with the text states O of a sentence in which words are hidden, the image
features P, and a token C that is an MLP of the mask's centre; cross-entropy over the hidden words. Its training code is
not public. What is ours: the predictor's depth and widths, the centre as a centroid, position codes for the pixels, one
embedding for each of the three kinds of tokens, and the head on BERT's lines, tied to the word embeddings.

The module knows nothing of its host. It must not see the hidden words: the host gives text states of the *masked*
sentence and image features that did not hear the clean one. It is for training alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.masked_words import centroids, chosen_rows
from fastris.nn.positions import box_positions
from fastris.nn.recompute import recomputed
from fastris.runtime.distributed import sum_over_processes

TEXT, IMAGE, CENTRE = range(3)
"""Rows of the type embedding."""

METRICS = ("grounding_loss", "masked_accuracy", "most_frequent_share")
"""What :meth:`MaskGrounding.take_metrics` tells."""

_STD = 0.02


class MaskGrounding(nn.Module):
    """The predictor of hidden words, its inputs' projections and its head.

    Args:
        vocabulary: number of token ids.
        width: of the text states, the predictor and the word embeddings; a multiple of 4 and of ``heads``.
        image_width: channels of the image features.
        layers, heads, hidden, dropout: of the predictor; ``hidden`` is 4 * ``width`` by default.
        norm_first: whether the predictor's norms come before its sub-layers, with one more at its end, as CLIP's do; or
            behind them, with one more at its start, as BERT's do (then give ``eps=1e-12``).
        mask_embedding: whether there is a learnt row of embeddings to put in the place of a hidden word's; a host whose
            vocabulary has a [MASK] takes that.

    The layers are PyTorch's, which drop out between a layer's two FFN matrices, too. ``recompute`` is set by the host;
    see :mod:`fastris.nn.recompute`.
    """

    recompute = "none"
    mask_embedding: nn.Parameter | None

    def __init__(
        self,
        vocabulary: int,
        width: int,
        image_width: int,
        *,
        layers: int = 4,
        heads: int = 8,
        hidden: int | None = None,
        dropout: float = 0.1,
        norm_first: bool = True,
        eps: float = 1e-5,
        mask_embedding: bool = True,
    ):
        super().__init__()
        self.mask_embedding = nn.Parameter(torch.empty(width)) if mask_embedding else None
        self.image_projection = nn.Linear(image_width, width)
        self.centroid = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.type_embedding = nn.Embedding(3, width)
        self.norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, hidden or 4 * width, dropout, F.gelu, eps, batch_first=True, norm_first=norm_first
            )
            for _ in range(layers)
        )
        self.norm_first = norm_first
        self.head = MaskedWordHead(vocabulary, width, eps)
        self.apply(_initialise)
        if self.mask_embedding is not None:
            nn.init.normal_(self.mask_embedding, std=_STD)
        self.tally = WordTally(vocabulary)

    def forward(
        self,
        text: Tensor,
        tokens: Tensor,
        valid: Tensor,
        selected: Tensor,
        image: Tensor,
        mask: Tensor,
        embedding: Tensor,
        index: Tensor | None = None,
    ) -> Tensor:
        """The mean cross-entropy over all selected tokens of the batch; 0 where none is, with gradients of 0.

        Args:
            text: states (E, L, width) of the sentences with hidden words. tokens: their true ids (E, L).
            valid: (E, L), False at padding. selected: (E, L), True where the id is to be guessed.
            image: features (B, C, h, w) that do not depend on the sentences; index: (E,) which of them each sentence is
                about, or None where they correspond one to one.
            mask: (E, 1, H, W); a sentence with an empty one gives no loss.
            embedding: the word embeddings (vocabulary, width), to which the head is tied.
        """
        centre, has_object = centroids(mask)
        states = self._predict(text, valid, image, centre, index)
        rows = chosen_rows(selected & has_object[:, None])
        states = states.flatten(0, 1).index_select(0, rows)
        logits = self.head(self.norm(states) if self.norm_first else states, embedding)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = tokens.flatten().index_select(0, rows)
        loss = F.cross_entropy(logits, targets, reduction="sum") / max(len(rows), 1)
        self.tally.count(loss.detach(), logits.detach(), targets)
        return loss

    def _predict(self, text: Tensor, valid: Tensor, image: Tensor, centre: Tensor, index: Tensor | None) -> Tensor:
        """The predictor's states (E, L, width) of the text tokens."""
        kinds = self.type_embedding.weight
        height, width = image.shape[-2:]
        positions = box_positions(height, width, text.shape[-1], image.device).to(text.dtype)
        pixels = self.image_projection(image.flatten(2).transpose(1, 2)) + (positions + kinds[IMAGE])
        pixels = pixels if index is None else pixels[index]
        mark = self.centroid(centre.to(text.dtype))[:, None] + kinds[CENTRE]
        sequence = torch.cat([text + kinds[TEXT], pixels.to(text.dtype), mark.to(text.dtype)], dim=1)
        padding = torch.cat([~valid, valid.new_zeros(len(valid), sequence.shape[1] - valid.shape[1])], dim=1)
        if not self.norm_first:
            sequence = self.norm(sequence)
        for layer in self.layers:
            sequence = recomputed([layer], self.recompute, _layer_of(layer), sequence, padding, whole=True)
        return sequence[:, : text.shape[1]]

    def take_metrics(self) -> dict[str, float]:
        """The numbers named in :data:`METRICS`, of all that was counted since the last call, over all processes."""
        return self.tally.take()


def _layer_of(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def run(sequence: Tensor, padding: Tensor) -> Tensor:
        return layer(sequence, src_key_padding_mask=padding)

    return run


class MaskedWordHead(nn.Module):
    """BERT's head: dense, GELU, LayerNorm, then the word embeddings and a bias of its own for each id."""

    def __init__(self, vocabulary: int, width: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """Logits (N, vocabulary) of ``states`` (N, width)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), embedding, self.bias)


class WordTally(nn.Module):
    """Counts how many hidden words are guessed right, and how often each word was asked for.

    The share of the most frequent word is what a guesser reaches that knows no sentence and no image. It is over all
    words that the run has asked for, since in one batch some word is always frequent. Nothing of it is in the weights;
    :meth:`state` goes into a run's checkpoint.
    """

    seen: Tensor
    step_seen: Tensor
    step_right: Tensor
    step_loss: Tensor

    def __init__(self, vocabulary: int):
        super().__init__()
        for name in ("seen", "step_seen"):
            self.register_buffer(name, torch.zeros(vocabulary, dtype=torch.int64), persistent=False)
        self.register_buffer("step_right", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("step_loss", torch.zeros(2, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def count(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """One forward pass: its mean loss, and the logits (N, vocabulary) and ids (N,) of its hidden words."""
        self.step_seen.index_add_(0, targets, torch.ones_like(targets))
        self.step_right += (logits.argmax(-1) == targets).sum()
        self.step_loss += torch.stack([loss, torch.ones_like(loss)]).to(self.step_loss.dtype)

    @torch.no_grad()
    def take(self) -> dict[str, float]:
        """The step's mean loss and accuracy, and the run's largest share; NaN where no word was hidden."""
        sums = torch.cat([self.step_seen, self.step_right[None]]).double()
        seen, right, loss = sum_over_processes(torch.cat([sums, self.step_loss.double()])).split([len(self.seen), 1, 2])
        self.seen += seen.long()
        for buffer in (self.step_seen, self.step_right, self.step_loss):
            buffer.zero_()
        share = self.seen.max() / self.seen.sum()
        return dict(zip(METRICS, torch.stack([loss[0] / loss[1], right[0] / seen.sum(), share]).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """What a resumed run has to know."""
        return {"seen": self.seen.cpu()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        self.seen.copy_(state["seen"])


def _initialise(module: nn.Module) -> None:
    """BERT's own initialisation: matrices and embeddings normal, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=_STD)
        nn.init.zeros_(module.in_proj_bias)

"""A tiny model learns to follow phrases about drawn scenes within minutes, on a CPU and without pretrained weights.

So the recipe is not the published one: AdamW with warm-up and cosine decay at a much higher learning rate, for encoders
too. The model and its loss are the published ones; what a system needs besides is in :data:`STARTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.data.letterbox import to_square
from fastris.data.scenes.dataset import REFERENCES, SyntheticExpressions
from fastris.data.tokens import find_tokenizer
from fastris.models.inputs import inputs_of
from fastris.runtime.interrupt import StopSignal

if TYPE_CHECKING:
    from fastris.models.base import ReferringModel
    from fastris.models.config import ModelConfig


class Track(Protocol):
    """Passes a sequence's items on and shows, under a title, how far it is, and the last of ``losses``."""

    def __call__(self, sequence: Sequence[Any], title: str, losses: list[float] | None = None) -> Iterable[Any]: ...


def _untracked(sequence: Sequence[Any], title: str, losses: list[float] | None = None) -> Iterable[Any]:
    return sequence


@dataclass
class Scenes:
    """Training scenes in memory: images (N, S, S, 3) uint8, masks (N, 3, S, S) bool, tokens (N, 3, 3, L)."""

    images: Tensor
    masks: Tensor
    tokens: Tensor

    @classmethod
    def draw(cls, dataset: SyntheticExpressions, config: ModelConfig, track: Track) -> Scenes:
        images, masks, sentences = [], [], []
        for scene in track(range(dataset.scenes), "drawing scenes"):
            own = range(REFERENCES * scene, REFERENCES * (scene + 1))
            images.append(dataset.image(own[0]))
            masks.append(np.stack([dataset.mask(index) for index in own]))
            sentences += [sentence for index in own for sentence in dataset.reference(index).sentences]
        tokens = find_tokenizer(inputs_of(config).tokenizer)(sentences, config.word_len).tokens
        tokens = tokens.reshape(len(images), REFERENCES, -1, config.word_len)
        return cls(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)), tokens)


def train(
    model: ReferringModel,
    dataset: SyntheticExpressions,
    *,
    steps: int,
    images: int,
    lr: float,
    seed: int,
    stop: StopSignal,
    track: Track = _untracked,
) -> list[float]:
    """Train a model that knows nothing on scenes, which are drawn first.

    Args:
        images: scenes in a step. lr: the highest learning rate. seed: of the order and of the phrases.
        stop: ends the training after a step.
        track: iterates over a sequence and shows how far it is, under a title, with the losses so far.

    Returns:
        The losses of the steps that were done.
    """
    start = STARTS.get(model.config.system, Start())
    start.prepare(model)
    scenes = Scenes.draw(dataset, model.config, track)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    rng = np.random.default_rng(seed)
    model.train()
    losses: list[float] = []
    for _ in track(range(steps), "learning", losses):
        chosen = torch.from_numpy(rng.choice(len(scenes.images), images, replace=False))
        sentence = torch.from_numpy(rng.integers(0, scenes.tokens.shape[2], (images, REFERENCES)))
        pixels, tokens, masks, index = _batch(scenes, chosen, sentence, model.config)
        masks = start.masks(masks, model.config.input_size)
        loss, _ = model.loss(model.encode_image(pixels), tokens, masks, index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if stop.requested:
            break
    return losses


@torch.no_grad()
def guess_hidden_words(
    model: ReferringModel, dataset: SyntheticExpressions, images: int, seed: int
) -> dict[str, float]:
    """What Mask Grounding's predictor guesses of words that are hidden in each of ``dataset``'s phrases once.

    Args:
        images: scenes in a batch. seed: of the words that are hidden.

    The model is asked as in training, BatchNorms with each batch's statistics, and stays as it was.

    Returns:
        The model's training metrics over the data set, such as ``masked_accuracy`` (a fraction of the hidden words) and
        ``most_frequent_share`` (the largest share of one word among all that were hidden since the training began);
        empty for a model without a predictor.
    """
    if not model.metric_names:
        return {}
    model.take_metrics()  # what the training's last steps left
    training, scenes = model.training, Scenes.draw(dataset, model.config, _untracked)
    start = STARTS.get(model.config.system, Start())
    with torch.random.fork_rng(devices=[]), _statistics_kept(model):
        torch.manual_seed(seed)
        model.train()
        for sentence in range(scenes.tokens.shape[2]):
            for chosen in torch.arange(len(scenes.images)).split(images):
                number = torch.full((len(chosen), REFERENCES), sentence)
                pixels, tokens, masks, index = _batch(scenes, chosen, number, model.config)
                model.loss(model.encode_image(pixels), tokens, start.masks(masks, model.config.input_size), index)
        model.train(training)
    return model.take_metrics()


@contextmanager
def _statistics_kept(model: ReferringModel) -> Iterator[None]:
    """The running statistics of the model's BatchNorms are afterwards what they were before."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _prepare_cris(model: Any) -> None:
    """Start values for training without CLIP's weights: every block does something, and every pixel is unlikely alike.

    A random text kernel would begin with large logits, and a good part of a short training goes into shrinking them.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    with torch.no_grad():
        model.proj.txt.weight.zero_()
        model.proj.txt.bias.zero_()
        model.proj.txt.bias[-1] = -3.0


def _prepare_alignformer(model: Any) -> None:
    """Start values for training without Swin's and BERT's weights: every pixel is unlikely, and nearly alike."""
    _without_dropout(model)
    last = model.classifier.dynamic_conv_gen_head[-1]
    with torch.no_grad():
        last.weight.mul_(0.3)
        last.bias[-1] = -2.5


def _without_dropout(model: Any) -> None:
    """Nothing is dropped out, as in the tiny CRIS: BERT's dropout is for much longer trainings."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _rate(step: int, steps: int) -> float:
    warm_up = min((step + 1) / 20, 1.0)
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batch(
    scenes: Scenes, chosen: Tensor, sentence: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, one sentence about each of their objects, full-size masks, and each sentence's image.

    Args:
        chosen: numbers (N,) of the scenes. sentence: (N, 3), which of its sentences is said about each object.
    """
    tokens = scenes.tokens[chosen[:, None], torch.arange(REFERENCES), sentence].flatten(0, 1)
    tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
    height, width = scenes.images.shape[1:3]
    warp = to_square(height, width, config.input_size, inputs_of(config))
    images = torch.stack([warp.warp_image(image, inputs_of(config)) for image in scenes.images[chosen].numpy()])
    masks = scenes.masks[chosen].flatten(0, 1)[:, None].float()
    index = torch.arange(len(chosen)).repeat_interleave(REFERENCES)
    return images, tokens, masks, index


def _targets_of_cris(masks: Tensor, input_size: int) -> Tensor:
    """Masks at the logits' size, where the published prediction samples them: bilinear with aligned corners.

    The published nearest-neighbour target is shifted against that by up to half a logit. It costs little at 104 x 104
    logits, and a tenth of the IoU at the 24 x 24 of this model.
    """
    smooth = F.avg_pool2d(masks, 3, 1, 1)
    return F.interpolate(smooth, (input_size // 4, input_size // 4), mode="bilinear", align_corners=True)


class Start(NamedTuple):
    """What a system needs to begin without pretrained weights.

    Attributes:
        prepare: sets start values of a new model, in place.
        masks: (masks (E, 1, S, S), S) to what the model's loss is given.
    """

    prepare: Callable[[Any], None] = lambda model: None
    masks: Callable[[Tensor, int], Tensor] = lambda masks, input_size: masks


STARTS = {
    "cris": Start(_prepare_cris, _targets_of_cris),
    "alignformer": Start(_prepare_alignformer),
    "magnet": Start(_without_dropout),
}
"""By system; one that is not listed begins as it was made, with masks at the image's size."""

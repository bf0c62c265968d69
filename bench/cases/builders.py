"""How each case is built: modules with lively random weights, and inputs such as CRIS sees.

Sizes of stages follow one image of ``side`` pixels through the model that ``preset`` names in the registry, and whole
models are of any system there.

A builder returns a :class:`~bench.cases.problem.Problem` in float32 on the CPU, drawn from PyTorch's global generator.
A module that is trained returns its loss first. Operators are imported when a case runs: a broken one spoils no other.
So are CLIP's encoders and whole models: where open_clip is missing, what lies behind the encoders can be measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastris import CRISConfig, reference
from fastris.data.tokens import find_tokenizer
from fastris.models import registry
from fastris.models.config import ModelConfig
from fastris.models.cris import FPN, Projector, TransformerDecoder
from fastris.nn.losses import TextToPixelContrastiveLoss
from fastris.nn.separate_attention import SeparateAttention, xavier
from fastris.reference import (
    AttentionWeights,
    BidirectionalAttentionWeights,
    FeedForwardWeights,
    PixelWordWeights,
    WordPixelWeights,
)

from .problem import Problem

if TYPE_CHECKING:
    from fastris.models.base import ReferringModel

Preset = str | ModelConfig
"""A model: its name in the registry, or its configuration."""


class Own(nn.Module):
    """What an operator's case owns, and the function ``call(own, **tensors)`` that runs it."""

    def __init__(self, call: Callable[..., Any], **owned: Any):
        super().__init__()
        self.call = call
        for name, value in owned.items():
            setattr(self, name, value)

    def forward(self, **tensors: Tensor) -> Any:
        return self.call(self, **tensors)


def similarity_loss(batch: int, channels: int, side: int) -> Problem:
    """The projector's last 1x1 convolution, the sentences' 3x3 kernels, and the loss."""
    inputs = {
        "features": torch.randn(batch, channels, side, side).relu(),
        "kernel": torch.randn(batch, channels, 3, 3) / (9 * channels) ** 0.5,
        "bias": torch.randn(batch),
    }
    own = Own(_similarity_loss, pointwise=nn.Conv2d(channels, channels, 1))
    return Problem(own, inputs, {"target": torch.rand(batch, 1, side, side)})


def _similarity_loss(own: Any, features: Tensor, kernel: Tensor, bias: Tensor, target: Tensor) -> Any:
    from fastris.ops.contrastive import text_to_pixel_contrastive_loss

    weight, constant = own.pointwise.weight, own.pointwise.bias
    return text_to_pixel_contrastive_loss(
        features, kernel, target, bias, pointwise_weight=weight, pointwise_bias=constant
    )


def upsample_conv(batch: int, channels: int, outputs: int, side: int) -> Problem:
    """One of the projector's two heavy layers, without its BatchNorm."""
    weight = nn.Parameter(torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5)
    return Problem(Own(_upsample_conv, weight=weight), {"x": torch.randn(batch, channels, side, side).relu()}, {})


def _upsample_conv(own: Any, x: Tensor) -> Tensor:
    from fastris.ops.upsample_conv import upsample2x_conv3x3

    return upsample2x_conv3x3(x, own.weight)


def cross_attention(
    batch: int, height: int, width: int, dim: int, heads: int, words: int, lengths: Sequence[int] = ()
) -> Problem:
    """The decoder's second sub-layer, dropout 0; sentences of ``lengths`` tokens, or all ``words`` of them real."""
    inputs = {"x": torch.randn(batch, height * width, dim), "text": torch.randn(batch, words, dim)}
    data = {
        "positions": reference.sine_positions_2d(height, width, dim),
        "text_positions": reference.sine_positions_1d(words, dim),
        "padding_mask": make_tokens(batch, words, lengths) == 0,
    }
    return Problem(Own(_cross_attention, **_attention_parts(dim, heads)), inputs, data)


def _cross_attention(own: Any, **tensors: Any) -> Tensor:
    from fastris.ops.cross_attention import cross_attention

    return cross_attention(**tensors, weights=_weights(own), num_heads=own.attention.num_heads, training=True)


def self_attention(batch: int, height: int, width: int, dim: int, heads: int) -> Problem:
    """The decoder's first sub-layer, dropout 0."""
    inputs = {"x": torch.randn(batch, height * width, dim)}
    data = {"positions": reference.sine_positions_2d(height, width, dim)}
    return Problem(Own(_self_attention, **_attention_parts(dim, heads)), inputs, data)


def _self_attention(own: Any, x: Tensor, positions: Tensor) -> Tensor:
    from fastris.ops.self_attention import self_attention

    return self_attention(x, positions, _weights(own), own.attention.num_heads, training=True)


def _attention_parts(dim: int, heads: int) -> dict[str, nn.Module]:
    norm, post_norm = (enliven(nn.LayerNorm(dim)) for _ in range(2))
    return {"norm": norm, "post_norm": post_norm, "attention": enliven(nn.MultiheadAttention(dim, heads))}


def _weights(own: Any) -> AttentionWeights:
    """The parameters of an attention sub-layer as the operators take them."""
    norm, attention, post = own.norm, own.attention, own.post_norm
    projections = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight
    return AttentionWeights(norm.weight, norm.bias, *projections, attention.out_proj.bias, post.weight, post.bias)


def feed_forward(batch: int, height: int, width: int, dim: int, dim_ffn: int) -> Problem:
    """The decoder's third sub-layer, dropout 0."""
    norm, inner_norm = enliven(nn.LayerNorm(dim)), enliven(nn.LayerNorm(dim_ffn))
    up, down = nn.Linear(dim, dim_ffn), nn.Linear(dim_ffn, dim)
    own = Own(_feed_forward, norm=norm, inner_norm=inner_norm, up=up, down=down)
    return Problem(own, {"x": torch.randn(batch, height * width, dim)}, {})


def _feed_forward(own: Any, x: Tensor) -> Tensor:
    from fastris.ops.feed_forward import feed_forward

    parts = own.norm, own.up, own.inner_norm, own.down
    return feed_forward(x, FeedForwardWeights(*(t for part in parts for t in (part.weight, part.bias))), training=True)


def bidirectional_attention(batch: int, side: int, width: int, text_width: int, words: int) -> Problem:
    """AlignFormer's attention in both directions, and the half of the next projection that reads the pixels' answer."""
    sizes = {"query": (width, width), "key": (text_width, width), "value": (text_width, width), "out": (width, width)}
    sizes |= {"sym_value": (width, text_width), "sym_out": (text_width, text_width)}
    parts = {name: nn.Linear(*size) for name, size in sizes.items()}
    own = Own(_bidirectional_attention, **parts, following=nn.Linear(width, width, bias=False))
    inputs = {"pixels": torch.randn(batch, side * side, width), "words": torch.randn(batch, words, text_width)}
    return Problem(own, inputs, {"valid": torch.ones(batch, words)})


def _bidirectional_attention(own: Any, pixels: Tensor, words: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    from fastris.ops.bidirectional_attention import bidirectional_attention

    parts = own.query, own.key, own.value, own.out, own.sym_value, own.sym_out
    weights = BidirectionalAttentionWeights(*(each for part in parts for each in (part.weight, part.bias)))
    return bidirectional_attention(pixels, words, valid, weights, project_weight=own.following.weight)


def few_query_attention(batch: int, dim: int, width: int, heads: int, sides: Sequence[int]) -> Problem:
    """One layer of AlignFormer's centre embedding at each of its maps, side x side, from one centre."""
    from fastris.nn.separate_attention import SeparateAttention, xavier

    attentions = nn.ModuleList(SeparateAttention(dim, width) for _ in sides)
    xavier(attentions)
    for attention in attentions:
        nn.init.normal_(attention.in_proj_bias, 0, 0.1)  # type: ignore[arg-type]
    own = Own(_few_query_attention, attentions=attentions, heads=heads, level=nn.Embedding(len(sides), width))
    own.place = nn.Parameter(torch.randn(1, dim))
    inputs = {"query": torch.randn(batch, 1, dim)}
    inputs |= {f"pixels{n}": torch.randn(batch, side * side, width) for n, side in enumerate(sides)}
    data = {f"positions{n}": reference.sine_positions_of_box(side, side, width) for n, side in enumerate(sides)}
    return Problem(own, inputs, data)


def _few_query_attention(own: Any, query: Tensor, **maps: Tensor) -> tuple[Tensor, ...]:
    from fastris.ops.few_query_attention import few_query_attention

    return tuple(
        few_query_attention(
            query, own.place, maps[f"pixels{n}"], level, maps[f"positions{n}"], attention.weights(), own.heads
        )
        for n, (attention, level) in enumerate(zip(own.attentions, own.level.weight, strict=True))
    )


def region_contrast(batch: int, channels: int, side: int, mask_side: int) -> Problem:
    """AlignFormer's 1x1 convolution and the instance contrast of what it makes, rectangles as masks."""
    inputs = {"features": torch.randn(batch, channels, side, side).relu(), "centres": torch.randn(batch, channels)}
    own = Own(_region_contrast, pointwise=nn.Conv2d(channels, channels, 1))
    return Problem(own, inputs, {"mask": _rectangles(batch, mask_side)})


def _region_contrast(own: Any, features: Tensor, centres: Tensor, mask: Tensor) -> Tensor:
    from fastris.ops.region_contrast import region_contrast

    convolution = {"pointwise_weight": own.pointwise.weight, "pointwise_bias": own.pointwise.bias}
    return region_contrast(features, centres, mask, **convolution)


def pixel_contrast(batch: int, channels: int, side: int, mask_side: int) -> Problem:
    """The alignment loss of a projected map and sentences, rectangles as masks."""
    inputs = {"features": torch.randn(batch, channels, side, side), "sentence": torch.randn(batch, channels)}
    return Problem(Own(_pixel_contrast), inputs, {"mask": _rectangles(batch, mask_side)})


def _pixel_contrast(own: Any, features: Tensor, sentence: Tensor, mask: Tensor) -> Tensor:
    from fastris.ops.pixel_contrast import pixel_contrast

    return pixel_contrast(features, sentence, mask)


def _rectangles(batch: int, side: int) -> Tensor:
    mask = torch.zeros(batch, 1, side, side)
    for row in range(batch):
        mask[row, :, : side // (row % 3 + 2), side // 5 :] = 1
    return mask


def deformable_attention(batch: int, maps: Sequence[tuple[int, int]], heads: int, width: int, points: int) -> Problem:
    """Between the projections of deformable attention: the maps' pixels, each a query, read all maps."""
    pixels, levels = sum(rows * columns for rows, columns in maps), len(maps)
    inputs = {
        "value": torch.randn(batch, pixels, heads, width),
        "offsets": 2 * torch.randn(batch, pixels, heads, levels, points, 2),
        "logits": torch.randn(batch, pixels, heads, levels * points),
    }
    own = Own(_deformable_attention, maps=tuple(maps))
    return Problem(own, inputs, {"reference_points": reference.pixel_centres(maps)})


def _deformable_attention(own: Any, **tensors: Any) -> Tensor:
    from fastris.ops.multiscale_deformable_attention import multiscale_deformable_attention

    return multiscale_deformable_attention(sizes=own.maps, **tensors)


def word_attention(
    batch: int, pixels: int, dim: int, heads: int, words: int, word_dim: int, lengths: Sequence[int] = ()
) -> Problem:
    """The pixel decoder's attention to words of another width; of ``lengths`` tokens, or all of them real."""
    inputs = {"query": torch.randn(batch, pixels, dim), "key": torch.randn(batch, words, word_dim)}
    inputs["value"] = torch.randn(batch, words, word_dim)
    data = {"padding_mask": make_tokens(batch, words, lengths) == 0}
    attention = SeparateAttention(dim, word_dim)
    xavier(attention)
    nn.init.normal_(attention.in_proj_bias, std=0.1)
    return Problem(Own(_word_attention, attention=attention, heads=heads), inputs, data)


def _word_attention(own: Any, **tensors: Any) -> Tensor:
    from fastris.ops.word_attention import word_attention

    return word_attention(**tensors, weights=own.attention.weights(), num_heads=own.heads)


def pixel_word_attention(batch: int, side: int, width: int, text_width: int, words: int) -> Problem:
    """MagNet's pixels of a map, side x side, which read a sentence without padding."""
    own = Own(_pixel_word_attention)
    sizes = {"project": width, "query": width, "key": text_width, "value": text_width, "out": width, "mixed": width}
    for name, size in sizes.items():
        setattr(own, name, nn.Linear(size, width))
    own.query_norm, own.out_norm = nn.LayerNorm(width), nn.LayerNorm(width)
    inputs = {"pixels": torch.randn(batch, side * side, width), "words": torch.randn(batch, words, text_width)}
    return Problem(own, inputs, {"valid": torch.ones(batch, words)})


def _pixel_word_attention(own: Any, pixels: Tensor, words: Tensor, valid: Tensor) -> Tensor:
    from fastris.ops.pixel_word_attention import pixel_word_attention

    parts = own.project, own.query, own.query_norm, own.key, own.value, own.out, own.out_norm, own.mixed
    weights = PixelWordWeights(*(each for part in parts for each in (part.weight, part.bias)))
    return pixel_word_attention(pixels, words, valid, weights)


def word_pixel_attention(batch: int, side: int, width: int, text_width: int, words: int) -> Problem:
    """MagNet's sentence without padding, whose words read the pixels of a map, side x side."""
    own = Own(_word_pixel_attention)
    for name in ("project", "query", "key", "value", "out", "mixed"):
        setattr(own, name, nn.Linear(width if name in ("key", "value") else text_width, text_width))
    inputs = {"words": torch.randn(batch, words, text_width), "pixels": torch.randn(batch, side * side, width)}
    return Problem(own, inputs, {"valid": torch.ones(batch, words)})


def _word_pixel_attention(own: Any, words: Tensor, pixels: Tensor, valid: Tensor) -> Tensor:
    from fastris.ops.word_pixel_attention import word_pixel_attention

    parts = own.project, own.query, own.key, own.value, own.out, own.mixed
    weights = WordPixelWeights(*(each for part in parts for each in (part.weight, part.bias)))
    return word_pixel_attention(words, pixels, valid, weights, "masked")


def image_encoder(preset: Preset, side: int, batch: int) -> Problem:
    """CLIP's ResNet as CRIS uses it: three maps of (B, 3, side, side). No gradient reaches the images."""
    from fastris.nn.clip import DenseResNet

    clip = _cris(preset).clip
    heads = clip.vision_width * 32 // 64
    encoder = DenseResNet(clip.vision_layers, clip.embed_dim, heads, clip.image_resolution, clip.vision_width)
    return Problem(enliven(encoder), {}, {"x": torch.randn(batch, 3, side, side)})


def text_encoder(preset: Preset, words: int, lengths: Sequence[int], batch: int) -> Problem:
    """CLIP's text transformer: tokens (B, words) to every word and the sentence."""
    from fastris.nn.clip import CLIPBackbone

    clip = dataclasses.asdict(_cris(preset).clip)
    backbone = CLIPBackbone(**{**clip, "vision_layers": (1, 1, 1, 1), "vision_width": 4})
    backbone.visual = nn.Identity()  # type: ignore[assignment]
    return Problem(
        enliven(Own(_encode_text, backbone=backbone)),
        {},
        {"text": make_tokens(batch, words, lengths, clip["vocab_size"])},
    )


def _encode_text(own: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    return own.backbone.encode_text(text)


def neck(preset: Preset, side: int, batch: int) -> Problem:
    """The cross-modal neck: three maps and the sentence to one map."""
    config = _cris(preset)
    levels = zip("345", config.fpn_in, (8, 16, 32), strict=True)
    maps = {f"c{name}": torch.randn(batch, width, side // step, side // step) for name, width, step in levels}
    return Problem(
        enliven(Own(_neck, neck=FPN(config.fpn_in, config.fpn_out))),
        {**maps, "state": torch.randn(batch, config.word_dim)},
        {},
    )


def _neck(own: Any, c3: Tensor, c4: Tensor, c5: Tensor, state: Tensor) -> Tensor:
    return own.neck((c3, c4, c5), state)


def config_of(preset: Preset) -> Any:
    """The configuration of a model of whatever system."""
    return registry.preset(preset) if isinstance(preset, str) else preset


def _cris(preset: Preset) -> CRISConfig:
    config = config_of(preset)
    assert isinstance(config, CRISConfig), f"{preset} has no such part"
    return config


def projector(batch: int, side: int, word_dim: int, in_dim: int, with_loss: bool = False) -> Problem:
    """The whole projector, from the decoder's map to logits, or to the loss against masks of their size."""
    inputs = {"x": torch.randn(batch, 2 * in_dim, side, side), "word": torch.randn(batch, word_dim)}
    module = enliven(Projector(word_dim, in_dim))
    return Problem(module, inputs, {"mask": torch.rand(batch, 1, 4 * side, 4 * side)} if with_loss else {})


def loss(batch: int, side: int, mask_side: int) -> Problem:
    """The text-to-pixel contrastive loss on given logits, the mask's resizing included."""
    inputs = {"logits": torch.randn(batch, 1, side, side)}
    mask = torch.rand(batch, 1, mask_side, mask_side)
    return Problem(TextToPixelContrastiveLoss(), inputs, {"mask": mask})


def upsampled_bce(batch: int, queries: int, side: int, mask_side: int) -> Problem:
    """AlignFormer's loss on given logits: upsampled, against masks that all queries share."""
    inputs = {"logits": torch.randn(batch, queries, side, side)}
    return Problem(Own(_upsampled_bce), inputs, {"target": torch.rand(batch, 1, mask_side, mask_side)})


def _upsampled_bce(own: Any, logits: Tensor, target: Tensor) -> Tensor:
    from fastris.ops.upsampled_bce import upsampled_bce_with_logits

    return upsampled_bce_with_logits(logits, target, pos_weight=1.1)


def decoder(
    batch: int,
    height: int,
    width: int,
    dim: int,
    heads: int,
    words: int,
    layers: int,
    dim_ffn: int,
    dropout: float,
    lengths: Sequence[int],
) -> Problem:
    """The whole decoder, as CRIS calls it."""
    module = enliven(TransformerDecoder(layers, dim, heads, dim_ffn, dropout))
    inputs = {"vis": torch.randn(batch, dim, height, width), "txt": torch.randn(batch, words, dim)}
    return Problem(module, inputs, {"pad_mask": make_tokens(batch, words, lengths) == 0})


def training_step(preset: Preset, side: int, batch: int, words: int, lengths: Sequence[int], **changes: Any) -> Problem:
    """Forward, backward and Adam of a whole model of any system, ``changes`` made to its configuration.

    No gradient reaches the images.
    """
    config = dataclasses.replace(config_of(preset), **changes)
    model, data = model_and_data(config, side, batch, words, lengths)
    return Problem(
        Own(_training_loss, model=model), {}, {**data, "mask": torch.rand(batch, 1, side, side)}, optimizer=True
    )


def _training_loss(own: Any, img: Tensor, word: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    prediction, _, loss = own.model(img, word, mask)
    return loss, prediction


def inference(preset: Preset, side: int, batch: int, words: int, lengths: Sequence[int]) -> Problem:
    """A whole model of any system in eval mode."""
    model, data = model_and_data(config_of(preset), side, batch, words, lengths)
    return Problem(model, {}, data, training=False)


def model_and_data(
    config: ModelConfig, side: int, batch: int, words: int, lengths: Sequence[int]
) -> tuple[ReferringModel, dict[str, Tensor]]:
    """A model of any system, and images (B, 3, side, side) and sentences (B, words) for it."""
    if isinstance(config, CRISConfig):
        tokens = make_tokens(batch, words, lengths, config.clip.vocab_size)
    else:
        longest = lengths or (words,)
        sentences = [" ".join(["red"] * longest[row % len(longest)]) for row in range(batch)]
        tokens = find_tokenizer(config.inputs.tokenizer)(sentences, words).tokens
    return enliven(registry.create(config)), {"img": torch.randn(batch, 3, side, side), "word": tokens}


def make_tokens(batch: int, words: int, lengths: Sequence[int] = (), vocab_size: int = 49408) -> Tensor:
    """Sentences (B, L) as CLIP's tokenizer leaves them, of ``lengths`` in turn, or of L tokens each.

    Start is the largest id but one, end the largest, padding 0.
    """
    end = vocab_size - 1
    tokens = torch.randint(1, end - 1, (batch, words))
    tokens[:, 0] = end - 1
    for row in range(batch):
        length = min(lengths[row % len(lengths)], words) if lengths else words
        tokens[row, length - 1] = end
        tokens[row, length:] = 0
    return tokens


M = TypeVar("M", bound=nn.Module)


def enliven(module: M) -> M:
    """The module with random norms and biases, as after training: fresh ones are 1 and 0 and hide mistakes.

    A fresh CLIP even starts with scales of 0, under which most gradients of its ResNet are 0.
    """
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.1)
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                statistics = dict(part.named_buffers())
                statistics["running_mean"].normal_(0, 0.1)
                statistics["running_var"].uniform_(0.5, 1.5)
            if isinstance(part, nn.MultiheadAttention):
                part.in_proj_bias.normal_(0, 0.1)
                part.out_proj.bias.normal_(0, 0.1)
    return module

"""AlignFormer (arXiv 2301.06429, in the code released as LGFormer): pixels grouped round a centre made of language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.models.alignformer import keys
from fastris.models.alignformer.config import AlignFormerConfig
from fastris.models.alignformer.pixel_decoder import PixelDecoder, Words
from fastris.models.alignformer.swin import SwinWithWords
from fastris.models.arguments import check_images, check_index, check_mask, check_tokens, without_shared_padding
from fastris.models.base import HEAD, NO_DECAY, Origin, Pixels, ReferringModel, checked_pixels
from fastris.models.encoders import swin_name
from fastris.models.state_dicts import Adopted
from fastris.nn.bert import TextEncoder
from fastris.nn.query_decoder import QueryDecoder
from fastris.nn.recompute import check_setting
from fastris.ops.region_contrast import region_contrast
from fastris.ops.similarity import text_to_pixel_similarity
from fastris.ops.upsampled_bce import upsampled_bce_with_logits

POS_WEIGHT = 1.1
"""Weight of the object's pixels in the loss."""
SMALLEST_TRAINED = 32
"""Sides in pixels up to which the last stage is a single pixel, which an instance norm over pixels makes zero."""


class Scored(NamedTuple):
    """What a batch's phrases came to.

    Attributes:
        features: the map (E, D, H/4, W/4) whose 1x1 convolution ``pix_dec.mask_features`` is scored; that is linear
            and folded into the kernels, so the mask features themselves are never computed.
        kernels: (E, J, D), of the J embeddings from the first to the last; ``bias`` (E, J).
        logits: (E, J, H/4, W/4).
    """

    features: Tensor
    kernels: Tensor
    bias: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """The two decoders, and the kernel that each centre embedding becomes."""

    def __init__(self, config: AlignFormerConfig):
        super().__init__()
        width, pixel_width = config.text_width, config.conv_dim
        self.pix_dec = PixelDecoder(
            config.widths,
            pixel_width,
            width,
            config.word_len,
            config.pixel_layers,
            config.pixel_ffn,
            config.word_ffn,
        )
        self.txt_proj = nn.Linear(width, width)
        self.dynamic_conv_gen_body = QueryDecoder(width, pixel_width, config.query_layers, config.query_ffn)
        self.dynamic_conv_gen_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, pixel_width + 1)
        )

    def sentence(self, words: Words) -> Tensor:
        """The first centre (B, 1, T): the projected mean of a sentence's valid words, its marks included."""
        mask = words.valid.to(words.states.dtype)[..., None]
        mean = (mask * words.states).sum(1) / mask.sum(1).clamp_min(1e-6)
        return self.txt_proj(mean)[:, None]

    def forward(self, maps: tuple[Tensor, ...], words: Words, all_outputs: bool) -> Scored:
        """Score every pixel by the centres: all of them, or the last only."""
        levels, pixels = self.pix_dec(maps, words)
        centres = self.dynamic_conv_gen_body(self.sentence(words), levels)
        made = self.dynamic_conv_gen_head(torch.cat(centres if all_outputs else centres[-1:], dim=1))
        kernels, bias = made[..., :-1], made[..., -1]
        conv = self.pix_dec.mask_features
        logits = text_to_pixel_similarity(
            pixels, kernels[..., None, None], bias, pointwise_weight=conv.weight, pointwise_bias=conv.bias
        )
        return Scored(pixels, kernels, bias, logits)


class AlignFormer(ReferringModel, tags=["alignformer"]):
    """AlignFormer with the released state-dict keys and values.

    Words and pixels change each other between the image encoder's stages, so an image is encoded anew for each phrase:
    :meth:`encode_image` returns the pixels. ``model(img, word, mask)`` answers as :class:`ReferringModel` says, with
    logits of the image's own size (B, 1, H, W); images may have any size, and are released for 480x480, squashed.
    Token ids are BERT's, 0 is padding; L may be up to ``word_len``. The released code has no instance contrast.
    """

    config_class = AlignFormerConfig
    shares_image = False
    contrasts_instances = True
    starts: ClassVar[Mapping[str, tuple[str, str]]] = {
        "swin_pretrain": ("Swin's", "backbone."),
        "bert_pretrain": ("BERT's", "text_encoder."),
    }
    recompute = "none"

    config: AlignFormerConfig

    def __init__(self, config: AlignFormerConfig):
        super().__init__(config)
        config = self.config
        self.text_encoder = TextEncoder(config.bert, "AlignFormer")
        self.backbone = SwinWithWords(
            config.embed_dim,
            config.depths,
            config.num_heads,
            config.window,
            config.drop_path,
            config.text_width,
            intended=config.behaviour == "intended",
        )
        self.classifier = Classifier(config)

    def set_recompute(self, setting: str) -> AlignFormer:
        """Trade time for memory in training; returns the model. Weights, numbers and eval mode stay as they are.

        ``"none"`` keeps what autograd keeps. ``"pointwise"`` keeps the products of Swin's blocks, of the exchanges with
        the words and of the pixel decoder's layers, and computes norms, GELU, softmax and the rest again in the
        backward pass; ``"stages"`` keeps the input of each of these alone. Of BERT both keep the input alone. See
        :mod:`fastris.nn.recompute`. Raises ValueError for any other setting.
        """
        encoder = self.classifier.pix_dec.transformer.encoder
        for part in (self, self.text_encoder, self.backbone, encoder):
            part.recompute = check_setting(setting)
        return self

    def encode_image(self, images: Tensor) -> Pixels:
        """The images (B, 3, H, W) as they are, normalised as ImageNet's, after their checks."""
        check_images(images, self.classifier.txt_proj.weight.dtype, "ImageNet's")
        return Pixels(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """BERT's states (E, L, T) of token ids (E, L), those of padding included."""
        check_tokens(tokens, self.config.word_len, self.config.bert.vocab_size, "this model takes")
        return self.text_encoder(tokens, tokens != 0)

    def segment(self, features: Pixels, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (E, 1, H, W) of the expressions ``tokens`` (E, L) about images; ``index`` (E,) as for all models."""
        scored = self.score(features, tokens, index, all_outputs=False)
        return _resized(scored.logits, features.images.shape[-2:])

    def loss(
        self,
        features: Pixels,
        tokens: Tensor,
        mask: Tensor,
        index: Tensor | None = None,
        origin: Origin | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, logits (E, 1, H, W) of the last embedding).

        The loss is the *sum*, over all embeddings, of the mean binary cross-entropy at the images' size, with weight
        1.1 on the object; plus ``instance_contrast`` times the contrast of the last kernel. Raises ValueError for
        images of 32 pixels and less on both sides, whose last stage is one pixel.
        """
        check_mask(mask, len(features.images), len(tokens))
        size = features.images.shape[-2:]
        if max(size) <= SMALLEST_TRAINED:
            raise ValueError(
                f"img is {size[0]}x{size[1]} pixels, of which the last stage sees one, and its instance norm needs "
                f"more to train; give images with a side of more than {SMALLEST_TRAINED} pixels"
            )
        scored = self.score(features, tokens, index)
        target = reference.resize_target(mask, size)
        loss = upsampled_bce_with_logits(scored.logits, target, pos_weight=POS_WEIGHT)
        if self.instance_contrast:
            conv = self.classifier.pix_dec.mask_features
            images, references = origin or (index, None)
            contrast = region_contrast(
                scored.features,
                scored.kernels[:, -1],
                mask,
                known=known,
                image_ids=images,
                ref_ids=references,
                pointwise_weight=conv.weight,
                pointwise_bias=conv.bias,
            )
            loss = loss + self.instance_contrast * contrast
        return loss, _resized(scored.logits[:, -1:], size)

    def score(self, features: Pixels, tokens: Tensor, index: Tensor | None = None, all_outputs: bool = True) -> Scored:
        """What all (or only the last) of the embeddings make of the images; arguments as for :meth:`segment`."""
        images = checked_pixels(features).images
        check_index(index, images.shape[0], tokens.shape[0])
        tokens = self._fitted(tokens)
        words = self.encode_text(tokens)
        valid = tokens != 0
        encoded = self.backbone(features.select(index).images, words, valid)
        return self.classifier(encoded.maps, Words(encoded.words, valid), all_outputs)

    def _fitted(self, tokens: Tensor) -> Tensor:
        """Released: padded to ``word_len``. Intended: trimmed to the longest sentence, which changes no result."""
        check_tokens(tokens, self.config.word_len, self.config.bert.vocab_size, "this model takes")
        if self.config.behaviour == "compat":
            return F.pad(tokens, (0, self.config.word_len - tokens.shape[1]))
        return without_shared_padding(tokens)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All but BERT's embeddings, which are never updated, as released.

        Without weight decay are, of the image encoder, the norms and the tables of relative positions; all other
        biases decay. One learning rate is for all.
        """
        groups: dict[str, list[nn.Parameter]] = {HEAD: [], HEAD + NO_DECAY: []}
        for name, parameter in self.named_parameters():
            if name.startswith("text_encoder.embeddings."):
                continue
            exempt = name.startswith("backbone.") and ("norm" in name or "relative_position_bias_table" in name)
            groups[HEAD + NO_DECAY if exempt else HEAD].append(parameter)
        return groups

    @classmethod
    def adopt(cls, state: Mapping[str, Tensor]) -> Adopted | None:
        """Swin's weights, renamed for the ``backbone``, or BERT's for the ``text_encoder``; None for others."""
        return keys.adopt_encoder(state)

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor]) -> AlignFormerConfig:
        """See :func:`fastris.models.alignformer.keys.infer_config`."""
        return keys.infer_config(state)

    @classmethod
    def encoder_of(cls, state: Mapping[str, Tensor]) -> str:
        """The name of the Swin that these weights belong to."""
        return keys.architecture(state)

    def in_words(self) -> str:
        """The model and its encoder, such as ``AlignFormer on Swin-B``."""
        return f"{self.config.title} on {swin_name(self.config.embed_dim, self.config.depths)}"


def _resized(logits: Tensor, size: torch.Size) -> Tensor:
    """(E, J, h, w) at the images' size, in float32 where they came in half precision."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(wide, tuple(size), mode="bilinear", align_corners=False)

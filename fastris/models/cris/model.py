"""CRIS (CVPR 2022, arXiv 2111.15174): an image and a phrase in, a mask of the phrase's object out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastris.models.arguments import check_images, check_index, check_mask, check_tokens, without_shared_padding
from fastris.models.base import HEAD, Origin, ReferringModel
from fastris.models.cris import keys
from fastris.models.cris.config import CRISConfig
from fastris.models.cris.decoder import TransformerDecoder
from fastris.models.cris.neck import FPN
from fastris.models.cris.projector import Projector
from fastris.models.state_dicts import Adopted
from fastris.nn.clip import CLIPBackbone
from fastris.nn.recompute import check_setting, recomputed


class ImageFeatures(NamedTuple):
    """A batch of encoded images, shared by all expressions about them: the neck's projected feature maps.

    For RN50 at 416x416: ``f3`` (B, 256, 26, 26), ``f4`` (B, 512, 26, 26), ``f5`` (B, 1024, 13, 13).
    """

    f3: Tensor
    f4: Tensor
    f5: Tensor

    def select(self, index: Tensor | None) -> ImageFeatures:
        """The features of the images at the positions ``index`` (E,), in that order; all images for None."""
        return self if index is None else ImageFeatures(*(level[index] for level in self))


class CRIS(ReferringModel, tags=["cris"]):
    """CRIS with the published state-dict keys, shapes and values.

    ``model(img, word, mask)`` returns what the published class returns: in training mode ``(pred.detach(), target,
    loss)``, where ``target`` is the mask at the logits' size; in eval mode the logits (B, 1, H/4, W/4), detached.

    Several expressions about one image share its encoding::

        features = model.encode_image(images)               # (B, 3, H, W)
        logits = model.segment(features, tokens, index)     # tokens (E, L), index (E,): the image of each expression

    ``save_pretrained`` and ``push_to_hub`` are huggingface_hub's (safetensors, with checksums, and config.json), and
    ``from_pretrained`` reads what they write.
    """

    config_class = CRISConfig
    starts_from: ClassVar[str] = "CLIP's (visual, transformer, ...)"
    recompute = "none"

    config: CRISConfig

    def __init__(self, config: CRISConfig):
        super().__init__(config)
        config = self.config
        clip = config.clip
        self.backbone = CLIPBackbone(
            clip.embed_dim,
            clip.image_resolution,
            clip.vision_layers,
            clip.vision_width,
            clip.context_length,
            clip.vocab_size,
            clip.transformer_width,
            clip.transformer_heads,
            clip.transformer_layers,
        )
        self.neck = FPN(config.fpn_in, config.fpn_out)
        self.decoder = TransformerDecoder(
            config.num_layers, config.vis_dim, config.num_head, config.dim_ffn, config.dropout, config.intermediate
        )
        self.proj = Projector(config.word_dim, config.vis_dim // 2, 3)

    def set_recompute(self, setting: str) -> CRIS:
        """Trade time for memory in training; returns the model. Weights, numbers and eval mode stay as they are.

        ``"none"`` keeps what autograd keeps; ``"pointwise"`` computes norms, ReLU and casts of the weights again in the
        backward pass, and the whole text encoder, but no convolution; ``"stages"`` also the image encoder's first
        stages. See :mod:`fastris.nn.recompute`. Raises ValueError for any other setting.
        """
        for part in (self, self.backbone, self.backbone.visual):
            part.recompute = check_setting(setting)
        return self

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W), normalised as CLIP's, with the image encoder and the neck's image part.

        Raises ValueError unless H and W are multiples of 32 pixels, TypeError for a dtype that does not fit.
        """
        _check_images(images, next(self.backbone.visual.parameters()).dtype)
        maps = self.backbone.encode_image(images)
        return ImageFeatures(*recomputed([self.neck], self.recompute, self._project, *maps))

    def segment(self, features: ImageFeatures, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (E, 1, H/4, W/4) of the expressions ``tokens`` (E, L) about encoded images.

        ``index`` (E,) int64 says which image each expression belongs to; without it the expressions and images
        correspond one to one. Token ids are CLIP's: 0 is padding, the largest id ends the sentence.
        """
        return self.proj(*self._decode(features, tokens, index))

    def loss(
        self,
        features: ImageFeatures,
        tokens: Tensor,
        mask: Tensor,
        index: Tensor | None = None,
        origin: Origin | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (text-to-pixel contrastive loss, logits (E, 1, H/4, W/4)), computed together.

        Arguments as for :meth:`segment`, plus the expressions' masks (E, 1, H, W) in [0, 1]. The loss is the mean over
        all pixels and expressions; both results can be differentiated.
        """
        _check_features(features)
        check_mask(mask, len(features.f3), len(tokens))
        return self.proj(*self._decode(features, tokens, index), mask)

    def _decode(self, features: ImageFeatures, tokens: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode the text and run neck and decoder: the pixel map (E, D, h, w) and the sentences' states (E, S)."""
        _check_features(features)
        _check_tokens(tokens, self.config)
        check_index(index, len(features.f3), len(tokens))
        tokens = without_shared_padding(tokens)
        words, state = self.backbone.encode_text(tokens)
        fused = recomputed([self.neck], self.recompute, self._fuse, state, *features.select(index))
        decoded = self.decoder(fused, words, tokens == 0)
        if isinstance(decoded, list):
            decoded = decoded[-1]
        return decoded.reshape(fused.shape), state

    def _project(self, *maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.neck.project(maps)

    def _fuse(self, state: Tensor, *projected: Tensor) -> Tensor:
        return self.neck.fuse(projected, state)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run CLIP's text encoder on token ids (E, L): the words (E, L, C) and the sentences' states (E, S)."""
        _check_tokens(tokens, self.config)
        return self.backbone.encode_text(tokens)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``backbone``: the CLIP encoders. ``head``: all else and, as published, CLIP's positional embeddings."""
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], HEAD: []}
        for name, parameter in self.named_parameters():
            is_backbone = name.startswith("backbone") and "positional_embedding" not in name
            groups["backbone" if is_backbone else HEAD].append(parameter)
        return groups

    def check_training(self, expressions: int) -> None:
        """Raise ValueError for no expression, or for one where BatchNorm is not synchronised between processes."""
        super().check_training(expressions)
        if expressions == 1 and any(type(each) is nn.BatchNorm1d and each.training for each in self.neck.modules()):
            raise ValueError(
                "word holds one expression, but BatchNorm needs two in training mode; give a larger batch, or call "
                "model.eval() to segment"
            )

    @classmethod
    def adopt(cls, state: Mapping[str, Tensor]) -> Adopted | None:
        """CLIP's weights, renamed for the ``backbone``; None for other weights."""
        return keys.adopt_clip(state)

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor]) -> CRISConfig:
        """See :func:`fastris.models.cris.keys.infer_config`."""
        return keys.infer_config(state)

    @classmethod
    def encoder_of(cls, state: Mapping[str, Tensor]) -> str:
        """The name of the CLIP model that these weights, CLIP's or CRIS's, look like."""
        return keys.architecture(state)

    def in_words(self) -> str:
        """The model and its encoder, such as ``CRIS on RN50``."""
        return f"{self.config.title} on {keys.architecture(self.state_dict())}"


def _check_features(features: Any) -> None:
    if not isinstance(features, ImageFeatures):
        raise TypeError(f"features must be what encode_image returns, got {type(features).__name__}")


def _check_images(images: Tensor, weights: torch.dtype) -> None:
    check_images(images, weights, "CLIP's", multiple=32)


def _check_tokens(tokens: Tensor, config: CRISConfig) -> None:
    check_tokens(tokens, config.clip.context_length, config.clip.vocab_size, "CLIP knows positions for")

"""CRIS (CVPR 2022, arXiv 2111.15174): an image and a phrase in, a mask of the phrase's object out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastris.dispatch import requested_impl
from fastris.models.base import HEAD, ReferringModel, check_is_tensor, check_mask
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
        self, features: ImageFeatures, tokens: Tensor, mask: Tensor, index: Tensor | None = None
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
        _check_index(index, len(features.f3), len(tokens))
        tokens = _without_shared_padding(tokens)
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


def _without_shared_padding(tokens: Tensor) -> Tensor:
    """Cut off the last columns of token ids (E, L) that are padding in every sentence.

    This is exact: CLIP's text encoder is causal, so no word attends to what follows it, and the decoder masks padding.
    It is done on a CPU only, where reading the ids does not wait for a device, and not on the reference path, while
    compiling or under PyTorch's fake tensors, which have no values.
    """
    if tokens.device.type != "cpu" or not _has_values(tokens) or requested_impl() == "reference":
        return tokens
    used = tokens.ne(0).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1 if len(used) else 1]


def _check_features(features: Any) -> None:
    if not isinstance(features, ImageFeatures):
        raise TypeError(f"features must be what encode_image returns, got {type(features).__name__}")


def _check_images(images: Tensor, weights: torch.dtype) -> None:
    check_is_tensor("img", images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"img must be (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % 32 or width % 32 or not height or not width:
        raise ValueError(
            f"img is {height}x{width} pixels, but height and width must be multiples of 32; "
            "letterbox it first (fastris.data.letterbox)"
        )
    if not images.is_floating_point():
        raise TypeError(f"img must be floating point and normalised with CLIP's mean and std, got {images.dtype}")
    if not len(images):
        raise ValueError(f"img holds no images, got {tuple(images.shape)}; give at least one")
    casts = torch.is_autocast_enabled(images.device.type) and torch.float64 not in (images.dtype, weights)
    if images.dtype != weights and not casts:
        raise TypeError(
            f"img is {images.dtype} but the model's weights are {weights}; convert it with img.to({weights}), or run "
            "float32 weights under torch.autocast"
        )


def _check_tokens(tokens: Tensor, config: CRISConfig) -> None:
    check_is_tensor("word", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"word must be token ids (B, L), got {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"word must hold integer token ids, int64 or int32, got {tokens.dtype}; use word.long()")
    if not 1 <= tokens.shape[1] <= config.clip.context_length:
        raise ValueError(
            f"word has {tokens.shape[1]} tokens a sentence, but CLIP knows positions for 1 to "
            f"{config.clip.context_length}; cut it with fastris.data.tokens.tokenize(sentences, word_len)"
        )
    if tokens.numel() and tokens.device.type == "cpu" and _has_values(tokens):
        low, high, last = int(tokens.min()), int(tokens.max()), config.clip.vocab_size - 1
        if low < 0 or high > last:
            raise ValueError(f"word must hold token ids 0 to {last}, got {low} to {high}; tokenize for this model")


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def _check_index(index: Tensor | None, images: int, expressions: int) -> None:
    if index is None:
        if images != expressions:
            raise ValueError(
                f"there are {images} images and {expressions} expressions; pass index (E,) to say which image each "
                "expression belongs to"
            )
        return
    if index.shape != (expressions,) or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"index must be int64 of shape ({expressions},), got {index.dtype} of shape {tuple(index.shape)}"
        )
    if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < images:
        raise ValueError(f"index must name images 0 to {images - 1}, got {int(index.min())} to {int(index.max())}")

"""CRIS (CVPR 2022, arXiv 2111.15174): an image and a phrase in, a mask of the phrase's object out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.models.arguments import check_images, check_index, check_mask, check_tokens, without_shared_padding
from fastris.models.base import HEAD, Origin, Pixels, ReferringModel
from fastris.models.cris import keys
from fastris.models.cris.cam import alignment_modules, encode_aligned
from fastris.models.cris.centre import Centre
from fastris.models.cris.config import CRISConfig
from fastris.models.cris.decoder import TransformerDecoder
from fastris.models.cris.neck import FPN
from fastris.models.cris.projector import Projector, block_maps
from fastris.models.cris.training_parts import Alignment, GroundingFeatures, HiddenWords, SentenceGrounding
from fastris.models.cris.vlba import encode_with_words, exchanges
from fastris.models.state_dicts import Adopted
from fastris.models.training_metrics import TrainingMetrics
from fastris.nn.clip import CLIPBackbone
from fastris.nn.recompute import check_setting, recomputed
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.region_contrast import region_contrast
from fastris.ops.similarity import text_to_pixel_similarity


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


Features: TypeAlias = ImageFeatures | GroundingFeatures | Pixels
"""What :meth:`CRIS.encode_image` returns."""


class Decoded(NamedTuple):
    """What neck and decoder made of E expressions.

    Attributes:
        pixels: the map (E, D, h, w).
        words: (E, L, D), as the decoder saw them; ``valid`` (E, L) is False at padding.
        state: the sentences (E, S).
        tokens: their ids (E, L). hidden: the same sentences with hidden words, where words are hidden.
    """

    pixels: Tensor
    words: Tensor
    valid: Tensor
    state: Tensor
    tokens: Tensor
    hidden: HiddenWords | None = None


class CRIS(TrainingMetrics, ReferringModel, tags=["cris"]):
    """CRIS with the published state-dict keys, shapes and values.

    ``model(img, word, mask)`` returns what the published class returns: in training mode ``(pred.detach(), target,
    loss)``, where ``target`` is the mask at the logits' size; in eval mode the logits (B, 1, H/4, W/4), detached.

    Several expressions about one image share its encoding::

        features = model.encode_image(images)               # (B, 3, H, W)
        logits = model.segment(features, tokens, index)     # tokens (E, L), index (E,): the image of each expression

    With ``vlba="trunk"`` or ``alignment_module="trunk"`` the image encoder hears the words, so that an image is encoded
    anew for each phrase: then :meth:`encode_image` returns the pixels, and the calls are the same.

    ``save_pretrained`` and ``push_to_hub`` are huggingface_hub's (safetensors, with checksums, and config.json), and
    ``from_pretrained`` reads what they write.
    """

    config_class = CRISConfig
    contrasts_instances = True
    starts: ClassVar[Mapping[str, tuple[str, str]]] = {"clip_pretrain": ("CLIP's", "backbone.")}
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
        # Last, so that the other parts start from the same random numbers as without them.
        self.shares_image = not config.trunk_switch
        self.vlba = exchanges(config)
        self.cam = alignment_modules(config)
        self.centre = None
        if config.centre_layers:
            self.centre = Centre(config.vis_dim, config.centre_layers, config.dim_ffn, config.text_outputs)
        self.grounding = SentenceGrounding(config) if config.mask_grounding else None
        self.cal = Alignment(config) if config.alignment_loss else None

    def set_recompute(self, setting: str) -> CRIS:
        """Trade time for memory in training; returns the model. Weights, numbers and eval mode stay as they are.

        ``"none"`` keeps what autograd keeps; ``"pointwise"`` computes norms, ReLU and casts of the weights again in the
        backward pass, and the whole text encoder, but no convolution; ``"stages"`` also the image encoder's first
        stages. See :mod:`fastris.nn.recompute`. Raises ValueError for any other setting.
        """
        parts = (self, self.backbone, self.backbone.visual, *(() if self.grounding is None else (self.grounding,)))
        for part in parts:
            part.recompute = check_setting(setting)
        return self

    def encode_image(self, images: Tensor) -> ImageFeatures | GroundingFeatures | Pixels:
        """Encode images (B, 3, H, W), normalised as CLIP's, with the image encoder and the neck's image part.

        Where the trunk hears the words, the images as they are, after the same checks. In training mode with
        ``mask_grounding`` the result has C5, too. Raises ValueError unless H and W are multiples of 32 pixels,
        TypeError for a dtype that does not fit.
        """
        _check_images(images, next(self.backbone.visual.parameters()).dtype)
        if not self.shares_image:
            return Pixels(images)
        maps = self.backbone.encode_image(images)
        features = self._projected(maps)
        return features if self.grounding is None or not self.training else GroundingFeatures(*features, maps[2])

    def segment(self, features: Features, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (E, 1, H/4, W/4) of the expressions ``tokens`` (E, L) about encoded images.

        ``index`` (E,) int64 says which image each expression belongs to; without it the expressions and images
        correspond one to one. Token ids are CLIP's: 0 is padding, the largest id ends the sentence.
        """
        decoded = self._decode(features, tokens, index)
        if self.centre is None:
            return self.proj(decoded.pixels, decoded.state)
        scored, kernels, bias = self._kernels(decoded, all_outputs=False)
        last: Any = self.proj.vis[4]
        return text_to_pixel_similarity(scored, kernels, bias, pointwise_weight=last.weight, pointwise_bias=last.bias)

    def loss(
        self,
        features: Features,
        tokens: Tensor,
        mask: Tensor,
        index: Tensor | None = None,
        origin: Origin | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (text-to-pixel contrastive loss, logits (E, 1, H/4, W/4)), computed together.

        Arguments as for :meth:`segment`, plus the expressions' masks (E, 1, H, W) in [0, 1]. The loss is the mean over
        all pixels and expressions; both results can be differentiated.

        With a centre embedding it is the mean over all its outputs, too, and the logits are the last one's.
        ``instance_contrast`` times the contrast of the last text kernel is added; that kernel's centre is the sum of
        its taps, which is what scores a patch of equal pixels.

        In training mode ``mask_grounding`` and ``alignment_loss`` times their losses are added, too.

        The instance contrast and the alignment loss leave out what ``known`` (E, 1, H, W) says is a letterbox's border.
        """
        self._check_features(features)
        check_mask(mask, len(features[0]), len(tokens))
        decoded = self._decode(features, tokens, index, hides=self.training and self.grounding is not None)
        loss, logits = self._segmentation_loss(decoded, mask, index, origin, known)
        if decoded.hidden is not None:
            assert self.grounding is not None and isinstance(features, GroundingFeatures)
            embedding = self.backbone.token_embedding.weight
            grounding = self.grounding.loss(decoded.hidden, decoded.tokens, features.c5, mask, embedding, index)
            loss = loss + self.config.mask_grounding * grounding
        if self.cal is not None and self.training:
            alignment = self.cal(decoded.pixels, decoded.words, decoded.tokens, mask, known)
            loss = loss + self.config.alignment_loss * alignment
        return loss, logits

    def _segmentation_loss(
        self,
        decoded: Decoded,
        mask: Tensor,
        index: Tensor | None,
        origin: Origin | None,
        known: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss on the logits, with the instance contrast, and the logits."""
        if self.centre is None and not self.instance_contrast:
            return self.proj(decoded.pixels, decoded.state, mask)
        scored, kernels, bias = self._kernels(decoded, all_outputs=True)
        last: Any = self.proj.vis[4]
        target = reference.resize_target(mask, scored.shape[-2:]).expand(-1, kernels.shape[1], -1, -1)
        loss, logits = text_to_pixel_contrastive_loss(
            scored, kernels, target, bias, pointwise_weight=last.weight, pointwise_bias=last.bias
        )
        if self.instance_contrast:
            images, references = origin or (index, None)
            centres = kernels[:, -1].sum((-2, -1))
            contrast = region_contrast(
                scored,
                centres,
                mask,
                known=known,
                image_ids=images,
                ref_ids=references,
                pointwise_weight=last.weight,
                pointwise_bias=last.bias,
            )
            loss = loss + self.instance_contrast * contrast
        return loss, logits[:, -1:]

    def _kernels(self, decoded: Decoded, all_outputs: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The projector's map before its 1x1 convolution (E, C, H/4, W/4), and the text kernels (E, Q, C, k, k) and
        biases (E, Q) that score it: Q is 1, or with a centre embedding and ``all_outputs`` all of its outputs.
        """
        proj: Any = self.proj
        half, features = block_maps(proj.vis, decoded.pixels)
        made = proj.txt(decoded.state)[:, None]
        if self.centre is not None:
            maps = (F.avg_pool2d(decoded.pixels, 2), decoded.pixels, half)
            made = made + self.centre.corrections(decoded.words, decoded.valid, maps, all_outputs)
        return features, made[..., :-1].unflatten(2, (proj.in_dim, proj.kernel_size, proj.kernel_size)), made[..., -1]

    def _decode(self, features: Features, tokens: Tensor, index: Tensor | None, hides: bool = False) -> Decoded:
        """Encode the text and run neck and decoder, and where pixels and words exchange, that.

        ``hides`` encodes the sentences with hidden words, too, of which nothing reaches the rest.
        """
        self._check_features(features)
        _check_tokens(tokens, self.config)
        check_index(index, features[0].shape[0], tokens.shape[0])
        tokens = without_shared_padding(tokens)
        if hides and not isinstance(features, GroundingFeatures):
            raise TypeError(
                "features were encoded in eval mode, and with mask_grounding the loss reads C5 as well; call "
                "encode_image in training mode"
            )
        features, hidden = features.select(index), None
        if isinstance(features, Pixels):
            maps, words, state = self._encode_together(features.images, tokens)
            features = self._projected(maps)
        else:
            words, state, hidden = self._encode_text(tokens, hides)
        if self.config.vlba != "neck":
            fused = recomputed([self.neck], self.recompute, self._fuse, state, *features[:3])
        else:
            parts = [self.neck, self.vlba]
            fused, words, state = recomputed(
                parts, self.recompute, self._exchange_and_fuse, words, tokens, *features[:3]
            )
        decoded = self.decoder(fused, words, tokens == 0)
        if isinstance(decoded, list):
            decoded = decoded[-1]
        return Decoded(decoded.reshape(fused.shape), words, tokens != 0, state, tokens, hidden)

    def _encode_text(self, tokens: Tensor, hides: bool) -> tuple[Tensor, Tensor, HiddenWords | None]:
        """Words, sentences and, if any words are to be hidden, the sentences without them, from one pass."""
        if not hides:
            return *self.backbone.encode_text(tokens), None
        assert self.grounding is not None and self.grounding.mask_embedding is not None
        masking = self.grounding.hide(tokens)
        found = self.backbone.encode_text_and_hidden(tokens, masking.hidden, self.grounding.mask_embedding)
        return found[0], found[1], HiddenWords(masking, found[2])

    def _encode_together(self, images: Tensor, tokens: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """C3, C4, C5, the words and the sentences' states of images (E, 3, H, W) and tokens (E, L), for each phrase."""
        if self.cam is not None:
            return encode_aligned(self.backbone, self.cam, images, tokens)
        words, _ = self.backbone.encode_text(tokens)
        maps, words = encode_with_words(self.backbone.visual, self.vlba, images, words, tokens != 0)
        return maps, words, self.backbone.sentence(words, tokens)

    def _projected(self, maps: tuple[Tensor, ...]) -> ImageFeatures:
        return ImageFeatures(*recomputed([self.neck], self.recompute, self._project, *maps))

    def _project(self, *maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.neck.project(maps)

    def _fuse(self, state: Tensor, *projected: Tensor) -> Tensor:
        return self.neck.fuse(projected, state)

    def _exchange_and_fuse(self, words: Tensor, tokens: Tensor, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The neck's map, the words and the sentences' states after the exchanges on the projected maps."""
        maps = []
        for exchange, each in zip(self.vlba, projected, strict=True):
            each, words = exchange(each, words, tokens != 0)
            maps.append(each)
        state = self.backbone.sentence(words, tokens)
        return self.neck.fuse(maps, state), words, state

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run CLIP's text encoder on token ids (E, L): the words (E, L, C) and the sentences' states (E, S)."""
        _check_tokens(tokens, self.config)
        return self.backbone.encode_text(tokens)

    @property
    def asks_known(self) -> bool:
        """Where the instance contrast or the alignment loss is on."""
        return bool(self.instance_contrast or self.cal is not None)

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

    def _check_features(self, features: Any) -> None:
        encoded = (ImageFeatures, GroundingFeatures)
        if isinstance(features, encoded if self.shares_image else Pixels):
            return
        if isinstance(features, encoded):
            raise TypeError(
                "features are of images that were encoded once for all phrases, and with "
                f"{self.config.trunk_switch}='trunk' the image encoder hears each phrase; give what this model's "
                "encode_image returns"
            )
        raise TypeError(f"features must be what encode_image returns, got {type(features).__name__}")

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
        return f"{self.config.title} on {keys.architecture(self.state_dict())}{self.config.switches_in_words()}"


def _check_images(images: Tensor, weights: torch.dtype) -> None:
    check_images(images, weights, "CLIP's", multiple=32)


def _check_tokens(tokens: Tensor, config: CRISConfig) -> None:
    check_tokens(tokens, config.clip.context_length, config.clip.vocab_size, "CLIP knows positions for")

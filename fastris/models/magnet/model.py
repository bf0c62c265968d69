"""MagNet (Mask Grounding, CVPR 2024, arXiv 2312.12198): two encoders that look at each other, and one query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.models.arguments import check_images, check_index, check_mask, check_tokens, without_shared_padding
from fastris.models.base import HEAD, NO_DECAY, Origin, Pixels, ReferringModel, checked_pixels
from fastris.models.encoders import swin_name
from fastris.models.magnet import keys
from fastris.models.magnet.config import MagNetConfig
from fastris.models.magnet.encoders import Encoded, ImageModel, LanguageModel, encode
from fastris.models.magnet.pixel_decoder import PixelDecoder
from fastris.models.magnet.query_decoder import MaskDecoder
from fastris.models.magnet.training_parts import Alignment, SentenceGrounding
from fastris.models.state_dicts import Adopted
from fastris.models.training_metrics import TrainingMetrics
from fastris.nn.recompute import check_setting
from fastris.ops.similarity import text_to_pixel_similarity


class Scored(NamedTuple):
    """What a batch's phrases came to.

    Attributes:
        logits: masks (E, P, H/4, W/4) of P predictions, the last one final.
        queries: (E, P, D), the normed queries behind them, which ``class_embed`` takes.
        features: the map (E, D, H/4, W/4) before the 1x1 convolution ``mask_features``, which is folded into the
            masks' kernels: the mask features themselves are never computed.
    """

    logits: Tensor
    queries: Tensor
    features: Tensor


class Classifier(nn.Module):
    """The two decoders."""

    def __init__(self, config: MagNetConfig):
        super().__init__()
        width, heads = config.conv_dim, config.decoder_heads
        self.pixel_decoder = PixelDecoder(config.widths, width, config.pixel_layers, config.pixel_ffn, heads)
        self.predictor = MaskDecoder(width, config.query_layers, config.query_ffn, heads)

    def forward(self, maps: tuple[Tensor, ...], all_outputs: bool) -> Scored:
        """Score every pixel of four maps (E, C, h, w): by all predictions, or by the last only."""
        levels, pixels = self.pixel_decoder(maps)
        conv = self.pixel_decoder.mask_features
        queries, kernels = self.predictor(levels, pixels, conv)
        if not all_outputs:
            queries, kernels = queries[:, -1:], kernels[:, -1:]
        logits = text_to_pixel_similarity(
            pixels, kernels[..., None, None], pointwise_weight=conv.weight, pointwise_bias=conv.bias
        )
        return Scored(logits, queries, pixels)


class MagNet(TrainingMetrics, ReferringModel, tags=["magnet"]):
    """MagNet with the released state-dict keys and values.

    Words and pixels change each other between the stages of their encoders, so an image is encoded anew for each
    phrase: :meth:`encode_image` returns the pixels. ``model(img, word, mask)`` answers as :class:`ReferringModel` says,
    with logits of the image's own size (B, 1, H, W); images may have any size, and are released for 480x480, squashed.
    Token ids are BERT's, 0 is padding; L may be up to ``word_len``.
    """

    config_class = MagNetConfig
    shares_image = False
    starts: ClassVar[Mapping[str, tuple[str, str]]] = {
        "swin_pretrain": ("Swin's", "image_model."),
        "bert_pretrain": ("BERT's", "language_model."),
    }
    recompute = "none"

    config: MagNetConfig

    def __init__(self, config: MagNetConfig):
        super().__init__(config)
        config = self.config
        rule: Any = config.language_mask
        self.image_model = ImageModel(
            config.embed_dim, config.depths, config.num_heads, config.window, config.drop_path, config.text_width
        )
        self.language_model = LanguageModel(config.bert, config.widths, rule)
        self.classifier = Classifier(config)
        self.lang_proj = nn.Linear(config.text_width, config.conv_dim)
        self.grounding = SentenceGrounding(config) if config.mask_grounding else None
        self.cal = Alignment() if config.alignment_loss else None
        # What is in the files and nothing trains has no gradient to wait for.
        self.classifier.predictor.class_embed.requires_grad_(False)
        self.lang_proj.requires_grad_(bool(config.alignment_loss))
        self.language_model.ask_last_words(bool(config.mask_grounding or config.alignment_loss))

    def set_recompute(self, setting: str) -> MagNet:
        """Trade time for memory in training; returns the model. Weights, numbers and eval mode stay as they are.

        ``"none"`` keeps what autograd keeps, but of the pixel decoder's layers, which always keep little.
        ``"pointwise"`` keeps the products of Swin's blocks and of the exchanges between pixels and words, and computes
        norms, GELU, softmax and the rest again in the backward pass; ``"stages"`` keeps the input of each of these
        alone, and of each of the pixel decoder's layers. Of BERT's parts both keep the input alone. See
        :mod:`fastris.nn.recompute`. Raises ValueError for any other setting.
        """
        encoder = self.classifier.pixel_decoder.transformer.encoder
        parts: list[Any] = [self, self.language_model, encoder, *([self.grounding] if self.grounding else [])]
        for part in parts:
            part.recompute = check_setting(setting)
        return self

    def encode_image(self, images: Tensor) -> Pixels:
        """The images (B, 3, H, W) as they are, normalised as ImageNet's, after their checks."""
        check_images(images, self.lang_proj.weight.dtype, "ImageNet's")
        return Pixels(images)

    def segment(self, features: Pixels, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (E, 1, H, W) of the expressions ``tokens`` (E, L) about images; ``index`` (E,) as for all models."""
        scored = self.score(features, tokens, index, all_outputs=False)
        logits = _resized(scored.logits, features.images.shape[-2:])
        if self.config.class_score == "off":
            return logits
        classes = self.classifier.predictor.class_embed(scored.queries[:, -1])
        return _times(logits, classes.to(logits.dtype).log_softmax(-1)[:, 1, None, None, None])

    def loss(
        self,
        features: Pixels,
        tokens: Tensor,
        mask: Tensor,
        index: Tensor | None = None,
        origin: Origin | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, logits (E, 1, H, W) of the last prediction).

        The loss is the mean, over all predictions, of 2 BCE + 2 Dice at the images' size; see
        :func:`fastris.reference.upsampled_bce_and_dice`. In training mode ``mask_grounding`` and ``alignment_loss``
        times their losses are added; see :mod:`fastris.models.magnet.training_parts`.
        """
        check_mask(mask, len(features.images), len(tokens))
        images, tokens = self._matched(features, tokens, index)
        hidden = self.grounding.hide(tokens) if self.training and self.grounding is not None else None
        twice = self.config.clean_segmentation
        heard = tokens if hidden is None or twice else hidden.masked
        cal = self.cal if self.training else None
        encoded = self._encode(images, heard, last_words=cal is not None or (hidden is not None and not twice))
        scored = self.classifier(encoded.maps, all_outputs=True)
        size = images.shape[-2:]
        loss = reference.upsampled_bce_and_dice(scored.logits, reference.resize_target(mask, size))
        if cal is not None:
            left_out = None if hidden is None or twice else hidden.masking.selected.any(1)
            with torch.autocast(images.device.type, enabled=False):
                features = self.classifier.pixel_decoder.mask_features(scored.features)
            alignment = cal(features, encoded, self.lang_proj, tokens, mask, left_out, known)
            loss = loss + self.config.alignment_loss * alignment
        if hidden is not None:
            assert self.grounding is not None
            encoded = self._encode(images, hidden.masked, last_words=True) if twice else encoded
            embedding = self.language_model.embeddings.word_embeddings.weight
            loss = loss + self.config.mask_grounding * self.grounding.loss(hidden, encoded, mask, embedding)
        return loss, _resized(scored.logits[:, -1:], size)

    def score(self, features: Pixels, tokens: Tensor, index: Tensor | None = None, all_outputs: bool = True) -> Scored:
        """What all (or only the last) of the predictions make of the images; arguments as for :meth:`segment`."""
        return self.classifier(self._encode(*self._matched(features, tokens, index)).maps, all_outputs)

    def _matched(self, features: Pixels, tokens: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image of each expression (E, 3, H, W), and its tokens (E, L) at the length that they are encoded at."""
        check_index(index, checked_pixels(features).images.shape[0], tokens.shape[0])
        return features.select(index).images, self._fitted(tokens)

    def _encode(self, images: Tensor, tokens: Tensor, last_words: bool = False) -> Encoded:
        return encode(self.image_model, self.language_model, images, tokens, self.recompute, last_words)

    def _fitted(self, tokens: Tensor) -> Tensor:
        """Trimmed to the longest sentence where padding changes nothing; elsewhere padded to ``word_len``."""
        check_tokens(tokens, self.config.word_len, self.config.bert.vocab_size, "this model takes")
        if self.config.language_mask == "masked":
            return without_shared_padding(tokens)
        return F.pad(tokens, (0, self.config.word_len - tokens.shape[1]))

    def check_training(self, expressions: int) -> None:
        """Also refuses ``class_score=on``: no loss would train the head whose probability is then multiplied in."""
        super().check_training(expressions)
        if self.config.class_score == "on":
            raise ValueError("class_score=on cannot be trained, because no loss reaches the class head; use off")

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All that are trained, at one learning rate; norms and tables of relative positions without weight decay."""
        exempt = {
            id(parameter)
            for module in self.modules()
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm))
            for parameter in module.parameters()
        }
        groups: dict[str, list[nn.Parameter]] = {HEAD: [], HEAD + NO_DECAY: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                kept = id(parameter) in exempt or name.endswith("relative_position_bias_table")
                groups[HEAD + NO_DECAY if kept else HEAD].append(parameter)
        return groups

    @classmethod
    def adopt(cls, state: Mapping[str, Tensor]) -> Adopted | None:
        """Swin's weights, renamed for the ``image_model``, or BERT's for the ``language_model``; None for others."""
        return keys.adopt_encoder(state)

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor]) -> MagNetConfig:
        """See :func:`fastris.models.magnet.keys.infer_config`."""
        return keys.infer_config(state)

    @classmethod
    def encoder_of(cls, state: Mapping[str, Tensor]) -> str:
        """The name of the Swin that these weights belong to."""
        return keys.architecture(state)

    def in_words(self) -> str:
        """The model and its encoder, such as ``MagNet on Swin-B``."""
        return f"{self.config.title} on {swin_name(self.config.embed_dim, self.config.depths)}"


def _resized(logits: Tensor, size: torch.Size) -> Tensor:
    """(E, P, h, w) at the images' size with aligned corners, in float32 where they came in half precision."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(wide, tuple(size), mode="bilinear", align_corners=True)


def _times(logits: Tensor, log_probability: Tensor) -> Tensor:
    """The logit of sigmoid(logits) times a probability below 1, given its logarithm."""
    log_score = F.logsigmoid(logits) + log_probability
    return log_score - torch.log1p(-log_score.exp())

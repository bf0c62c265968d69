"""The base class of all models: the interface that prediction, training, evaluation, saving and loading use.

A new system needs a dataclass derived from :class:`fastris.models.config.ModelConfig`, a class derived from
:class:`ReferringModel` and a row in :mod:`fastris.models.registry`. The class must implement ``segment``, and
``encode_image`` unless its image encoding depends on the phrase; every other method has a default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from fastris.models.ancestry import Ancestor, saved_card
from fastris.models.arguments import check_is_tensor, check_known, check_mask
from fastris.models.config import ModelConfig
from fastris.models.pretrained import CARD, SAFETENSORS, load_pretrained
from fastris.models.state_dicts import Adopted
from fastris.reference import resize_target
from fastris.runtime.safetensors_files import write_safetensors
from fastris.runtime.storage import replacing

HEAD = "head"
"""The parameter group that trains at the full learning rate; all others train at ``lr_multi`` times that rate."""

NO_DECAY = ", no decay"
"""What the name of a parameter group ends with where weight decay leaves it alone; its learning rate is the same."""

M = TypeVar("M", bound="ReferringModel")


class Pixels(NamedTuple):
    """Unencoded images (B, 3, H, W): what ``encode_image`` returns for a model whose encoder depends on the phrase."""

    images: Tensor

    def select(self, index: Tensor | None) -> Pixels:
        """The images at the positions ``index`` (E,), in that order; all images for None."""
        return self if index is None else Pixels(self.images[index])


def checked_pixels(features: object) -> Pixels:
    """``features``, of a system that encodes an image anew for each phrase. Raises TypeError for anything else."""
    if not isinstance(features, Pixels):
        raise TypeError(f"features must be what encode_image returns, got {type(features).__name__}")
    return features


class Origin(NamedTuple):
    """Where a batch's expressions come from, (E,) int64 each: the numbers of their image and of their reference.

    Equal numbers mean the same; which numbers they are says nothing. Several sentences may be of one reference.
    """

    images: Tensor
    references: Tensor

    def chunk(self, parts: int) -> list[Origin]:
        """Split as :meth:`torch.Tensor.chunk` splits the batch."""
        return [Origin(*pair) for pair in zip(self.images.chunk(parts), self.references.chunk(parts), strict=True)]


class ReferringModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="fastris",
    tags=["referring-image-segmentation"],
    pipeline_tag="image-segmentation",
):
    """Base class of a referring image segmentation model: images and phrases in, mask logits out.

    ``model(img, word, mask)`` returns what the published CRIS returns: in training mode ``(pred.detach(), target,
    loss)``, where ``target`` is the mask at the logits' size; in eval mode the logits (B, 1, h, w), detached.

    To encode an image once for several expressions, call the two halves::

        features = model.encode_image(images)               # (B, 3, H, W) -> something with .select(index)
        logits = model.segment(features, tokens, index)     # tokens (E, L), index (E,): the image of each expression

    Attributes:
        config_class: the class of its configuration, derived from :class:`fastris.models.config.ModelConfig`.
        shares_image: whether one encoding of an image serves every phrase. If False, :meth:`encode_image` returns the
            pixels unchanged and :meth:`segment` encodes them once per expression; the calls are the same either way.
            Where it depends on the configuration, an instance has its own.
        contrasts_instances: whether its loss can contain the instance contrast.
        instance_contrast: weight of the instance contrast in the loss, see
            :func:`fastris.reference.region_contrast`; 0 leaves it out.
        starts: by option of ``fastris train``, the other model whose weights :meth:`adopt` accepts, such as "CLIP's",
            and the prefix of the part that starts from them.
        ancestry: what its weights were loaded from, for its card.
    """

    config_class: ClassVar[type[ModelConfig]]
    shares_image: bool = True
    contrasts_instances: ClassVar[bool] = False
    instance_contrast: float = 0.0
    starts: ClassVar[Mapping[str, tuple[str, str]]] = {}
    ancestry: tuple[Ancestor, ...] = ()

    config: Any

    def __init__(self, config: Any):
        super().__init__()
        kind = self.config_class
        if isinstance(config, Mapping):  # as huggingface_hub hands over the contents of config.json
            config = kind.from_dict(config, source="config.json")
        if not isinstance(config, kind):
            presets = kind.presets or ("NAME",)
            raise TypeError(
                f'config must be a {kind.__name__} such as {kind.__name__}.preset("{next(iter(presets))}"), '
                f"got {type(config).__name__}"
            )
        self.config = config

    # Segmenting.

    def encode_image(self, images: Tensor) -> Any:
        """Encode images (B, 3, H, W) without any text. The result's ``select(index)`` repeats and reorders images."""
        if self.shares_image:
            raise NotImplementedError(f"{type(self).__name__} must define encode_image, or say shares_image = False")
        return Pixels(images)

    def encode_text(self, tokens: Tensor) -> Any:
        """Encode token ids (E, L) without any image. Raises NotImplementedError where the model cannot."""
        raise NotImplementedError(f"{type(self).__name__} has no text encoding that stands alone; call segment")

    def segment(self, features: Any, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (E, 1, h, w) of the expressions ``tokens`` (E, L) about encoded images.

        ``index`` (E,) int64 says which image each expression belongs to; without it they correspond one to one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define segment")

    # Training.

    def loss(
        self,
        features: Any,
        tokens: Tensor,
        mask: Tensor,
        index: Tensor | None = None,
        origin: Origin | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (scalar loss, logits (E, 1, h, w)). Arguments as for :meth:`segment`, plus the masks (E, 1, H, W).

        ``origin`` tells which expressions are about the same image or reference, for losses that compare expressions
        with each other; ``known`` (E, 1, H, W), 0 on a letterbox's border, for losses that look at the background, and
        comes only where the model :attr:`asks_known`. The default is the mean binary cross-entropy over all pixels and
        expressions, with the masks resized to the logits.
        """
        logits = self.segment(features, tokens, index)
        target = resize_target(mask, logits.shape[-2:]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target), logits

    @property
    def asks_known(self) -> bool:
        """Whether training shall tell its loss what of the images is no border of a letterbox; see :meth:`loss`."""
        return False

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by group: "head" trains at the full learning rate, every other at ``lr_multi`` times it.

        A name that ends with :data:`NO_DECAY` belongs to the group before it, without weight decay. A parameter in no
        group is never updated.
        """
        return {HEAD: list(self.parameters())}

    def check_training(self, expressions: int) -> None:
        """Raise ValueError if a batch of this number of ``expressions`` is too small for a training step."""
        if expressions == 0:
            raise ValueError("word holds no expressions, so there is no loss; give at least two in training mode")

    def forward(
        self,
        img: Tensor,
        word: Tensor,
        mask: Tensor | None = None,
        origin: Origin | None = None,
        known: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """As described in the class. ``img`` (B, 3, H, W), ``word`` (B, L) int64, ``mask`` (B, 1, H, W).

        With K expressions about each image, ``word`` is (B, K, L) and ``mask`` (B, K, 1, H, W). Each image is encoded
        once, and the results have B*K entries, ordered image by image, as ``origin`` has, too.
        ``known`` (B, 1, H, W) has one of each image.
        """
        check_is_tensor("word", word)
        index, word, mask = _flatten_expressions(word, mask)
        if not self.training:
            return self.segment(self.encode_image(img), word, index).detach()
        check_is_tensor("img", img)
        check_mask(mask, len(img), len(word))
        self.check_training(len(word))
        assert mask is not None
        told: dict[str, Any] = {} if origin is None else {"origin": origin}
        if known is not None:
            check_known(known, len(img))
            told["known"] = known if index is None else known[index]
        loss, logits = self.loss(self.encode_image(img), word, mask, index, **told)
        return logits.detach(), resize_target(mask, logits.shape[-2:]), loss

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What a training step tells of itself besides its loss; see :meth:`take_metrics`."""
        return ()

    def take_metrics(self) -> dict[str, float]:
        """The numbers named in ``metric_names``, of the forward passes in training mode since the last call.

        Where several processes train, all of them call it, and get the numbers of them all.
        """
        return {}

    def metrics_state(self) -> dict[str, Tensor]:
        """What a resumed run has to know to go on with its metrics; empty where there is nothing."""
        return {}

    def restore_metrics(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`metrics_state` returned."""

    # Files.

    def state_for_others(self) -> dict[str, Tensor]:
        """The state dict without the configuration's ``training_parts``, as files for others have it."""
        own = tuple(f"{part}." for part in self.config_class.training_parts)
        state = self.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith(own)} if own else state

    @classmethod
    def recognises(cls, names: Iterable[str]) -> bool:
        """Whether any of these state-dict names begins with one of the system's ``parts``; True if it lists none."""
        parts = tuple(f"{part}." for part in cls.config_class.parts)
        return not parts or any(name.startswith(parts) for name in names)

    @classmethod
    def adopt(cls, state: Mapping[str, Tensor]) -> Adopted | None:
        """Rename another model's weights to the names of the part that starts from them; None for other weights."""
        return None

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor]) -> Any:
        """Derive the configuration from the weights' shapes. Raises ValueError where they do not determine it."""
        raise ValueError(f"these weights carry no configuration, and shapes do not tell a {cls.config_class.title}'s")

    @classmethod
    def encoder_of(cls, state: Mapping[str, Tensor]) -> str:
        """A short name of the image encoder that these weights belong to, for messages; empty if unknown."""
        return ""

    def in_words(self) -> str:
        """A short description of the model, for messages."""
        return self.config.in_words()

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        strict: bool = True,
        config: Any = None,
        map_location: str | torch.device = "cpu",
        **download: Any,
    ) -> M:
        """Load a model from a folder or a Hugging Face id, in eval mode; ``config`` replaces the stored configuration.

        ``download`` goes to huggingface_hub: ``revision``, ``token``, ``cache_dir``, ``force_download``,
        ``local_files_only``. Raises FileNotFoundError where there is no model, ValueError for a file that cannot be
        read and, unless ``strict=False``, WeightsError for weights that do not fit.
        """
        model: Any = load_pretrained(cls, pretrained_model_name_or_path, config, strict, **download)
        return model.to(map_location)

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **options: Any) -> str | None:
        """As in huggingface_hub, without what only training uses.

        The configuration is written as :meth:`ModelConfig.to_dict` returns it. A model that was loaded keeps its card,
        and one that was changed since says so on it; another card that lies in the folder already stays.
        """
        config = config or self.config.for_others().to_dict()
        if not options.get("model_card_kwargs"):
            self._write_card(Path(save_directory) / CARD)
        return super().save_pretrained(save_directory, config=config, **options)

    def _write_card(self, path: Path) -> None:
        text = saved_card(self)
        own = {each.card for each in self.ancestry}
        if not path.exists() or (text not in own and path.read_text(encoding="utf-8", errors="replace") in own):
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights; huggingface_hub's ``save_pretrained`` calls this."""
        write_safetensors(Path(save_directory) / SAFETENSORS, self.state_for_others(), {})


def is_head(group: str) -> bool:
    """Whether a parameter group of this name trains at the full learning rate."""
    return group.removesuffix(NO_DECAY) == HEAD


def _flatten_expressions(word: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Flatten (B, K, ...) expressions to (index (E,), word (E, L), mask (E, 1, H, W)), E = B*K.

    ``index`` is None where ``word`` is already (E, L), one expression per image.
    """
    if word.ndim != 3:
        return None, word, mask
    images, per_image = word.shape[:2]
    index = torch.arange(images, device=word.device).repeat_interleave(per_image)
    if mask is not None and mask.ndim == 5:
        mask = mask.flatten(0, 1)
    return index, word.flatten(0, 1), mask

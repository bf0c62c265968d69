"""CRIS's configuration: its dataclasses, the published presets, and reading the published YAML files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastris.models.config import ModelConfig, warn_of_unknown
from fastris.models.cris.kept_tokens import check_kept_tokens
from fastris.models.inputs import CLIP_INPUTS, Inputs
from fastris.models.limits import SIZES, check_fields, check_parameters, whole_numbers
from fastris.options.values import shown

CLIP_PRESETS: dict[str, dict[str, Any]] = {
    "RN50": {"embed_dim": 1024, "vision_layers": (3, 4, 6, 3)},
    "RN101": {"embed_dim": 512, "vision_layers": (3, 4, 23, 3)},
    "RN50x4": {
        "embed_dim": 640,
        "image_resolution": 288,
        "vision_layers": (4, 6, 10, 6),
        "vision_width": 80,
        "transformer_width": 640,
        "transformer_heads": 10,
    },
    "RN50x16": {
        "embed_dim": 768,
        "image_resolution": 384,
        "vision_layers": (6, 8, 18, 8),
        "vision_width": 96,
        "transformer_width": 768,
        "transformer_heads": 12,
    },
}

CRIS_PRESETS: dict[str, dict[str, Any]] = {
    "cris_r50": {"clip": CLIP_PRESETS["RN50"]},
    "cris_r101": {"clip": CLIP_PRESETS["RN101"], "word_dim": 512, "fpn_in": (512, 1024, 512)},
    "tiny": {
        "clip": {
            "embed_dim": 128,
            "vision_layers": (1, 1, 1, 1),
            "image_resolution": 96,
            "vision_width": 16,
            "transformer_width": 64,
            "transformer_heads": 1,
            "transformer_layers": 1,
        },
        "word_dim": 128,
        "vis_dim": 64,
        "fpn_in": (128, 256, 128),
        "fpn_out": (64, 64, 128),
        "num_layers": 2,
        "num_head": 4,
        "dim_ffn": 128,
        "dropout": 0.0,
        "input_size": 96,
    },
}
"""``cris_r50`` and ``cris_r101`` as published; ``tiny`` trains on a laptop's CPU in minutes."""

_CLIP_LIMITS = {
    "embed_dim": 16384,
    "image_resolution": 4096,
    "vision_width": 1024,
    "context_length": 4096,
    "vocab_size": 1_000_000,
    "transformer_width": 16384,
    "transformer_heads": 1024,
    "transformer_layers": 128,
}
_MAX_BLOCKS = 128  # of one stage of the ResNet; RN50x64 has 36
_MAX_WIDTH = 16384  # of the neck's maps

VLBA = ("off", "neck", "trunk")
"""Where pixels and words exchange; see :mod:`fastris.models.cris.vlba`."""
HEADS = 8
"""Heads of the centre embedding's attention, as published, and of Mask Grounding's predictor."""
ALIGNMENT_WIDTH = 256
"""Width in which the alignment loss compares pixels and sentences."""
_GROUNDING: dict[str, Any] = {"mask_grounding": 0.0, "mask_rate": 0.15, "predictor_layers": 4, "whole_words": True}
_TRAINING: dict[str, Any] = {**_GROUNDING, "alignment_loss": 0.0}
ALIGNMENT_MODULE = ("off", "trunk")
"""Where MagNet's alignment module is; see :mod:`fastris.models.cris.cam`."""
_SWITCHES: dict[str, Any] = {"vlba": "off", "centre_layers": 0, "alignment_module": "off", **_TRAINING}
_OPTIONAL: dict[str, Any] = {**_SWITCHES, "kept_tokens": ()}


@dataclass
class CLIPConfig:
    """Dimensions of the CLIP model behind the two encoders. The defaults are those that RN50 and RN101 share."""

    embed_dim: int
    vision_layers: tuple[int, ...]
    image_resolution: int = 224
    vision_width: int = 64
    context_length: int = 77
    vocab_size: int = 49408
    transformer_width: int = 512
    transformer_heads: int = 8
    transformer_layers: int = 12

    def __post_init__(self) -> None:
        self.vision_layers = whole_numbers("clip.vision_layers", self.vision_layers, 4, _MAX_BLOCKS)
        check_fields(self, _CLIP_LIMITS, "clip.")
        if self.transformer_width % self.transformer_heads:
            raise ValueError(
                f"clip.transformer_width ({self.transformer_width}) must be divisible by "
                f"clip.transformer_heads ({self.transformer_heads})"
            )

    @classmethod
    def preset(cls, name: str) -> CLIPConfig:
        """CLIP's own sizes by name: RN50, RN101, RN50x4, RN50x16."""
        if name not in CLIP_PRESETS:
            raise ValueError(f"unknown CLIP model {name!r}; known ResNets are {', '.join(CLIP_PRESETS)}")
        return cls(**CLIP_PRESETS[name])

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> CLIPConfig:
        """Build from a plain mapping. Raises ValueError, naming the keys, where some are unknown or missing."""
        names = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(mapping) - set(names)))
        missing = sorted(name for name, needed in names.items() if needed and name not in mapping)
        if unknown or missing:
            shown_keys = [key[:40] for key in unknown[:10]]
            raise ValueError(f"clip has unknown keys {shown_keys} and lacks {missing}; its keys are {', '.join(names)}")
        return cls(**mapping)


@dataclass
class CRISConfig(ModelConfig):
    """Dimensions of a CRIS model, under the names of the published YAML files, plus ``clip``.

    ``word_len`` is the number of tokens that a sentence is cut to, ``input_size`` the side in pixels of the letterboxed
    square that the model was trained on; the model itself takes any H and W divisible by 32 and any L up to
    ``clip.context_length``. Raises ValueError, naming the fields, when the dimensions do not fit together.

    Two switches add parts of AlignFormer, which start so that the model computes what CRIS computes: ``vlba`` is the
    place of attention between pixels and words in both directions, "neck" or "trunk" (:mod:`fastris.models.cris.vlba`),
    ``centre_layers`` the depth of a centre embedding, 3 or 6 (:mod:`fastris.models.cris.centre`). "off" and 0 leave
    them out. ``alignment_module`` is MagNet's, "trunk" or "off" (:mod:`fastris.models.cris.cam`).

    Two more add losses and parts that only training uses (:mod:`fastris.models.cris.training_parts`), each the weight
    of its loss, 0 leaves it out: ``mask_grounding`` with ``mask_rate``, the probability with which a word is hidden,
    ``predictor_layers``, and ``whole_words``, whether the pieces of a word are hidden together (where the vocabulary is
    CLIP's own, which says where words end); and ``alignment_loss``. They are off in files for others.

    ``kept_tokens`` are the ids of CLIP's tokens that the model has embeddings of, where it has not all of them
    (:mod:`fastris.models.cris.kept_tokens`).
    """

    system: ClassVar[str] = "cris"
    title: ClassVar[str] = "CRIS"
    published: ClassVar[str] = "CVPR 2022, arXiv 2111.15174"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = CRIS_PRESETS
    parts: ClassVar[tuple[str, ...]] = ("backbone", "neck", "decoder", "proj")
    added_parts: ClassVar[tuple[str, ...]] = ("vlba", "centre", "cam", "grounding", "cal")
    training_parts: ClassVar[tuple[str, ...]] = ("grounding", "cal")
    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "stem": tuple(f"backbone.visual.{kind}{number}" for number in (1, 2, 3) for kind in ("conv", "bn")),
        **{f"layer{number}": (f"backbone.visual.layer{number}",) for number in (1, 2, 3, 4)},
        "text": tuple(
            f"backbone.{name}"
            for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
        ),
    }
    not_in_shapes: ClassVar[tuple[str, ...]] = ("num_head", "word_len", "input_size", "dropout")
    published_yaml: ClassVar[str] = "config/refcoco/cris_r50.yaml"
    # fmt: off
    published_besides: ClassVar[frozenset[str]] = frozenset({
        "dataset", "train_lmdb", "train_split", "val_lmdb", "val_split", "mask_root", "test_split", "test_lmdb",
        "visualize", "sync_bn", "workers", "workers_val", "epochs", "milestones", "start_epoch", "batch_size",
        "batch_size_val", "base_lr", "lr_decay", "lr_multi", "weight_decay", "max_norm", "manual_seed", "print_freq",
        "exp_name", "output_folder", "save_freq", "weight", "resume", "evaluate", "dist_url", "dist_backend",
        "multiprocessing_distributed", "world_size", "rank",
    })
    # fmt: on
    limits: ClassVar[Mapping[str, int]] = {
        "word_len": SIZES["word_len"],
        "word_dim": 16384,
        "vis_dim": 16384,
        "num_layers": 128,
        "num_head": 1024,
        "dim_ffn": 131072,
    }

    clip: CLIPConfig
    word_len: int = 17
    word_dim: int = 1024
    vis_dim: int = 512
    fpn_in: tuple[int, ...] = (512, 1024, 1024)
    fpn_out: tuple[int, ...] = (256, 512, 1024)
    num_layers: int = 3
    num_head: int = 8
    dim_ffn: int = 2048
    dropout: float = 0.1
    intermediate: bool = False
    input_size: int = 416
    vlba: str = "off"
    centre_layers: int = 0
    alignment_module: str = "off"
    mask_grounding: float = 0.0
    mask_rate: float = 0.15
    predictor_layers: int = 4
    whole_words: bool = True
    alignment_loss: float = 0.0
    kept_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.clip, Mapping):
            self.clip = CLIPConfig.from_dict(self.clip)
        if not isinstance(self.clip, CLIPConfig):
            raise ValueError(f"clip must be a CLIPConfig or a mapping of its fields, got {shown(self.clip)}")
        self.fpn_in = whole_numbers("fpn_in", self.fpn_in, 3, 32 * _MAX_WIDTH)
        self.fpn_out = whole_numbers("fpn_out", self.fpn_out, 3, _MAX_WIDTH)
        check_fields(self, {**self.limits, **SIZES})
        self.kept_tokens = check_kept_tokens(self.kept_tokens, self.clip.vocab_size)
        self._validate()
        self._validate_switches()
        self._validate_training_switches()
        check_parameters(self.parameter_counts())

    def _validate_switches(self) -> None:
        for name, places in (("vlba", VLBA), ("alignment_module", ALIGNMENT_MODULE)):
            if getattr(self, name) is False:  # what YAML makes of a bare off
                setattr(self, name, "off")
            if getattr(self, name) not in places:
                raise ValueError(f"{name} must be one of {', '.join(places)}, got {shown(getattr(self, name))}")
        if self.vlba == self.alignment_module == "trunk":
            raise ValueError(
                "vlba=trunk and alignment_module=trunk both change what the same stages pass on; choose one of them, "
                "or give vlba=neck"
            )
        layers = self.centre_layers
        if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= _MAX_BLOCKS:
            raise ValueError(f"centre_layers must be a whole number from 0 (off) to {_MAX_BLOCKS}, got {shown(layers)}")
        if layers and self.vis_dim % HEADS:
            raise ValueError(
                f"vis_dim ({self.vis_dim}) must be divisible by {HEADS}, the heads of the centre embedding; change it, "
                "or give centre_layers=0"
            )

    def _validate_training_switches(self) -> None:
        for name in ("mask_grounding", "alignment_loss"):
            value = getattr(self, name)
            if value is False:  # what YAML makes of a bare off
                setattr(self, name, 0.0)
            elif not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be the weight of a loss, 0 (off) or more, got {shown(value)}")
        if not _is_number(self.mask_rate) or not 0 < self.mask_rate <= 1:
            raise ValueError(f"mask_rate must be a probability above 0 and at most 1, got {shown(self.mask_rate)}")
        layers = self.predictor_layers
        if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= _MAX_BLOCKS:
            raise ValueError(f"predictor_layers must be a whole number from 1 to {_MAX_BLOCKS}, got {shown(layers)}")
        if not isinstance(self.whole_words, bool):
            raise ValueError(f"whole_words must be true or false, got {shown(self.whole_words)}")
        self._validate_grounding()

    def _validate_grounding(self) -> None:
        if not self.mask_grounding:
            idle = [name for name, default in _GROUNDING.items() if getattr(self, name) != default]
            if idle:
                raise ValueError(
                    f"{idle[0]}={getattr(self, idle[0])} would do nothing without mask_grounding; give that a "
                    f"weight such as 1.0, or leave {idle[0]} out"
                )
            return
        if self.trunk_switch:
            raise ValueError(
                "mask_grounding needs an encoding of the image that has not heard the sentence, and with "
                f"{self.trunk_switch}=trunk the image encoder hears every word that is to be guessed; leave one of "
                "them out, or give vlba=neck"
            )
        if self.clip.transformer_width % HEADS:
            raise ValueError(
                f"clip.transformer_width ({self.clip.transformer_width}) must be divisible by {HEADS}, the heads of "
                "Mask Grounding's predictor; change it, or give mask_grounding=0"
            )

    @property
    def inputs(self) -> Inputs:  # type: ignore[override]  # a class attribute elsewhere; here kept_tokens decide
        """CLIP's, with the tokens that the model knows."""
        kept = ",".join(map(str, self.kept_tokens))
        return dataclasses.replace(CLIP_INPUTS, tokenizer=f"clip:{kept}") if kept else CLIP_INPUTS

    @property
    def vlba_widths(self) -> tuple[int, ...]:
        """Widths of the maps that exchange with the words, in the order in which they do."""
        stages = tuple(self.clip.vision_width * 4 * 2**stage for stage in range(4))
        return {"off": (), "neck": self.fpn_out, "trunk": stages}[self.vlba]

    @property
    def trunk_switch(self) -> str:
        """The switch that makes the image encoder hear the words; empty where none does."""
        return next((name for name in ("vlba", "alignment_module") if getattr(self, name) == "trunk"), "")

    @property
    def alignment_widths(self) -> tuple[int, ...]:
        """Widths of the maps that MagNet's alignment module is behind."""
        stages = tuple(self.clip.vision_width * 4 * 2**stage for stage in (1, 2, 3))
        return stages if self.alignment_module == "trunk" else ()

    @property
    def text_outputs(self) -> int:
        """Length of the projected sentence: the text kernel, 3x3, and its bias."""
        return self.vis_dim // 2 * 9 + 1

    def _validate(self) -> None:
        clip = self.clip
        checks = {
            "fpn_in": (self.fpn_in, (clip.vision_width * 8, clip.vision_width * 16, clip.embed_dim)),
            "word_dim": (self.word_dim, clip.embed_dim),
            "vis_dim": (self.vis_dim, clip.transformer_width),
            "fpn_out[1]": (self.fpn_out[1], self.vis_dim),
        }
        for name, (value, needed) in checks.items():
            if value != needed:
                raise ValueError(f"{name} is {value} but must be {needed} to fit the rest of the model ({clip})")
        if self.vis_dim % self.num_head or self.vis_dim % 4:
            raise ValueError(f"vis_dim ({self.vis_dim}) must be divisible by 4 and by num_head ({self.num_head})")
        if not 2 <= self.word_len <= clip.context_length:
            raise ValueError(f"word_len must be between 2 and {clip.context_length}, got {self.word_len}")
        if self.input_size <= 0 or self.input_size % 32:
            raise ValueError(f"input_size must be a positive multiple of 32 pixels, got {self.input_size}")
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {shown(self.dropout)}")
        if not isinstance(self.intermediate, bool):
            raise ValueError(f"intermediate must be true or false, got {shown(self.intermediate)}")

    def parameter_counts(self) -> dict[str, int]:
        """Of the text encoder, the image encoder, the decoder and the neck, and of what the switches add."""
        clip, width = self.clip, self.clip.transformer_width
        pooled = 32 * clip.vision_width
        text = 12 * clip.transformer_layers * width + clip.vocab_size + clip.context_length + clip.embed_dim
        stages = (17 * blocks * (clip.vision_width * 2**stage) ** 2 for stage, blocks in enumerate(clip.vision_layers))
        words = self.vis_dim
        exchanged = sum(8 * size**2 + 7 * words**2 + 3 * size * words for size in self.vlba_widths)
        centre = self.centre_layers * 2 * words * (2 * words + self.dim_ffn) + words * (3 * words + self.text_outputs)
        aligned = sum(19 * size**2 + 6 * words**2 + 6 * size * words for size in self.alignment_widths)
        predictor = self.predictor_layers * 12 * width**2 + clip.embed_dim * width + 2 * width**2 + clip.vocab_size
        pool = pooled * (3 * pooled + 2 * clip.embed_dim + (clip.image_resolution // 32) ** 2)
        return {
            "clip.transformer_width, clip.transformer_layers, clip.vocab_size": width * text,
            "clip.vision_width, clip.vision_layers": sum(stages) + pool,
            "num_layers, vis_dim, dim_ffn": self.num_layers * 2 * self.vis_dim * (4 * self.vis_dim + self.dim_ffn),
            "fpn_out": sum(9 * a * b for a in self.fpn_out for b in self.fpn_out),
            "vlba": exchanged,
            "alignment_module": aligned,
            "centre_layers, vis_dim, dim_ffn": centre if self.centre_layers else 0,
            "predictor_layers, clip.transformer_width": predictor if self.mask_grounding else 0,
            "alignment_loss, vis_dim": 2 * ALIGNMENT_WIDTH * words if self.alignment_loss else 0,
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str = "configuration") -> CRISConfig:
        """Build from a flat mapping or one with the published sections ``DATA``, ``TRAIN``, ``TEST``.

        Keys of the published files that do not concern the model are ignored, unknown keys are named in a warning, and
        a missing model key raises ValueError. CLIP's sizes come from ``clip`` (a mapping) or from the file name in
        ``clip_pretrain`` (``pretrain/RN50.pt`` means RN50).
        """
        flat = flatten_sections(mapping)
        names = {field.name for field in dataclasses.fields(cls)}
        if "clip" not in flat and flat.get("clip_pretrain"):
            flat["clip"] = dataclasses.asdict(CLIPConfig.preset(_clip_name(str(flat["clip_pretrain"]))))
        flat.pop("clip_pretrain", None)
        missing = sorted(names - set(flat) - {"input_size", "intermediate"} - _OPTIONAL.keys())
        if missing:
            hint = " (or clip_pretrain, e.g. pretrain/RN50.pt)" if "clip" in missing else ""
            raise ValueError(f"{source} lacks the model keys {', '.join(missing)}{hint}")
        warn_of_unknown(set(flat) - names - cls.published_besides, names, source)
        return cls(**{key: value for key, value in flat.items() if key in names})

    def to_dict(self) -> dict[str, Any]:
        """A plain nested dict that :meth:`from_dict` accepts. It has no ``system`` key, like all CRIS files so far.

        Nor has it a switch that is off: a plain CRIS's files are what they were before there were any.
        """
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if name not in _OPTIONAL or value != _OPTIONAL[name]}

    def for_others(self) -> CRISConfig:
        """The same model without what only training uses."""
        return dataclasses.replace(self, **_TRAINING)

    def in_words(self) -> str:
        """The model and its encoder, such as ``CRIS, CLIP RN50``."""
        layers = "-".join(map(str, self.clip.vision_layers))
        encoder = {"3-4-6-3": "RN50", "3-4-23-3": "RN101"}.get(layers, f"ResNet of {layers} blocks")
        return f"{self.title}, CLIP {encoder}{self.switches_in_words()}"

    def switches_in_words(self) -> str:
        """What is switched on, such as ``, vlba=neck``; empty for a plain CRIS."""
        on = {name: getattr(self, name) for name, off in _SWITCHES.items() if getattr(self, name) != off}
        return "".join(f", {name}={value}" for name, value in on.items())

    def without_weights(self) -> str:
        """Recommends CLIP's weights where the encoders have the size of a published CLIP model."""
        if all(self.clip != CLIPConfig.preset(name) for name in CLIP_PRESETS):
            return ""
        return (
            "the CLIP encoders start from random weights, which is not the published recipe; to start from CLIP give "
            "clip_pretrain=RN50:openai (or RN101:openai), or the path of OpenAI's RN50.pt"
        )


def flatten_sections(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the sections of a published file (DATA, TRAIN, Distributed, TEST) into one flat dict."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and key != "clip":
            flat.update(value)
        else:
            flat[key] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _clip_name(source: str) -> str:
    """``pretrain/RN50.pt`` and ``RN50:openai`` both name RN50."""
    return Path(source).stem.split(":")[0].removesuffix("-quickgelu")

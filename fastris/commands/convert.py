"""``fastris convert``: a model rewritten as another kind of file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastris.options.declare import REQUIRED, option
from fastris.runtime.plain import printable

if TYPE_CHECKING:
    from fastris.models.base import ReferringModel


@dataclass
class ConvertConfig:
    """Rewrite a CRIS model as a published .pth, as one safetensors file, or as a folder for from_pretrained."""

    source: str = option(REQUIRED, "checkpoint, safetensors file, folder or Hugging Face id", positional=True)
    target: str = option(REQUIRED, "what to write", positional=True)
    to: Literal["auto", "pth", "safetensors", "folder"] = option(
        "auto", "kind of target: pth as published, one safetensors file, or a folder; auto goes by the target's suffix"
    )
    config: str = option("", "YAML file of the model; needed only for what shapes do not tell, such as num_head")
    overwrite: bool = option(False, "replace a target that exists")


def run_convert(options: ConvertConfig) -> int:
    """Rewrite a model as a published ``.pth``, a safetensors file or a ``save_pretrained`` folder.

    Every weight is checked against the model first. The target carries the configuration; a published checkpoint's
    optimizer and epoch stay behind, and what only training uses. Raises ValueError, FileNotFoundError or
    FileExistsError.
    """
    from fastris.models.pretrained import kind_for
    from fastris.weights.card import card_path, unknown_card, write_card
    from fastris.weights.convert import target_kind, write_model, written_files
    from fastris.weights.load import load_model, read_weights

    target = Path(options.target).expanduser()
    kind = target_kind(target, options.to)
    occupied = [file for file in written_files(target, kind) if file.exists()]
    if occupied and not options.overwrite:
        raise FileExistsError(f"{occupied[0]} exists; choose another target or pass overwrite=true")
    weights = read_weights(options.source)
    config = weights.config
    if options.config:
        config = kind_for(weights, config).config_class.from_yaml(options.config)
    model = load_model(weights, None if config is None else config.for_others())
    card = weights.card or unknown_card(model.config, weights.source, weights.hub_id)
    write_model(model, target, kind, card)
    print(printable(f"wrote {target} ({kind}): {_in_words(model)}"))
    print(printable(f"model card {write_card(card_path(target, kind), card)}"))
    if config is None and model.config.not_in_shapes:
        *most, last = (f"{name}={getattr(model.config, name)}" for name in model.config.not_in_shapes)
        print(
            f"its configuration was read from the shapes; {', '.join(most)} and {last} are the published values: "
            "pass config=FILE.yaml if the model was trained with others"
        )
    return 0


def _in_words(model: ReferringModel) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{model.in_words()}, {millions:.1f} M parameters"

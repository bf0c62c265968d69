"""Options: from the command line and YAML files to a checked dataclass, with messages that say what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fastris.options.declare import REQUIRED, describe, extra_option, load_options, option, usage


@dataclass
class Recipe:
    """A recipe."""

    base_lr: float = option(1e-4, "learning rate", "per step")
    batch_size: int = option(16, "images per step", "images")
    milestones: tuple[int, ...] = option((35,), "epochs at which the learning rate drops")
    size: tuple[int, int] = option((4, 3), "height and width")
    amp: Literal["auto", "bf16", "off"] = option("auto", "mixed precision")
    sync_bn: bool = option(True, "share statistics")
    resume: str | None = option(None, "checkpoint to go on from")
    model: str | dict[str, Any] = option("cris_r50", "preset, or the model's fields")
    output_folder: str = option("exp", "where to write")
    tags: list[str] = option(["a"], "words")
    limit: float | None = option(None, "stop after")
    go_on: bool | str = option(False, "go on with a run")
    extra: dict[str, Any] = extra_option(lambda: ["num_layers"])


@dataclass
class Strict:
    epochs: int = option(50, "epochs")


@dataclass
class Look:
    image: str = option(REQUIRED, "the picture", positional=True)
    phrases: tuple[str, ...] = option(REQUIRED, "the phrases", positional=True)
    model: str = option(REQUIRED, "the weights")
    threshold: float = option(0.35, "cut", "probability")


PUBLISHED = """
DATA:
  dataset: refcoco
  batch_size: 64
TRAIN:
  base_lr: 1e-4        # YAML 1.1 reads this as text
  milestones: [35]
  fpn_in: [512, 1024, 1024]
  resume:
Distributed:
  dist_url: tcp://localhost:3681
TEST:
  visualize: False
"""


def write(folder: Path, content: str | bytes, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["base_lr=1e-3"], "base_lr", 1e-3),
        (["base_lr=2"], "base_lr", 2.0),
        (["limit=.inf"], "limit", float("inf")),
        (["limit=inf"], "limit", float("inf")),
        (["limit=none"], "limit", None),
        (["--base-lr", "1e-3"], "base_lr", 1e-3),
        (["--base_lr=1e-3"], "base_lr", 1e-3),
        (["batch_size=010"], "batch_size", 10),
        (["batch_size=1e2"], "batch_size", 100),
        (["milestones=[35, 40]"], "milestones", (35, 40)),
        (["milestones=35,40"], "milestones", (35, 40)),
        (["milestones=35"], "milestones", (35,)),
        (["milestones=[]"], "milestones", ()),
        (["size=[2, 5]"], "size", (2, 5)),
        (["tags=[b, c]"], "tags", ["b", "c"]),
        (["amp=off"], "amp", "off"),
        (["amp=bf16"], "amp", "bf16"),
        (["sync_bn=no"], "sync_bn", False),
        (["--sync-bn"], "sync_bn", True),
        (["--sync-bn", "false"], "sync_bn", False),
        (["--no-sync-bn"], "sync_bn", False),
        (["--go-on"], "go_on", True),
        (["--go-on", "runs/1"], "go_on", "runs/1"),
        (["--go-on", "amp=off"], "go_on", True),
        (["resume=null"], "resume", None),
        (["resume=runs/2024"], "resume", "runs/2024"),
        (["output_folder=2024"], "output_folder", "2024"),
        (["output_folder=a=b"], "output_folder", "a=b"),
        (["--output-folder", "-strange-"], "output_folder", "-strange-"),
        (["model=tiny"], "model", "tiny"),
        (["model={num_layers: 2}"], "model", {"num_layers": 2}),
        (["batch_size=1", "batch_size=2"], "batch_size", 2),
    ],
)
def test_arguments_become_values_of_the_annotated_type(args: list[str], name: str, value: object) -> None:
    found = getattr(load_options(Recipe, args), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["base_lrr=1"], ["unknown option base_lrr", "did you mean base_lr?"]),
        (["--base-lrr", "1"], ["--base-lrr", "base_lr"]),
        (["zzz=1"], ["unknown option zzz", "--help"]),
        (["base_lr=fast"], ["base_lr must be float (per step)", "'fast'"]),
        (["base_lr=nan"], ["base_lr must be float", "nan"]),
        (["base_lr=true"], ["base_lr must be float", "true"]),
        (["batch_size=1.5"], ["batch_size must be int (images)", "'1.5'"]),
        (["batch_size=inf"], ["batch_size must be int"]),
        (["batch_size="], ["batch_size must be int"]),
        (["milestones=35,x"], ["milestones must be list of int", "'35,x'"]),
        (["milestones={a"], ["milestones must be", "not valid YAML"]),
        (["size=[1, 2, 3]"], ["size must be (int, int)"]),
        (["amp=fp8"], ["amp must be auto|bf16|off", "'fp8'"]),
        (["sync_bn=maybe"], ["sync_bn must be true|false"]),
        (["--amp"], ["--amp needs a value"]),
        (["--no-amp"], ["amp is not an on/off option"]),
        (["amp"], ["option amp needs a value"]),
        (["stray"], ["unexpected argument 'stray'", "name=value"]),
        ([""], ["unexpected argument ''"]),
        (["-x"], ["unknown option -x"]),
        (["--", "stray"], ["unexpected argument 'stray'"]),
        (["num_layers={"], ["num_layers", "not valid YAML"]),
    ],
)
def test_wrong_arguments_are_named_with_the_type_and_the_mend(args: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_options(Recipe, args)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_published_yaml_is_flattened_and_keeps_the_keys_that_are_no_options(tmp_path: Path) -> None:
    recipe = load_options(Recipe, [write(tmp_path, PUBLISHED)])
    assert (recipe.base_lr, recipe.batch_size, recipe.milestones, recipe.resume) == (1e-4, 64, (35,), None)
    assert recipe.extra == {
        "dataset": "refcoco",
        "fpn_in": [512, 1024, 1024],
        "dist_url": "tcp://localhost:3681",
        "visualize": False,
    }


def test_arguments_win_over_files_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    first = write(tmp_path, "batch_size: 1\nbase_lr: 1\namp: bf16", "first.yaml")
    second = write(tmp_path, "base_lr: 2\namp: auto", "second.yml")
    recipe = load_options(Recipe, ["amp=off", first, second])
    assert (recipe.batch_size, recipe.base_lr, recipe.amp) == (1, 2.0, "off")


def test_nested_model_mapping_in_a_file_stays_a_mapping(tmp_path: Path) -> None:
    assert load_options(Recipe, [write(tmp_path, "model:\n  num_layers: 2")]).model == {"num_layers": 2}


def test_a_class_without_extra_refuses_unknown_keys_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml: unknown option epoch; did you mean epochs"):
        load_options(Strict, [write(tmp_path, "epoch: 3")])


def test_unknown_keys_on_the_command_line_pass_only_if_listed_or_allowed() -> None:
    assert load_options(Recipe, ["num_layers=2"]).extra == {"num_layers": 2}
    assert load_options(Recipe, ["whatever=[1]"], allow_extra=True).extra == {"whatever": [1]}
    with pytest.raises(ValueError, match="whatever"):
        load_options(Recipe, ["whatever=1"])
    with pytest.raises(ValueError, match="whatever"):
        load_options(Strict, ["whatever=1"], allow_extra=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- a\n- b\n", "must hold `name: value` lines"),
        ("just words", "must hold `name: value` lines"),
        ("TRAIN:\n\tbase_lr: 1\n", "line 2.*tab.*spaces"),
        ("base_lr: [1\n", "not valid YAML: line"),
        ("base_lr: 1\nbase_lr: 2\n", "line 2 gives base_lr a second time"),
        ("TRAIN:\n  base_lr: 1\nTEST:\n  base_lr: 2\n", "base_lr is given twice, as 1 and 2"),
        ("1: 2", "names must be text, got 1"),
        ("base_lr: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        ("batch_size: 1.5", r"batch_size must be int \(images\), got 1.5 \(float\)"),
        ("output_folder: 2024", "output_folder must be text, got 2024 .int.; write it in quotes"),
        ("resume: 3.5", "write it in quotes"),
        ("batch_size:", "batch_size must be int .*None"),
        ("sync_bn: 2", "sync_bn must be true|false"),
        ("tags: {a: 1}", "tags"),
    ],
)
def test_each_unusable_file_gives_one_line_that_names_it(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_options(Recipe, [write(tmp_path, content)])
    assert "recipe.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bare_off_in_yaml_is_the_choice_off(tmp_path: Path) -> None:
    assert load_options(Recipe, [write(tmp_path, "amp: off")]).amp == "off"


def test_a_missing_file_or_a_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_options(Recipe, [str(tmp_path / "none.yaml")])
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_options(Recipe, [str(tmp_path / "folder.yaml")])


@pytest.mark.parametrize(
    ("args", "phrases"),
    [
        (["a.png", "the cup", "model=m"], ("the cup",)),
        (["model=m", "a.png", "the cup", "the man"], ("the cup", "the man")),
        (["a.png", "the sign 1+1=2", "model=m"], ("the sign 1+1=2",)),
        (["a.png", "E=mc2 poster", "model=m"], ("E=mc2 poster",)),
        (["a.png", "model=m", "--", "threshold=1 on the board", "--", "--model", "x.yaml"],
         ("threshold=1 on the board", "--", "--model", "x.yaml")),
        (["--model", "m", "--", "a.png", "the cup"], ("the cup",)),
        (["a.png", "", "model=m"], ("",)),
    ],
)  # fmt: skip
def test_positional_arguments_may_hold_equal_signs(args: list[str], phrases: tuple[str, ...]) -> None:
    look = load_options(Look, args)
    assert (look.image, look.phrases, look.model) == ("a.png", phrases, "m")


def test_a_misspelt_option_is_not_taken_for_a_phrase() -> None:
    with pytest.raises(ValueError, match=r"did you mean threshold.*write -- before the phrases"):
        load_options(Look, ["a.png", "the cup", "model=m", "treshold=0.5"])


@pytest.mark.parametrize(
    ("args", "missing"),
    [([], "IMAGE is missing"), (["a.png"], "PHRASES is missing"), (["a.png", "cup"], "model=... is missing")],
)
def test_what_is_required_is_asked_for_by_name(args: list[str], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        load_options(Look, args)


def test_positional_options_can_come_from_a_file_or_by_name(tmp_path: Path) -> None:
    file = write(tmp_path, "image: b.png\nphrases: [one, two]\nmodel: m")
    assert load_options(Look, [file]).phrases == ("one", "two")
    assert load_options(Look, [file, "a.png", "three"]).phrases == ("three",)
    named = load_options(Look, ["image=a.png", "three", "model=m"])
    assert (named.image, named.phrases) == ("a.png", ("three",))


def test_mutable_defaults_are_not_shared() -> None:
    first, second = load_options(Recipe, []), load_options(Recipe, [])
    first.tags.append("b")
    first.extra["x"] = 1
    assert (second.tags, second.extra) == (["a"], {})


def test_help_tells_name_type_default_unit_and_help_of_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = describe(Recipe)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()[1:]}
    assert lines["base_lr"] == "float 0.0001 learning rate [per step]"
    assert lines["milestones"].startswith("list of int [35] epochs")
    assert lines["amp"].startswith("auto|bf16|off auto")
    assert lines["sync_bn"].startswith("true|false true")
    assert lines["resume"].startswith("text or none none")
    assert "extra" not in lines
    assert "required" in describe(Look)
    assert usage(Look) == "IMAGE PHRASE [PHRASE ...] [options.yaml] [name=value ...]"


@dataclass(kw_only=True)
class Shared:
    folder: str = option("here", "shared by several commands")


@dataclass(kw_only=True)
class Inheriting(Shared):
    steps: int = option(3, "its own")
    weights: str = option(REQUIRED, "its own, without a default")


def test_help_shows_what_must_be_given_first_then_shared_options_then_a_commands_own() -> None:
    names = [line.split()[0] for line in describe(Inheriting).splitlines()[1:]]
    assert names == ["weights", "folder", "steps"]
    assert load_options(Inheriting, ["weights=a", "folder=b"]) == Inheriting(weights="a", folder="b")
    with pytest.raises(ValueError, match=r"weights=\.\.\. is missing"):
        load_options(Inheriting, ["folder=b"])

"""`fastris push` against a hub on this machine: what goes up, what does not, and what is said where it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_hub import Hub, running
from training_helpers import drawn_folder, model_config, train_config

from fastris import CRIS
from fastris.commands import cli
from fastris.commands.train import train
from fastris.models.card import read_head
from fastris.runtime.storage import load_torch
from fastris.weights.load import load_model
from fastris.weights.private import private_words
from fastris.weights.shipped import SHIPPED

PARENT = """---
base_model: somebody/older
datasets: [refcoco]
---
# Parent

## Training

| setting | value |
|---|---|
| seed | 7 |
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that fine-tuned a model of this machine on pictures of this machine, and was stopped and resumed."""
    home = tmp_path_factory.mktemp("home") / "bob"
    data, parent = home / "pictures", home / "parent"
    CRIS(model_config()).save_pretrained(parent)
    (parent / "README.md").write_text(PARENT)
    for split in ("train", "val"):
        drawn_folder(data, 2, split)
    settings = {"dataset": "folder", "data_root": str(data), "weight": str(parent)}
    train(train_config(home / "run", max_steps=1, **settings))
    shutil.rmtree(parent)
    train(train_config(home / "run", resume=True, **settings))
    return home / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    CRIS(model_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def push(capsys: pytest.CaptureFixture[str], model: Path, *args: str, repo: str = "alice/mine") -> tuple[int, str, str]:
    code = cli.main(["push", f"model={model}", f"repo={repo}", *args])
    return code, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], model: Path, *args: str, repo: str = "alice/mine") -> str:
    """The one line of a push that failed."""
    code, _, errors = push(capsys, model, "license=mit", *args, repo=repo)
    assert code == 2 and errors.count("\n") == 1, errors
    return errors


def test_run_goes_up_as_weights_configuration_and_a_card_that_names_no_machine(run, hub, tmp_path, capsys):
    code, printed, errors = push(capsys, run, "licence=cc-by-nc-4.0", "private=true")
    assert (code, errors) == (0, "") and "published: https://huggingface.co/alice/mine/commit/1" in printed
    held = hub.repos["alice/mine"]
    assert held["private"] and held["files"].keys() == {"README.md", "config.json", "model.safetensors"}
    for name, content in held["files"].items():
        (tmp_path / name).write_bytes(content)
        for word in (b"bob", b"/home", b"pictures", b"optimizer_state", str(run.parent).encode()):
            assert word not in content, (name, word)
    best, pushed = load_torch(run / "best.pth"), load_model(tmp_path)
    assert all(torch.equal(value, best["state_dict"][name]) for name, value in pushed.state_dict().items())
    head, body = read_head((tmp_path / "README.md").read_text())
    assert head["license"] == "cc-by-nc-4.0" and head["base_model"] == ["somebody/older"]
    assert head["datasets"] == ["refcoco"] and head["model-index"][0]["results"]
    for words in (
        "| started from | a local folder |",
        "| training data | folder, split train, 6 references |",
        "| seed | 0 |",
        "| base_lr | 0.001 |",
        "| cris | folder | val | the first sentence of each object |",
        "probability > 0.35",
        "## Earlier training, of what this one started from\n\n| setting | value |\n|---|---|\n| seed | 7 |",
        'fastris.Segmenter.from_pretrained("alice/mine")',
    ):
        assert words in body
    resumed = load_torch(run / "last.pth")["card"]  # the folder that it started from is gone, and its card is not
    assert "| started from | a local folder |" in resumed and "| seed | 7 |" in resumed and "bob" not in resumed
    assert 'from_pretrained("run")' in (run / "README.md").read_text()  # at home it is the folder, without its path


def test_dry_run_shows_files_sizes_and_card_without_network_or_token(folder, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    code, printed, errors = push(capsys, folder, "license=mit", "dry_run=true")
    assert (code, errors, hub.asked) == (0, "", []) and printed.startswith(
        "alice/mine (public, if it is new): 3 files, "
    )
    size = (folder / "model.safetensors").stat().st_size
    assert (
        f"  model.safetensors  {f'{size / 1e6:.1f} MB':>10}\n" in printed
        and "dry run: nothing was published" in printed
    )
    assert "license: mit" in printed and 'from_pretrained("alice/mine")' in printed
    assert "note: the card does not say a score with its rule (model-index)" in printed
    assert not (folder / "README.md").read_text().count("mit")  # the card at home stays as it was


def test_licence_is_asked_for_unless_the_card_has_one(folder, hub, capsys):
    code, _, errors = push(capsys, folder)
    assert code == 2 and "license is missing, and nobody but you can choose it: apache-2.0, mit, cc-by-4.0" in errors
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: openrail\n", 1))
    assert push(capsys, folder, repo="lab/mine")[0] == 0
    assert b"license: openrail" in hub.repos["lab/mine"]["files"]["README.md"]
    other = ("license=other", "license_name=mine", "license_link=https://host/text", "overwrite=true")
    assert push(capsys, folder, *other, repo="lab/mine")[0] == 0
    head, _ = read_head(hub.repos["lab/mine"]["files"]["README.md"].decode())
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "mine", "https://host/text")


def test_weights_in_half_precision_go_up_as_they_are(hub, capsys):
    assert push(capsys, SHIPPED, "license=mit")[0] == 0
    files = hub.repos["alice/mine"]["files"]
    assert files["model.safetensors"] == (SHIPPED / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"]) == json.loads((SHIPPED / "config.json").read_text())


def test_wrong_turns_at_the_hub_are_one_line_each(folder, hub, monkeypatch, capsys):
    assert "repo=eve/mine belongs to eve, and the token to alice; give one of alice/..., lab/..." in refused(
        capsys, folder, repo="eve/mine"
    )
    hub.add("alice/mine", **{"README.md": b""})
    assert "holds README.md already; overwrite=true puts a new version over" in refused(capsys, folder)
    assert "exists and is public, and private=true was asked for" in refused(capsys, folder, "private=true")
    hub.status = 403
    assert "the token may not write to repo=alice/new; give it write access" in refused(
        capsys, folder, repo="alice/new"
    )
    hub.status = 500
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert "the hub refused repo=alice/new" in refused(capsys, folder, repo="alice/new")
    assert hub.repos.keys() == {"alice/mine"} and hub.repos["alice/mine"]["files"] == {"README.md": b""}
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "the hub does not accept the token; log in again with `hf auth login`" in refused(capsys, folder)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in (line := refused(capsys, folder)) and "dry_run=true needs no network" in line
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN" in refused(capsys, folder)


def test_folders_that_are_no_model_or_no_finished_run_are_one_line_each(run, folder, hub, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "lacks config.json and model.safetensors, which save_pretrained writes" in refused(
        capsys, tmp_path / "empty"
    )
    (tmp_path / "empty" / "log.csv").touch()
    assert "is a run that has no weights yet; go on with" in refused(capsys, tmp_path / "empty")
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    options = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(options.replace("epochs: 2", "epochs: 30"))
    line = refused(capsys, stopped)
    assert f"has come to epoch 2 of 30, step 4; go on with `fastris train --resume {stopped}`" in line
    assert push(capsys, stopped, "license=mit", "unfinished=true", "dry_run=true")[0] == 0
    (folder / "README.md").write_text("---\na: [\n---\n")
    assert "the card's metadata (the YAML between --- at its top) cannot be read" in refused(capsys, folder)
    assert hub.asked == []


PRIVATE = [
    ("trained on /home/bob/coco", "/home/bob/coco"),
    ("`/net/fs1/bob/coco`", "/net/fs1/bob/coco"),
    ("see ~/coco and more", "~/coco"),
    (r"C:\Users\bob\coco", r"C:\Users\bob\coco"),
    ("[log](file:///x/y)", "file:///x/y"),
    ("token hf_abcdefghijklmnopqrstuvwxyz", "an access token"),
]
PUBLIC = "https://host/home/a/b and/or runs/mine x/y/z `data/coco` </details></sub> 1/2/3 5 ~/ 3 a:b\n| /s | `[a-z]` |"


def test_paths_of_a_machine_and_tokens_are_found_and_what_looks_like_them_is_not():
    for text, word in PRIVATE:
        assert private_words(f"first\n{text}, and so on") == [(2, word)], text
    assert private_words(PUBLIC) == []


def test_card_or_configuration_with_a_path_of_this_machine_is_refused_with_its_line(folder, hub, capsys):
    card = folder / "README.md"
    text = card.read_text()
    card.write_text(f"{text}\nTrained on /home/bob/coco.\n")
    line = refused(capsys, folder)
    assert f"README.md, line {len(text.splitlines()) + 2}, would publish /home/bob/coco" in line and hub.asked == []


def config_with(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.filterwarnings("ignore")
def test_entries_of_a_configuration_that_mean_nothing_here_stay_at_home(folder, hub, capsys):
    config_with(folder, data_root="/home/bob/coco", user="bob")
    assert cli.main(["push", f"model={folder}", "repo=alice/mine", "license=mit"]) == 0
    assert b"bob" not in hub.repos["alice/mine"]["files"]["config.json"]

"""Whatever README.md and docs/ tell readers to type works as it stands there."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from snippet_folder import make_folder
from snippet_runner import try_blocks
from snippets import ROOT, SnippetError, blocks, pages

from fastris.commands.cli import COMMANDS
from fastris.models.registry import model_keys, resolve


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("snippets"))


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, as the current folder; nothing of it reaches the network."""
    work = tmp_path / "work"
    shutil.copytree(template, work)
    monkeypatch.chdir(work)
    monkeypatch.setenv("FASTRIS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return work


def _runs(path: Path) -> bool:
    try:
        return any(block.runs for block in blocks(path))
    except SnippetError:  # told by the test, which comes to it at once
        return False


def _named() -> list:
    """Each page; slow where it has anything to run."""
    return [pytest.param(path, id=path.stem, marks=pytest.mark.slow if _runs(path) else ()) for path in pages()]


@pytest.mark.parametrize("path", _named())
def test_every_snippet_of_a_page_does_what_it_says(path: Path, folder: Path) -> None:
    if passed_over := try_blocks(blocks(path)):
        pytest.skip("the rest works; " + "; ".join(passed_over))


def test_commands_within_sentences_have_options_that_exist() -> None:
    wrong = []
    for path in pages():
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
        for name, rest in re.findall(r"`fastris ([a-z]+)([^`]*)`", text):
            if name not in COMMANDS:
                wrong.append(f"{path.name}: fastris {name}")
                continue
            options = resolve(f"{COMMANDS[name].module}:{COMMANDS[name].config}")
            known = {"help"} | {field.name for field in fields(options)} | set(model_keys() if name == "train" else ())
            asked = re.findall(r"(?:^|\s)(?:--)?([a-z][a-z_-]*)=", rest) + re.findall(
                r"(?:^|\s)--([a-z][a-z_-]*)", rest
            )
            wrong += [f"{path.name}: fastris {name} {each}" for each in asked if each.replace("-", "_") not in known]
    assert wrong == []


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [path.name for path in pages()[1:] if f": {path.relative_to(ROOT / 'docs').as_posix()}" not in menu] == []

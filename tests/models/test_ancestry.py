"""A model knows what it was loaded from: saving it again keeps its card, and says what has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from weight_samples import CONFIG, randomised, save_archive, small_clip

from fastris import CRIS
from fastris.commands.convert import ConvertConfig, run_convert
from fastris.models.ancestry import from_plain, to_plain
from fastris.models.card import metadata_of, model_card, read_head, section, with_head, with_name
from fastris.weights.load import load_clip, load_model

SCORED = """---
base_model:
- somebody/older
datasets:
- refcoco
library_name: fastris
model-index:
- name: CRIS
  results: []
---

# Mine

Words of my own.

## Evaluation

mIoU 70.00 %
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    randomised(CRIS(CONFIG)).eval().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(SCORED)
    return tmp_path / "model"


def test_model_saved_again_as_it_was_keeps_its_card_to_the_letter(folder, tmp_path):
    for number, load in enumerate((CRIS.from_pretrained, load_model)):
        load(folder).save_pretrained(tmp_path / f"again{number}")
        assert (tmp_path / f"again{number}" / "README.md").read_text() == SCORED


def test_model_changed_since_keeps_its_card_but_claims_its_scores_no_longer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    for source, base in ((str(folder), "somebody/older"), ("somebody/mine", "somebody/mine")):
        model = CRIS.from_pretrained(source if "mine" in source else folder)
        model.proj.txt.bias.data += 1e-3
        out = tmp_path / base
        model.save_pretrained(out)
        model.save_pretrained(out)
        card = (out / "README.md").read_text()
        head, body = read_head(card)
        assert head["base_model"] == [base] and head["datasets"] == ["refcoco"] and "model-index" not in head
        assert body.count("## Changed since") == 1 and body.index("# Mine") < body.index("## Changed") < body.index(
            "Words"
        )
        assert "mIoU 70.00 %" in body and str(tmp_path) not in card
    model = load_model(folder)
    model.proj.txt.bias.data += 1e-3
    model.save_pretrained(folder)  # over what it was loaded from
    assert "## Changed since\n\nThese weights were loaded from a local folder and" in (folder / "README.md").read_text()


def test_saving_overwrites_nobodys_own_card(folder):
    CRIS(CONFIG).save_pretrained(folder)
    assert (folder / "README.md").read_text() == SCORED


def test_card_of_a_model_that_was_never_loaded_claims_nothing(tmp_path):
    CRIS(CONFIG).save_pretrained(tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert metadata_of(card).keys() == {"library_name", "pipeline_tag", "tags"}  # no licence among them
    assert "How these weights were trained is not on record." in section(card, "Training")


def test_clip_as_openai_published_it_is_known_by_its_bytes_and_any_other_file_by_its_name_alone(tmp_path, monkeypatch):
    archive = save_archive(small_clip(), tmp_path / "RN50.pt")
    entry = {"url": "https://host/0000/RN50.pt", "hf_hub": "timm/resnet50_clip.openai/"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: entry)
    model = CRIS(CONFIG)
    load_clip(model, archive)
    assert [each.in_words for each in model.ancestry] == ["CLIP's RN50.pt"]
    entry["url"] = f"https://host/{hashlib.sha256(archive.read_bytes()).hexdigest()}/RN50.pt"
    load_clip(model, archive)
    model.save_pretrained(tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert metadata_of(card)["base_model"] == ["timm/resnet50_clip.openai"]
    assert "- CLIP's RN50.pt (on the hub: timm/resnet50_clip.openai)" in card
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: str(archive))
    fresh = CRIS(CONFIG)
    load_clip(fresh, "RN50:openai")
    assert [each.in_words for each in fresh.ancestry] == ["CLIP's RN50:openai (on the hub: timm/resnet50_clip.openai)"]
    assert from_plain(to_plain(fresh.ancestry)) == fresh.ancestry and from_plain([{"name": 3, "x": 1}, 7]) == ()


def test_converted_weights_without_a_card_name_their_file_and_no_folder(tmp_path):
    torch.save({"config": CONFIG.to_dict(), "state_dict": CRIS(CONFIG).state_dict()}, tmp_path / "old.pth")
    run_convert(ConvertConfig(str(tmp_path / "old.pth"), str(tmp_path / "new")))
    card = (tmp_path / "new" / "README.md").read_text()
    assert "from `old.pth`, which does not say" in card and str(tmp_path) not in card


def test_metadata_that_cannot_be_read_is_one_line_and_stays_as_it_is():
    for text, message in (("---\na: [\n---\nx", "cannot be read"), ("---\n- a\n---\nx", "must be a mapping")):
        with pytest.raises(ValueError, match=message) as caught:
            read_head(text)
        assert "\n" not in str(caught.value) and metadata_of(text) == {}
    assert with_head("no head", license="mit") == "---\nlicense: mit\n---\n\nno head"
    assert read_head(with_head(SCORED, license="mit"))[1] == read_head(SCORED)[1]


def test_snippet_loads_the_model_by_its_name():
    card = model_card(CONFIG, "## Training\n\nnone")
    assert 'Segmenter.from_pretrained("me/mine")' in with_name(card, "me/mine")
    other = "AutoModel.from_pretrained('bert')"
    assert with_name(other, "me/mine").startswith(other) and 'Segmenter.from_pretrained("me/mine")' in with_name(
        other, "me/mine"
    )


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_a_model_may_be_read_by_those_whom_the_umask_lets(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        CRIS(CONFIG).save_pretrained(tmp_path / "out")
        run_convert(ConvertConfig(str(tmp_path / "out"), str(tmp_path / "one.safetensors")))
    finally:
        os.umask(before)
    for name in ("out/model.safetensors", "out/config.json", "out/README.md", "one.safetensors", "one.md"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name

"""Weights from every kind of source, and conversion between the kinds."""

from __future__ import annotations

import itertools
import json
import urllib.error
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from weight_samples import CONFIG, published_checkpoint, randomised, same_state, save_archive, small_clip

from fastris import CRIS
from fastris.commands.convert import ConvertConfig, run_convert
from fastris.models.cris.keys import CONNECT
from fastris.options.declare import load_options
from fastris.runtime.storage import save_atomic
from fastris.weights.load import load_clip, load_model, load_weights, read_weights


@pytest.fixture
def model() -> CRIS:
    return randomised(CRIS(CONFIG)).eval()


@pytest.fixture
def sources(model, tmp_path) -> dict[str, Path]:
    """The same model in every form that fastris writes or meets."""
    model.save_pretrained(tmp_path / "folder")
    save_atomic({"config": CONFIG.to_dict(), "state_dict": model.state_dict()}, tmp_path / "last.pth")
    run_convert(ConvertConfig(str(tmp_path / "folder"), str(tmp_path / "single.safetensors")))
    return {
        "folder": tmp_path / "folder",
        "file in folder": tmp_path / "folder" / "model.safetensors",
        "training checkpoint": tmp_path / "last.pth",
        "safetensors": tmp_path / "single.safetensors",
    }


def test_published_checkpoint_loads_with_numpy_scores_and_module_prefix(model, tmp_path):
    torch.save(published_checkpoint(model), tmp_path / "best_model.pth")
    fresh = CRIS(CONFIG)
    report = load_weights(fresh, tmp_path / "best_model.pth")
    assert report.fits and report.loaded == len(model.state_dict()) and not report.kept
    assert same_state(fresh, model)


def test_published_checkpoint_becomes_a_model_without_a_yaml_file(model, tmp_path):
    torch.save(published_checkpoint(model), tmp_path / "best_model.pth")
    with pytest.warns(UserWarning, match="num_head of the decoder cannot be read from weights"):
        loaded = load_model(tmp_path / "best_model.pth")
    assert same_state(loaded, model) and not loaded.training
    assert loaded.config.num_head == 8 and loaded.config.clip == CONFIG.clip
    assert same_state(load_model(tmp_path / "best_model.pth", CONFIG), model)


def assert_holds_clip(model: CRIS, clip: CLIP, precision=torch.float32) -> None:
    own = model.backbone.state_dict()
    for name, tensor in clip.state_dict().items():
        if name in own:
            expected = tensor.to(precision).to(own[name].dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(own[name], expected), name


def test_openai_archive_loads_as_fp32_and_leaves_connect_alone(tmp_path):
    clip = randomised(small_clip())
    path = save_archive(clip, tmp_path / "RN50.pt")
    model = randomised(CRIS(CONFIG))
    connect = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(CONNECT)}
    report = load_clip(model, path)
    assert report.fits and set(report.kept) == set(connect) and len(connect) == 6
    assert_holds_clip(model, clip, torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.backbone.visual.attnpool.positional_embedding.shape == (5, 256)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in connect.items())


@pytest.mark.parametrize("kind", ["safetensors", "state dict file", "wrapped file", "mapping"])
def test_open_clip_weights_load_from_every_container(kind, tmp_path):
    clip, model = randomised(small_clip()), CRIS(CONFIG)
    state = clip.state_dict()
    if kind == "safetensors":
        save_file(state, tmp_path / "open_clip_model.safetensors")
    elif kind == "state dict file":
        torch.save(state, tmp_path / "clip.pt")
    elif kind == "wrapped file":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "clip.pt")
    source = state if kind == "mapping" else next(tmp_path.iterdir())
    assert load_clip(model, source).fits
    assert_holds_clip(model, clip)


def test_dense_encoders_reproduce_open_clip_after_loading():
    clip, model = small_clip(), CRIS(CONFIG).eval()
    load_clip(model, clip.state_dict())
    tokens = torch.tensor([[94, 5, 6, 95, 0, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        _, state = model.backbone.encode_text(tokens)
        torch.testing.assert_close(state, clip.encode_text(tokens), rtol=1e-5, atol=1e-6)


def test_open_clip_name_and_tag_go_through_open_clip(monkeypatch, tmp_path):
    clip = randomised(small_clip())
    path = save_archive(clip, tmp_path / "RN50.pt")
    asked = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda entry, **_: asked.append(entry) or str(path))
    model = CRIS(CONFIG)
    assert load_clip(model, "RN50:openai").source == "RN50:openai"
    assert asked[0]["url"].endswith("/RN50.pt")
    assert_holds_clip(model, clip, torch.float16)


def test_clip_download_without_network_is_one_error_with_a_way_out(monkeypatch):
    def fail(entry, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(
        ConnectionError, match=r"could not download RN50:openai .*not known.*RN50\.pt elsewhere and give"
    ):
        load_clip(CRIS(CONFIG), "RN50:openai")


def test_second_place_of_clip_weights_is_tried_when_the_first_fails(monkeypatch, tmp_path):
    path = save_archive(small_clip(), tmp_path / "RN50.pt")

    def only_from_hub(entry, prefer_hf_hub):
        if not prefer_hf_hub:
            raise urllib.error.URLError("blocked")
        return str(path)

    monkeypatch.setattr(open_clip, "download_pretrained", only_from_hub)
    assert load_clip(CRIS(CONFIG), "RN50:openai").fits


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("RN50:laion", r"no tag 'laion' for RN50; it has openai"),
        ("RN5:openai", r"no model 'RN5'; for CRIS: RN50, RN101"),
        ("ViT-B-32:openai", r"ViT-B-32 is a Vision Transformer, but CRIS is built on CLIP's ResNets"),
    ],
)
def test_unusable_open_clip_names_are_refused_before_any_download(source, message, monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: pytest.fail("tried to download"))
    with pytest.raises(ValueError, match=message):
        load_clip(CRIS(CONFIG), source)


@pytest.mark.parametrize("kind", ["folder", "file in folder", "training checkpoint", "safetensors"])
def test_every_kind_of_source_gives_the_same_model_with_its_configuration(kind, sources, model):
    loaded = load_model(sources[kind])
    assert same_state(loaded, model) and loaded.config == CONFIG and not loaded.training


def test_save_pretrained_round_trip_keeps_weights_configuration_and_values(tmp_path):
    model = CRIS(CONFIG).eval()
    model.save_pretrained(tmp_path / "out")
    loaded = CRIS.from_pretrained(tmp_path / "out")
    assert same_state(loaded, model) and loaded.config == CONFIG
    image, words = torch.randn(1, 3, 64, 64), torch.tensor([[94, 5, 95, 0]])
    logits = model(image, words)
    assert torch.equal(loaded(image, words), logits) and logits.isfinite().all()


def test_push_to_hub_uploads_what_load_model_reads(model, monkeypatch, tmp_path):
    class Hub:
        def __init__(self, *args, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path, **kwargs):
            for file in Path(folder_path).iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    model.push_to_hub("somebody/cris")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert read_weights("somebody/cris").source == "somebody/cris"
    assert same_state(load_model("somebody/cris"), model)


def test_source_that_does_not_exist_says_what_is_accepted(monkeypatch, tmp_path):
    for source in ("best_model.pth", tmp_path / "runs" / "best.safetensors", "model"):
        with pytest.raises(
            FileNotFoundError, match=r"no file or folder .*accepted are a folder written by save_pretrained"
        ):
            load_model(source)

    def offline(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no folder or file runs/best here, and Hugging Face gave no model"):
        load_model("runs/best")


def test_folder_without_a_model_names_what_lacks_and_what_is_there(tmp_path):
    (tmp_path / "best_model.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json and model\.safetensors.*it holds best_model\.pth"):
        load_model(tmp_path)


def test_damaged_files_of_every_kind_are_one_error(model, sources, tmp_path):
    archive = save_archive(small_clip(), tmp_path / "RN50.pt")
    for path, kind in (
        (sources["safetensors"], "safetensors file"),
        (sources["training checkpoint"], "PyTorch checkpoint"),
    ):
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ValueError, match=rf"{path.name} is damaged or no {kind}"):
            load_model(path)
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"RN50\.pt is damaged"):
        load_clip(model, archive)
    (sources["folder"] / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_model(sources["folder"])


def test_foreign_config_entry_of_a_checkpoint_is_not_taken_for_the_models(model, tmp_path):
    torch.save({"config": {"lr": 0.1}, "state_dict": model.state_dict()}, tmp_path / "other.pth")
    assert read_weights(tmp_path / "other.pth").config is None


def test_conversion_in_a_circle_keeps_every_weight_and_the_configuration(model, tmp_path, capsys):
    torch.save({**published_checkpoint(model), "config": CONFIG.to_dict()}, tmp_path / "best_model.pth")
    steps = ["best_model.pth", "folder", "single.safetensors", "again.pth", "other.safetensors", "folder2", "last.pth"]
    for source, target in itertools.pairwise(steps):
        assert run_convert(load_options(ConvertConfig, [str(tmp_path / source), str(tmp_path / target)])) == 0
    assert (tmp_path / "folder" / "config.json").is_file()
    final = torch.load(tmp_path / "last.pth", weights_only=True)
    assert all(torch.equal(final["state_dict"][f"module.{name}"], t) for name, t in model.state_dict().items())
    assert load_model(tmp_path / "last.pth").config == CONFIG
    assert load_file(tmp_path / "other.safetensors").keys() == model.state_dict().keys()
    assert "wrote" in capsys.readouterr().out


def test_conversion_of_a_bare_checkpoint_says_what_it_had_to_assume(model, tmp_path, capsys):
    torch.save(published_checkpoint(model), tmp_path / "best_model.pth")
    with pytest.warns(UserWarning, match="num_head"):
        run_convert(ConvertConfig(str(tmp_path / "best_model.pth"), str(tmp_path / "out")))
    assert "num_head=8, word_len=12" in capsys.readouterr().out
    yaml = tmp_path / "cris.yaml"
    yaml.write_text(json.dumps(CONFIG.to_dict()))
    run_convert(
        ConvertConfig(str(tmp_path / "best_model.pth"), str(tmp_path / "out"), config=str(yaml), overwrite=True)
    )
    assert load_model(tmp_path / "out").config == CONFIG


def test_conversion_leaves_an_existing_target_alone_unless_told(sources, tmp_path):
    before = sources["safetensors"].read_bytes()
    with pytest.raises(FileExistsError, match=r"single\.safetensors exists.*overwrite=true"):
        run_convert(ConvertConfig(str(sources["folder"]), str(sources["safetensors"])))
    assert sources["safetensors"].read_bytes() == before
    with pytest.raises(FileExistsError, match="is a file, but a folder is to be written"):
        run_convert(ConvertConfig(str(sources["folder"]), str(sources["safetensors"]), to="folder", overwrite=True))
    run_convert(ConvertConfig(str(sources["folder"]), str(sources["safetensors"]), overwrite=True))


def test_conversion_of_clip_alone_is_refused(tmp_path):
    torch.save(small_clip().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="CLIP's weights alone"):
        run_convert(ConvertConfig(str(tmp_path / "clip.pt"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_configuration_of_another_version_is_one_error(sources):
    config = sources["folder"] / "config.json"
    content = json.loads(config.read_text())
    content["clip"]["patch_size"] = 32
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not describe a CRIS model: .*patch_size"):
        load_model(sources["folder"])

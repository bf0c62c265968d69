"""Model files that lie: flipped bits, sizes beyond reason, tensors that are not what they seem."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_samples import CONFIG, randomised, same_state

from fastris import CRIS, CRISConfig
from fastris.__main__ import main
from fastris.commands.convert import ConvertConfig, run_convert
from fastris.runtime.safetensors_files import CHECKSUMS
from fastris.runtime.storage import save_atomic
from fastris.weights.load import load_model, load_weights


@pytest.fixture(scope="module")
def model() -> CRIS:
    return randomised(CRIS(CONFIG)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("written", ["save_pretrained", "convert to a file", "convert to a folder"])
def test_one_flipped_bit_in_safetensors_is_noticed(written, folder, tmp_path):
    path = folder / "model.safetensors"
    if written == "convert to a file":
        path = tmp_path / "single.safetensors"
        run_convert(ConvertConfig(str(folder), str(path)))
    elif written == "convert to a folder":
        run_convert(ConvertConfig(str(folder), str(tmp_path / "out")))
        path = tmp_path / "out" / "model.safetensors"
    load_model(path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, (start + len(content)) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"1 of \d+ tensors \(\S+\) are not those .*copy or download it again"):
            load_model(path)
    with pytest.raises(ValueError, match=r"are not those that were written"):
        CRIS.from_pretrained(path.parent, config=CONFIG) if path.name == "model.safetensors" else load_model(path)


def test_safetensors_with_checksums_are_ordinary_files_and_those_without_load_as_before(model, folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    metadata = metadata_of(folder / "model.safetensors")
    assert metadata["format"] == "pt" and set(json.loads(metadata[CHECKSUMS])) == set(tensors)
    save_file(tensors, tmp_path / "plain.safetensors", metadata={"config": json.dumps(CONFIG.to_dict())})
    assert same_state(load_model(tmp_path / "plain.safetensors"), model)


def test_tensors_changed_by_others_under_our_checksums_are_told_apart_with_both_mends(folder):
    path = folder / "model.safetensors"
    metadata, tensors = metadata_of(path), load_file(path)
    tuned = {name: tensor + 1 for name, tensor in tensors.items()}
    mend = rf"If another program did, and kept the metadata: save its tensors without the metadata entry {CHECKSUMS}"
    halved = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    renamed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    for changed in (tuned, halved, renamed):
        save_file(changed, path, metadata=metadata)
        with pytest.raises(ValueError, match=mend):
            load_model(folder)
    del metadata[CHECKSUMS]
    save_file(tuned, path, metadata=metadata)
    load_model(folder)


@pytest.mark.parametrize("header", [(2**40).to_bytes(8, "little"), (17 << 20).to_bytes(8, "little")])
def test_safetensors_header_that_lies_about_its_length_is_refused(header, tmp_path):
    path = tmp_path / "lies.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(20 << 20)
    with pytest.raises(ValueError, match=r"lies\.safetensors announces a header of \d+ bytes.*another file"):
        load_model(path)


def test_safetensors_with_unknown_dtypes_or_overlapping_tensors_is_one_error(tmp_path):
    path = tmp_path / "odd.safetensors"
    entries = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for header in (
        {"a": entries, "b": entries},
        {"a": {**entries, "dtype": "X9"}},
        {"a": {**entries, "shape": [2**60]}},
    ):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        with pytest.raises(ValueError, match=r"odd\.safetensors is damaged or no safetensors file"):
            load_model(path)


HUGE = [
    ("num_layers", {"num_layers": 10**7}, r"num_layers must be a whole number from 1 to 128, got 10000000"),
    ("layers", {"clip": {"transformer_layers": 10**7}}, r"clip\.transformer_layers must be a whole number"),
    ("blocks", {"clip": {"vision_layers": [1, 10**7, 1, 1]}}, r"clip\.vision_layers\[1\] must be a whole number"),
    ("vocabulary", {"clip": {"vocab_size": 10**12}}, r"clip\.vocab_size must be a whole number"),
    ("ffn", {"dim_ffn": 10**9}, r"dim_ffn must be a whole number"),
    ("all at once", {"clip": {"vocab_size": 10**6, "transformer_width": 8192, "transformer_heads": 1}, "vis_dim": 8192,
                     "fpn_out": [16, 8192, 48]}, r"billion parameters, .* make .* smaller"),
    ("zero", {"num_head": 0}, r"num_head must be a whole number"),
    ("text", {"num_layers": "3"}, r"num_layers must be a whole number .* got '3' \("),
    ("flag", {"num_layers": True}, r"num_layers must be a whole number"),
    ("list", {"num_layers": [3]}, r"num_layers must be a whole number"),
    ("number", {"fpn_out": 3}, r"fpn_out must hold 3 whole numbers"),
    ("endless", {"dropout": "a lot"}, r"dropout must be in \[0, 1\), got 'a lot'"),
    ("no clip", {"clip": [1]}, r"clip must be a CLIPConfig or a mapping"),
]  # fmt: skip


def changed(changes: dict) -> dict:
    content = json.loads(json.dumps(CONFIG.to_dict()))
    clip = changes.get("clip", {})
    return {**content, **changes, "clip": {**content["clip"], **clip} if isinstance(clip, dict) else clip}


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in HUGE], ids=[case[0] for case in HUGE])
def test_configuration_beyond_reason_is_refused_by_field_wherever_it_stands(changes, message, model, folder, tmp_path):
    content, weights = changed(changes), dict([next(iter(model.state_dict().items()))])
    (folder / "config.json").write_text(json.dumps(content))
    save_atomic({"config": content, "state_dict": weights}, tmp_path / "model.pth")
    save_file(weights, tmp_path / "model1.safetensors", metadata={"config": json.dumps(content)})
    (tmp_path / "cris.yaml").write_text(json.dumps(content))
    for source in (folder, tmp_path / "model.pth", tmp_path / "model1.safetensors"):
        with pytest.raises(ValueError, match=message):
            load_model(source)
    with pytest.raises(ValueError, match=message):
        CRIS.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        CRISConfig.from_yaml(tmp_path / "cris.yaml")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("decoder.layers.9999999.norm1.weight", "num_layers"),
        ("backbone.transformer.resblocks.99999999.ln_1.weight", r"clip\.transformer_layers"),
        ("backbone.visual.layer3.9999999.bn1.weight", r"clip\.vision_layers\[2\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:num_head")
def test_name_of_a_layer_far_away_does_not_make_a_model_of_so_many(name, field, model, tmp_path):
    torch.save({"state_dict": {**model.state_dict(), name: torch.ones(1)}}, tmp_path / "far.pth")
    with pytest.raises(ValueError, match=rf"{field} must be a whole number from 1 to 128, got 9+|got 10+"):
        load_model(tmp_path / "far.pth")
    far = name.replace("99999", "9" * 5000)
    with pytest.raises(ValueError, match=r"do not fit the model"):
        load_model({**model.state_dict(), far: torch.ones(1)})


def test_weights_that_do_not_fit_a_large_configuration_are_refused_before_its_memory_is_allocated(model, monkeypatch):
    large = CRISConfig.from_dict(changed({"num_layers": 100, "dim_ffn": 100_000}))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=r"do not fit the model"):
        load_model(model.state_dict(), large)


class Odd(torch.Tensor):
    pass


ODD = {
    "expanded to": lambda: torch.zeros(1).expand(10**6, 10**6),
    "expanded to .1000, 1000.": lambda: torch.zeros(2000).as_strided((1000, 1000), (1, 1)),
    "sparse .torch.sparse_coo": lambda: torch.eye(3).to_sparse(),
    "sparse .torch.sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "complex": lambda: torch.eye(3).to(torch.complex64),
    "a Odd": lambda: torch.eye(3).as_subclass(Odd),
    "a UninitializedParameter": lambda: torch.nn.LazyLinear(3).weight,
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ODD)
def test_tensor_that_is_not_what_it_seems_is_refused_by_name(what, model):
    state = {**model.state_dict(), "backbone.token_embedding.weight": ODD[what]()}
    for read in (load_model, lambda source: load_weights(CRIS(CONFIG), source, strict=False)):
        with pytest.raises(
            ValueError, match=rf"backbone\.token_embedding\.weight is {what.strip()}.*dense, contiguous"
        ):
            read(state)


def test_expanded_tensor_in_a_file_is_refused_by_the_command_in_one_line(model, tmp_path, capsys):
    state = {**model.state_dict(), "backbone.token_embedding.weight": torch.zeros(1).expand(10**6, 10**6)}
    torch.save({"state_dict": state}, tmp_path / "bomb.pth")
    assert main(["convert", str(tmp_path / "bomb.pth"), str(tmp_path / "out.pth")]) == 2
    error = capsys.readouterr().err.strip()
    assert "bomb.pth: backbone.token_embedding.weight is expanded to (1000000, 1000000)" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out.pth").exists()


def test_many_names_of_one_memory_are_refused(model):
    shared = torch.zeros(1 << 20)
    state = {**model.state_dict(), **{f"decoder.layers.{index}.x": shared for index in range(100)}}
    with pytest.raises(ValueError, match=r"share memory: they stand for \d+ bytes and have \d+; save each"):
        load_model(state)


def test_weights_without_values_are_refused_where_values_are_needed(model):
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has no values \(meta device\)"):
        load_model(state, CONFIG)


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_text_beside_the_weights_that_is_too_large_is_not_read(name, folder):
    with (folder / name).open("ab") as file:
        file.truncate(1 << 34)
    for read in (load_model, CRIS.from_pretrained):
        with pytest.raises(ValueError, match=rf"{name} is larger than \d+ bytes"):
            read(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "{not json", '{"clip": {}}'])
def test_configuration_that_is_no_json_is_one_error(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"the configuration of .* (is no valid JSON|does not describe a CRIS model)"):
        load_model(folder)


YAML = {
    "references": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "merges": "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}\n",
    "depth": "[" * 5000,
    "bytes": "\udcff",
    "size": "# " + "x" * (1 << 20),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_unfolds_nests_or_is_none_is_one_error(name, tmp_path):
    (tmp_path / "cris.yaml").write_bytes(YAML[name].encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"cris\.yaml (repeats values|is no YAML|is larger)") as caught:
        CRISConfig.from_yaml(tmp_path / "cris.yaml")
    assert "\n" not in str(caught.value)


def test_folder_keeps_its_old_weights_until_the_new_ones_are_whole(model, folder, tmp_path, monkeypatch):
    run_convert(ConvertConfig(str(folder), str(tmp_path / "out")))

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match=r"could not write .*model\.safetensors.*No space left.*untouched"):
        run_convert(ConvertConfig(str(folder), str(tmp_path / "out"), overwrite=True))
    monkeypatch.undo()
    assert same_state(load_model(tmp_path / "out"), model)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_from_pretrained_takes_another_configuration_and_lenient_weights(model, folder):
    other = CRISConfig.from_dict(changed({"num_head": 2}))
    assert CRIS.from_pretrained(folder, config=other).config.num_head == 2
    deeper = CRISConfig.from_dict(changed({"num_layers": 3}))
    with pytest.raises(ValueError, match="missing"):
        CRIS.from_pretrained(folder, config=deeper)
    lenient = CRIS.from_pretrained(folder, config=deeper, strict=False)
    assert torch.equal(lenient.neck.aggr[0].weight, model.neck.aggr[0].weight)
    assert all(tensor.isfinite().all() for tensor in lenient.state_dict().values())


def test_configuration_with_very_many_unknown_keys_or_odd_ones_is_named_in_a_short_line(tmp_path):
    content = {**CONFIG.to_dict(), **{f"key{index}": 1 for index in range(100_000)}, "x" * 10_000: 1}
    with pytest.warns(UserWarning, match=r"mean nothing here: key0, .*, and 99991 more") as caught:
        CRISConfig.from_dict(content)
    assert len(str(caught[0].message)) < 600
    with pytest.warns(UserWarning, match=r"mean nothing here: 3, None"):
        CRISConfig.from_dict({**CONFIG.to_dict(), 3: 1, None: 2})
    with pytest.raises(ValueError, match=r"clip has unknown keys \['3', 'None'\]"):
        CRISConfig.from_dict(changed({"clip": {"embed_dim": 48}}) | {"clip": {3: 1, None: 2}})

"""PyTorch's files, read without running them and without giving them more memory than they have bytes."""

from __future__ import annotations

import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from weight_samples import randomised, save_archive, small_clip

from fastris.__main__ import main
from fastris.runtime.storage import load_torch, save_atomic
from fastris.runtime.torch_values import Record
from fastris.weights.load import read_weights

warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)


class WritesOnLoading(torch.nn.Module):
    """Scripted, saved and loaded by PyTorch, it overwrites the file that it names."""

    def __init__(self, victim: str):
        super().__init__()
        self.victim = victim
        self.weight = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.victim, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.victim = state[0]
        self.training = state[1]
        torch.from_file(self.victim, True, 8, dtype=torch.uint8).fill_(80)
        self.weight = torch.ones(2)

    def forward(self, x: torch.Tensor):
        return x * self.weight


def quiet(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


@pytest.mark.parametrize("command", ["convert", "predict", "evaluate"])
def test_program_in_a_checkpoint_is_not_run_by_any_command(command, tmp_path, capsys):
    victim = tmp_path / "letter.txt"
    victim.write_text("untouched")
    quiet(torch.jit.save, quiet(torch.jit.script, WritesOnLoading(str(victim))), str(tmp_path / "evil.pth"))
    rest = {
        "convert": [str(tmp_path / "out.pth")],
        "predict": ["image.jpg", "a cup"],
        "evaluate": ["val_lmdb=nothing"],
    }[command]
    assert main([command, str(tmp_path / "evil.pth"), *rest]) == 2
    assert victim.read_text() == "untouched"
    with pytest.raises(ValueError, match=r"evil\.pth holds a TorchScript module .* with a __setstate__ of its own"):
        read_weights(tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth is a TorchScript archive, a program and no checkpoint"):
        load_torch(tmp_path / "evil.pth")
    assert victim.read_text() == "untouched" and "Traceback" not in capsys.readouterr().err


class Shared(torch.nn.Module):
    """Shared tensors, views of one storage, a buffer that is not saved otherwise, lists and dicts beside them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight
        whole = torch.arange(12.0)
        self.register_buffer("low", whole[:6].view(2, 3).t())
        self.register_buffer("high", whole[6:])
        self.register_buffer("step", torch.tensor(7), persistent=False)
        self.names, self.sizes, self.table = ["a", "b"], [1, 2], {"x": torch.ones(1)}
        self.inner = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.BatchNorm1d(3)), torch.nn.ReLU()])

    def forward(self, x: torch.Tensor):
        return self.b(self.a(x)) + self.low.sum() + self.table["x"] + self.sizes[0]


@pytest.mark.parametrize("kind", ["traced, fp16", "scripted", "scripted, fp16", "scripted, bf16", "shared"])
def test_archive_read_without_running_it_gives_the_names_and_values_that_pytorch_gives(kind, tmp_path):
    path = tmp_path / "RN50.pt"
    if kind == "traced, fp16":
        save_archive(randomised(small_clip()), path)
    else:
        module = Shared() if kind == "shared" else randomised(small_clip())
        module = module.half() if "fp16" in kind else module.bfloat16() if "bf16" in kind else module
        quiet(lambda: torch.jit.script(module).save(path))
    theirs = quiet(torch.jit.load, path).state_dict()
    ours = read_weights(path).tensors
    assert set(ours) == set(theirs) and len(ours) > 8
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_archive_of_old_pytorch_is_refused_in_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "old.pt", "w") as archive:
        archive.writestr("old/model.json", "{}")
        archive.writestr("old/tensors/0", b"1234")
    with pytest.raises(ValueError, match=r"old\.pt is a TorchScript archive of PyTorch before 1\.4.*state_dict\(\)"):
        load_torch(tmp_path / "old.pt")


def rewritten(source: Path, target: Path, compress: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """The same zip file with other entries in place of some, or compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compress) as new:
        for info in old.infolist():
            name = info.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(info.filename, entries.get(name, old.read(info)))
    return target


def with_pickle(path: Path, pickle: bytes) -> Path:
    """A checkpoint of 100 numbers whose pickle is `pickle`."""
    torch.save({"w": torch.arange(100.0)}, path.with_suffix(".plain"))
    return rewritten(path.with_suffix(".plain"), path, data_pkl=pickle)


def peak_of(function) -> int:
    """Bytes that this process's memory peak grows by in a call."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_compressed_checkpoint_is_refused_before_a_byte_is_unpacked(tmp_path):
    torch.save({"w": torch.zeros(20_000_000)}, tmp_path / "plain.pth")
    path = rewritten(tmp_path / "plain.pth", tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)

    def read():
        with pytest.raises(ValueError, match=r"bomb\.pth is damaged, or holds compressed entries .*torch\.save stores"):
            load_torch(path)

    assert peak_of(read) < 50 << 20


def test_archive_whose_directory_claims_more_than_the_file_holds_is_refused(tmp_path):
    torch.save({"w": torch.zeros(10_000)}, tmp_path / "plain.pth")
    content = bytearray((tmp_path / "plain.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "plain.pth") as archive:
        start = archive.start_dir
    for at in range(start, len(content) - 46):
        if content[at : at + 4] == b"PK\1\2" and content[at + 46 :].startswith(b"plain/data/0"):
            content[at + 20 : at + 28] = (2_000_000_000).to_bytes(4, "little") * 2
    (tmp_path / "claims.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"claims\.pth is damaged, .* claims to hold 2\d+ bytes, but is \d+ bytes"):
        load_torch(tmp_path / "claims.pth")


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuKdtQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HUGE = b"\x8a\x06" + (10**12).to_bytes(6, "little")
PICKLES = {
    "a stack of empty dicts": b"\x80\2" + b"}" * 3_000_000 + b".",
    "marks without end": b"(" * 3_000_000 + b".",
    "text of four gigabytes": b"X\xff\xff\xff\xff.",
    "dicts of dicts that unfold without end": b"}q\0"
    + b"".join(b"(h\0h\0h\0h\0tq\0" if n else b"}q\0" for n in range(40))
    + b".",
    "a list in itself": b"]q\0h\0a.",
    "keys that hash without end": b"}(" + b")" + b"q\0h\0\x86" * 60 + b"Ns.",
    "texts encoded over and over": b"X\0\0\x10\0"
    + b"a" * (1 << 20)
    + b"q\0X\6\0\0\0latin1q\1c_codecs\nencode\nq\2"
    + b"h\2h\0h\1\x86R" * 2000
    + b".",
    "a set of a tensor's 10^12 values": b"c__builtin__\nset\n"
    + REBUILD
    + b"("
    + STORAGE
    + b"K\0"
    + HUGE
    + b"\x85K\0\x85\x89Nt"
    + b"R\x85R.",
    "a tensor beyond its storage": REBUILD + b"(" + STORAGE + b"K\0K\xff\x85K\1\x85\x89NtR.",
    "a tensor at a negative offset": REBUILD + b"(" + STORAGE + b"J\xff\xff\xff\xffK\x05\x85K\1\x85\x89NtR.",
    "a tensor of negative stride": REBUILD + b"(" + STORAGE + b"K\x09K\x05\x85J\xff\xff\xff\xff\x85\x89NtR.",
    "a storage of another size": b"}X\1\0\0\0w"
    + REBUILD
    + b"("
    + STORAGE.replace(b"Kd", HUGE)
    + b"K\0K\5\x85K\1\x85\x89NtRs.",
    "an allocation of a terabyte": b"ctorch.storage\nUntypedStorage\n" + HUGE + b"\x85R.",
    "a tensor class that allocates": b"ctorch\nFloatTensor\n" + HUGE + b"\x85R.",
    "a bytearray of a terabyte": b"c__builtin__\nbytearray\n" + HUGE + b"\x85R.",
    "code": b"cos\nsystem\nX\1\0\0\0x\x85R.",
    "code by another instruction": b"ios\nsystem\n.",
    "an object of TorchScript that is called": b"c__torch__.A\nB\n)R.",
    "a name as content": b"ccollections\nOrderedDict\n.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickle_is_one_line_and_costs_neither_time_nor_memory(name, tmp_path):
    path = with_pickle(tmp_path / "evil.pth", PICKLES[name])

    def read():
        with pytest.raises(ValueError, match=r"evil\.pth (is|holds|asks|claims) ") as caught:
            load_torch(path)
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)

    assert peak_of(read) < 700 << 20


def test_options_beside_weights_are_read_as_values_and_not_as_an_object(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "args": Namespace(window=12, lr=0.1)}, tmp_path / "state.pth")
    args = load_torch(tmp_path / "state.pth")["args"]
    assert type(args) is Record and args.state == {"window": 12, "lr": 0.1}
    assert list(read_weights(tmp_path / "state.pth").tensors) == ["w"]


def test_memo_of_two_billion_places_costs_one(tmp_path):
    path = with_pickle(tmp_path / "odd.pth", b"}r\xff\xff\xff\x7f.")
    assert peak_of(lambda: load_torch(path)) < 50 << 20 and load_torch(path) == {}


def odd_tensors() -> dict[str, torch.Tensor]:
    dense = torch.eye(3)
    return {
        "a sparse tensor": dense.to_sparse(),
        "sparse tensor": dense.to_sparse_csr(),
        "a quantised tensor": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "a tensor without values, on the meta device": torch.empty(3, device="meta"),
        "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
        "lazy": torch.nn.LazyLinear(3).weight,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["a sparse tensor", "sparse tensor", "a quantised tensor", "lazy", "conjugated",
                                  "a tensor without values, on the meta device"])  # fmt: skip
def test_tensor_that_is_no_plain_one_is_refused_by_name(what, tmp_path):
    torch.save({"state_dict": {"neck.x": torch.ones(2), "neck.odd": odd_tensors()[what]}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"odd\.pth holds .*{what}.*'state_dict\.neck\.odd'.* make it a plain tensor"):
        load_torch(tmp_path / "odd.pth")
    with pytest.raises(TypeError, match="obj holds"):
        save_atomic({"odd": odd_tensors()[what]}, tmp_path / "mine.pth")
    assert not (tmp_path / "mine.pth").exists()


VALUES = {
    "tensors": {
        "view": torch.arange(12.0).view(3, 4)[1:, ::2],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(3).half(),
        "bf16": torch.ones(3).bfloat16(),
        "uint16": torch.ones(3, dtype=torch.uint16),
        "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "complex": torch.ones(2, dtype=torch.complex64),
    },
    "plain": [1, -1, 2**40, 2**70, 0.5, True, None, "text", "ü", b"bytes", (1, 2, 3, 4), {3}, 1j, {1: {2: []}}],
    "torch": [torch.Size([2, 3]), torch.float16, torch.device("cpu"), torch.device("cuda", 1)],
}


@pytest.mark.parametrize("zipped", [True, False])
def test_every_plain_value_comes_back_as_pytorch_reads_it(zipped, tmp_path):
    path = tmp_path / "values.pth"
    values = OrderedDict(VALUES)
    if not zipped:  # PyTorch cannot read these dtypes in its older format
        values["tensors"] = {n: t for n, t in VALUES["tensors"].items() if n not in ("uint16", "fp8")}
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    ours, theirs = load_torch(path), torch.load(path, weights_only=True)
    assert type(ours) is type(theirs) and ours["plain"] == theirs["plain"] and ours["torch"] == theirs["torch"]
    for name, tensor in theirs["tensors"].items():
        mine = ours["tensors"][name]
        assert mine.dtype == tensor.dtype and mine.stride() == tensor.stride() and mine.shape == tensor.shape
        assert torch.equal(mine.to(torch.complex64), tensor.to(torch.complex64)), name


@pytest.mark.parametrize("zipped", [True, False])
def test_shared_memory_parameters_and_metadata_come_back(zipped, tmp_path):
    model = torch.nn.BatchNorm2d(3)
    state = model.state_dict()
    weight = torch.nn.Parameter(torch.ones(4))
    torch.save({"model": state, "p": weight, "same": weight, "part": weight.data[1:]}, tmp_path / "a.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    read = load_torch(tmp_path / "a.pth")
    assert read["model"]._metadata == state._metadata and isinstance(read["p"], torch.nn.Parameter)
    assert read["same"] is read["p"] and read["p"].requires_grad
    read["part"].fill_(5)
    assert read["p"].tolist() == [1, 5, 5, 5]


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_truncated_file_of_the_older_format_is_one_error(keep, tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"w": torch.arange(10_000.0)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"old\.pth is damaged"):
        load_torch(path)


def test_older_format_cannot_claim_more_memory_than_the_file_is_long(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"w": torch.arange(100.0)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"KdNt") == 1
    path.write_bytes(content.replace(b"KdNt", HUGE + b"Nt"))
    with pytest.raises(ValueError, match=r"old\.pth is damaged .*too short"):
        load_torch(path)

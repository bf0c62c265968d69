"""`auto` takes the kernels where they were measured to be faster, and unmeasured only where they should be."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import CPU, pretended_gpu

from fastris import dispatch, tuned
from fastris.dispatch import resolve
from fastris.tuned import choices, files
from fastris.tuned.files import Row, Tuning, identity_of, own_file, read
from fastris.tuned.sizes import LARGE, MIDDLE, SMALL, bucket_of

GPU = "Made-up GPU 9000"
OPERATOR = "upsample2x_conv3x3"


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU of which nothing was measured; its attributes may be changed."""
    properties = SimpleNamespace(name=GPU, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("FASTRIS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "CARDS", tmp_path / "cards")
    tuned.forget()
    yield properties
    tuned.forget()


def row(torch_seconds: float, triton_seconds: float | None, takes: bool, bucket: str = LARGE, **more) -> Row:
    return Row(OPERATOR, "bfloat16", bucket, torch_seconds, 0.01, triton_seconds, 0.01, takes, **more)


def tuning(*rows: Row, **changes: str) -> Tuning:
    identity = identity_of(GPU)
    identity = type(identity)(**(vars(identity) | changes))
    tiles = {f"upsample_conv gather//bfloat16/{2**16}": {"blocks": {"BLOCK_P": 8}, "num_warps": 4, "num_stages": 1}}
    return Tuning(identity, {row.key: row for row in rows}, tiles)


def prefers(bucket: str = LARGE, operator: str = OPERATOR, precision: str = "bfloat16") -> bool:
    return tuned.preference(operator, 0, precision, bucket).triton


def test_buckets_are_few_and_none_is_many():
    assert [bucket_of(batch) for batch in (0, 4, 5, 16, 17, 1000, None)] == [SMALL] * 2 + [MIDDLE] * 2 + [LARGE] * 3


def test_unmeasured_gpu_is_spared_what_loses_on_paper(gpu, monkeypatch):
    for operator in (name for name, entry in dispatch.OPERATORS.items() if entry.kernels):
        for precision in tuned.PRECISIONS:
            assert not prefers(SMALL, operator, precision), "launch-bound"
    assert prefers() and prefers(MIDDLE)
    assert not prefers(operator="cross_attention", precision="float32")
    assert prefers(operator="cross_attention", precision="float32 by TF32")
    assert not prefers(precision="float32") and prefers(precision="float32 by TF32")
    gpu.major = 8
    tuned.forget()
    assert prefers(precision="float32"), "of H100 and H200 alone"
    gpu.major = 9
    monkeypatch.setattr(torch.version, "hip", "7.0")
    tuned.forget()
    assert prefers(precision="float32"), "an AMD card of that number is none of them"
    assert "fastris tune" in tuned.preference("cross_attention", 0, "float32", LARGE).why


def test_measurement_takes_the_place_of_the_table(gpu):
    tuning(row(2e-3, 1e-3, True, SMALL), row(1e-3, 0.99e-3, False)).write(own_file(GPU))
    assert prefers(SMALL) and not prefers(LARGE)
    assert prefers(MIDDLE), "of this one only the table knows"
    assert tuned.preference(OPERATOR, 0, "bfloat16", SMALL).why == "measured: 2.00x as fast as the torch path"
    assert "noise" in tuned.preference(OPERATOR, 0, "bfloat16", LARGE).why


def test_kernels_that_could_not_be_measured_are_not_taken(gpu):
    tuning(row(1e-3, None, False, note="their numbers are wrong")).write(own_file(GPU))
    assert tuned.preference(OPERATOR, 0, "bfloat16", LARGE) == (False, "their numbers are wrong")


def test_file_is_read_once_and_its_tiles_reach_the_kernels(gpu, monkeypatch):
    seen, reads, made = [], [], files.read
    monkeypatch.setattr(files, "read", lambda path: reads.append(path) or made(path))
    monkeypatch.setattr(choices, "_use_tiles", lambda index, tiles: seen.append((index, dict(tiles))))
    expected = tuning(row(2e-3, 1e-3, True))
    expected.write(own_file(GPU))
    for _ in range(3):
        assert prefers() and prefers(SMALL, "cross_attention") is False
    assert seen == [(0, expected.tiles)] and reads == [own_file(GPU)]


def test_tiles_that_the_kernels_do_not_understand_are_passed_over_with_one_notice(gpu):
    pytest.importorskip("triton")
    unknown = tuning(row(1e-3, 2e-3, False))
    unknown.tiles["no choice"] = next(iter(unknown.tiles.values()))
    unknown.write(own_file(GPU))
    with pytest.warns(UserWarning, match=r"tiles are not those of these kernels.*Run `fastris tune`") as notices:
        assert prefers() and prefers(MIDDLE)
    assert len(notices) == 1


def test_operators_give_measured_tiles_to_their_kernels(gpu):
    configs = pytest.importorskip("fastris.kernels.configs")
    tuning(row(2e-3, 1e-3, True)).write(own_file(GPU))
    try:
        assert prefers()
        (measured,) = configs._replacements[0].values()
        assert measured[0][1].as_dict() == {"blocks": {"BLOCK_P": 8}, "num_warps": 4, "num_stages": 1}
    finally:
        configs.replace({}, device=0)


def test_written_file_is_read_as_it_was(gpu, tmp_path):
    written = tuning(row(2e-3, 1e-3, True), row(1e-3, None, False, SMALL, note="out of memory"))
    written.write(tmp_path / "file.json")
    assert read(tmp_path / "file.json") == written


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"torch": "1.0"}, "PyTorch 1.0 and not"),
        ({"triton": "2.0"}, "Triton 2.0 and not"),
        ({"driver": "1"}, "driver 1 and not"),
        ({"kernels": "0" * 16}, "kernels 0000"),
        ({"gpu": "Another GPU"}, "GPU Another GPU and not Made-up GPU 9000"),
    ],
)
def test_file_from_elsewhere_is_passed_over_with_one_notice(gpu, change, told):
    tuning(row(1e-3, 2e-3, False), **change).write(own_file(GPU))
    with pytest.warns(UserWarning, match=f"{told}.*Run `fastris tune`") as notices:
        assert [prefers(), prefers(MIDDLE), prefers()] == [True] * 3
    assert len(notices) == 1 and str(own_file(GPU)) in str(notices[0].message)


def damaged(content: dict, change) -> bytes:
    change(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("rows"),
        lambda content: content.update(format=99),
        lambda content: content["identity"].pop("gpu"),
        lambda content: content["identity"].update(torch=3),
        lambda content: content["rows"][0].update(torch=float("nan")),
        lambda content: content["rows"][0].update(torch="fast"),
        lambda content: content["rows"][0].update(torch=10**400),
        lambda content: content["rows"][0].update(triton=-1.0),
        lambda content: content["rows"][0].update(takes_triton="yes"),
        lambda content: content["rows"][0].update(operator="no_such"),
        lambda content: content["rows"][0].update(unknown=1),
        lambda content: content["rows"].append(7),
        lambda content: content["tiles"].update(x={"blocks": {"B": "8"}, "num_warps": 4, "num_stages": 1}),
        lambda content: content.update(tiles=[]),
    ],
)
def test_damaged_file_is_passed_over_with_one_notice(gpu, change):
    path = own_file(GPU)
    tuning(row(1e-3, 2e-3, False)).write(path)
    path.write_bytes(damaged(json.loads(path.read_text()), change))
    with pytest.warns(UserWarning, match=r"damaged or no file of `fastris tune` .*Run `fastris tune`") as notices:
        assert prefers() and prefers(MIDDLE)
    assert len(notices) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 10**5, b"[]", b" " * (2**20 + 1)], ids=len)
def test_file_that_is_no_such_thing_is_passed_over(gpu, content):
    own_file(GPU).parent.mkdir(parents=True)
    own_file(GPU).write_bytes(content)
    with pytest.warns(UserWarning, match="Run `fastris tune`"):
        assert prefers()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_would_be_read_without_end_is_passed_over(gpu, kind):
    path = own_file(GPU)
    path.parent.mkdir(parents=True)
    {"device": lambda: path.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.warns(UserWarning, match=f"it is a {kind}.*Run `fastris tune`"):
        assert prefers()


def test_file_that_comes_with_fastris_holds_for_its_gpu_and_kernels(gpu):
    path = files.CARDS / files.file_name(GPU)
    tuning(row(2e-3, 1e-3, True, SMALL), torch="1.0", driver="1").write(path)
    assert prefers(SMALL), "whatever else is installed"
    tuning(row(1e-3, 2e-3, False, SMALL)).write(own_file(GPU))
    tuned.forget()
    assert not prefers(SMALL), "the user's own comes first"
    own_file(GPU).unlink()
    tuning(row(2e-3, 1e-3, True, SMALL), kernels="0" * 16).write(path)
    tuned.forget()
    assert not prefers(SMALL), "measured with other kernels"


def test_files_that_come_with_fastris_can_be_read():
    for path in files.CARDS.glob("*.json"):
        assert files.file_name(read(path).identity.gpu) == path.name


def test_folder_follows_the_platform_and_the_users_word(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTRIS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert own_file("NVIDIA H100 80GB HBM3") == tmp_path / "xdg" / "fastris" / "tuned" / "NVIDIA_H100_80GB_HBM3.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "fastris"
    monkeypatch.setenv("FASTRIS_CACHE_DIR", "~/mine")
    assert files.cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("named", ["", "~no-such-user/cache"])
def test_user_without_a_home_folder_breaks_no_run_and_is_told_what_to_name(gpu, monkeypatch, named):
    class HomelessPath(type(files.CARDS)):
        def expanduser(self):
            raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files, "Path", HomelessPath)
    monkeypatch.setenv("FASTRIS_CACHE_DIR", named)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert prefers()
    with pytest.raises(ValueError, match=r"no home folder .* the variable FASTRIS_CACHE_DIR"):
        own_file(GPU)


def test_batch_and_preference_decide_before_any_proof(monkeypatch):
    with pretended_gpu() as proofs:
        asked = []

        def preference(operator, index, precision, bucket):
            asked.append((operator, precision, bucket))
            return tuned.Preference(bucket != SMALL, "")

        monkeypatch.setattr(tuned, "preference", preference)
        assert resolve(OPERATOR, CPU, torch.bfloat16, "auto", 4) == "torch"
        assert asked == [(OPERATOR, "bfloat16", SMALL)] and not proofs.made
        assert resolve(OPERATOR, CPU, torch.bfloat16, "triton", 4) == "triton", "whoever asks for it gets it"
        assert resolve(OPERATOR, CPU, torch.bfloat16, "auto", 16) == "triton"


def test_float32_follows_the_switch_for_tf32_at_every_call(monkeypatch):
    with pretended_gpu():
        monkeypatch.setattr(tuned, "preference", lambda *asked: tuned.Preference(asked[2] != "float32", ""))
        before = torch.backends.cuda.matmul.fp32_precision
        taken = []
        try:
            for setting in ("ieee", "tf32", "ieee"):
                torch.backends.cuda.matmul.fp32_precision = setting
                taken.append(resolve(OPERATOR, CPU, torch.float32))
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        assert taken == ["torch", "triton", "torch"]


def test_open_batch_under_compile_guards_on_its_bucket_alone(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def double_or_negate(x):
        return 2 * x if resolve(OPERATOR, x.device, x.dtype, "auto", x.shape[0]) == "triton" else -x

    torch.compiler.reset()
    with pretended_gpu():
        monkeypatch.setattr(tuned, "preference", lambda *asked: tuned.Preference(asked[3] != SMALL, ""))
        compiled = torch.compile(double_or_negate, fullgraph=True, backend=counter, dynamic=True)
        assert [compiled(torch.ones(batch))[0].item() for batch in (20, 33, 64)] == [2.0] * 3
        assert counter.frame_count == 1
        assert compiled(torch.ones(3))[0].item() == -1.0
        assert counter.frame_count == 2

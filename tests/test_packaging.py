"""The package as a stranger gets it: a wheel in a fresh environment, beside Hugging Face's `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def fresh_environment(tmp_path_factory) -> Path:
    """An empty virtual environment that sees this one's dependencies (torch is large) but not this checkout."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    neighbour = Path(site) / "kernels"
    neighbour.mkdir()
    (neighbour / "__init__.py").write_text("get_kernel = 'somebody else'\n")

    sources = folder / "sources"  # a copy, so that no build folder of the checkout leaks into the wheel
    shutil.copytree(ROOT, sources, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    run(sys.executable, "-m", "pip", "wheel", sources, "--no-deps", "--no-build-isolation", "-w", folder, cwd=folder)
    (wheel,) = folder.glob("fastris-*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder


@pytest.mark.slow
def test_wheel_brings_the_kernels_as_part_of_fastris(fresh_environment):
    python = fresh_environment / "venv" / "bin" / "python"
    code = "import fastris, fastris.kernels.common as c; print(fastris.__file__); print(c.__file__)"
    package, kernels = run(python, "-c", code, cwd=fresh_environment).splitlines()
    assert package.startswith(str(fresh_environment)), package
    assert kernels.startswith(str(fresh_environment)), kernels


@pytest.mark.slow
def test_wheel_leaves_the_package_named_kernels_alone(fresh_environment):
    python = fresh_environment / "venv" / "bin" / "python"
    assert run(python, "-c", "import kernels; print(kernels.get_kernel)", cwd=fresh_environment) == "somebody else"


PACKAGE = "import fastris.bench, pathlib; print(pathlib.Path(fastris.bench.__file__).parent)"


@pytest.mark.slow
def test_installed_wheel_benchmarks_without_a_checkout(fresh_environment):
    bench = [fresh_environment / "venv" / "bin" / "fastris", "bench", "--op", "loss", "--arms", "torch", "--quick"]
    printed = run(*bench, "device=cpu", "rounds=2", f"json={fresh_environment / 'loss.json'}", cwd=fresh_environment)
    assert "loss alone" in printed and "unknown revision" in printed
    package = run(fresh_environment / "venv" / "bin" / "python", "-c", PACKAGE, cwd=fresh_environment)
    assert not (Path(package) / "results").exists(), "a wheel holds no results"


@pytest.mark.slow
def test_installed_command_prints_its_help(fresh_environment):
    assert "demo" in run(fresh_environment / "venv" / "bin" / "fastris", "--help", cwd=fresh_environment)


SHIPPED = Path("fastris", "pretrained", "shapes")
SHIPPED_FILES = {"config.json", "model.safetensors", "README.md"}


def test_the_shipped_model_is_package_data_and_small() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fastris"]
    assert all(any(SHIPPED.joinpath(name).match(f"fastris/{each}") for each in patterns) for name in SHIPPED_FILES)
    if (ROOT / SHIPPED).exists():
        files = {path.name: path.stat().st_size for path in (ROOT / SHIPPED).iterdir()}
        assert files.keys() == SHIPPED_FILES and sum(files.values()) < 6_000_000


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / SHIPPED).exists(), reason="the checkout has no shipped model")
def test_installed_wheel_predicts_without_a_model_of_ones_own(fresh_environment: Path) -> None:
    from PIL import Image

    Image.new("RGB", (96, 96), "white").save(fresh_environment / "page.png")
    command = [fresh_environment / "venv" / "bin" / "fastris", "predict", "page.png", "the red circle", "device=cpu"]
    assert "the red circle" in run(*command, cwd=fresh_environment)


HEAVY = "[m for m in ('open_clip', 'triton.language', 'cv2', 'huggingface_hub', 'PIL') if m in sys.modules]"


def test_import_costs_little_beyond_torch_and_loads_no_heavy_package():
    code = (
        f"import sys, time, torch; before = {HEAVY}; start = time.perf_counter(); import fastris;"
        f"print(time.perf_counter() - start); print({HEAVY} == before)"
    )
    took, nothing_new = run(sys.executable, "-c", code, cwd=ROOT).splitlines()
    assert nothing_new == "True"
    assert float(took) < 0.5


def test_kernels_folder_is_no_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastris" / "kernels").is_symlink()


def test_every_package_folder_is_listed_for_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "fastris").rglob("__init__.py")}
    bench = {
        ".".join(("fastris", *init.parent.relative_to(ROOT).parts)) for init in (ROOT / "bench").rglob("__init__.py")
    }
    assert listed == folders | bench | {"fastris.kernels"}

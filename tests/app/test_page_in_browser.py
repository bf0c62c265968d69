"""The page as somebody uses it: the real command, a real browser, and nothing from outside of this machine.

``FASTRIS_SCREENSHOT=docs/images/app.png python -m pytest -n 0 -m slow tests/app/test_page_in_browser.py`` takes the
picture that the documentation shows.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if CHROMIUM.exists() else [str(CHROMIUM)]
ROOT = Path(__file__).parents[2]
WAIT = 60_000  # milliseconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"a test in a real browser needs {', '.join(MISSING)}"),
]


@pytest.fixture
def command() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a user starts it, and the address that it prints."""
    arguments = ["-m", "fastris", "app", "port=0", "upload_mb=2", "upload_megapixels=4"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HTTP_PROXY": "http://127.0.0.1:9"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *arguments], env=env, **pipes) as process:
        try:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line.startswith("open http://127.0.0.1:"), line + process.stderr.read()  # type: ignore[union-attr]
            yield process, line.split()[1]
        finally:
            process.kill()


@pytest.fixture
def tab(command: tuple[Any, str]) -> Iterator[tuple[Any, list[str]]]:
    """The page in a browser, and the addresses of all that it has asked for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = [f"--{flag}" for flag in [*FLAGS.split(), "disable-sync"]]
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        page = browser.new_page(viewport={"width": 1240, "height": 860})
        page.set_default_timeout(WAIT)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(command[1])
        yield page, asked
        browser.close()


def pixels(page: Any, before: str = "") -> tuple[np.ndarray, str]:
    """What the page shows beside the phrases, (H, W, 3), and its address; waits until that is not ``before``."""
    image = page.locator("#masks-0 img")
    image.wait_for()
    page.wait_for_function("old => document.querySelector('#masks-0 img').src !== old", arg=before)
    source = image.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")).astype(int), source


def share(page: Any) -> float:
    return float(page.locator("#table-0 tr:nth-child(2) td:nth-child(5)").inner_text().rstrip("%"))


def upload(page: Any, path: Path) -> None:
    """Drop a picture, on the place of the one that is there."""
    if (clear := page.locator("#picture button[aria-label='Clear']")).count():
        clear.click()
    page.locator("#picture input[type=file]").set_input_files(path)


def test_type_a_phrase_see_the_mask_move_the_sliders_take_the_files(
    command: tuple[subprocess.Popen[str], str], tab: tuple[Any, list[str]], tmp_path: Path
) -> None:
    from fastris.app.examples import write_examples

    (path, text), *_ = write_examples(tmp_path)
    first = text.splitlines()[0]
    page, asked = tab
    upload(page, Path(path))
    plain, shown = pixels(page)
    np.testing.assert_array_equal(plain, np.asarray(Image.open(path)))
    assert "picture encoded once" in page.inner_text("#times-0")

    page.fill("#phrases textarea", first)
    page.press("#phrases textarea", "Shift+Enter")
    masked, shown = pixels(page, before=shown)
    assert 0.02 < (masked != plain).any(-1).mean() < 0.5
    page.locator("#table-0", has_text=first).wait_for()
    took = page.locator("#table-0 tr:nth-child(2) td:nth-child(6)").inner_text()
    assert "each phrase then took" in page.inner_text("#times-0")

    page.fill("#phrases textarea", text)
    page.click("#find")
    more, shown = pixels(page, before=shown)
    assert (more != masked).any() and page.locator("table.found tr").count() == 1 + len(text.splitlines())
    assert page.locator("#table-0 tr:nth-child(2) td:nth-child(6)").inner_text() == took, "it was asked again"
    _take_screenshot(page, tmp_path)

    area = share(page)
    page.fill("#threshold-0 input[type=number]", "0.7")
    page.press("#threshold-0 input[type=number]", "Tab")
    tighter, shown = pixels(page, before=shown)
    assert (tighter != more).any() and share(page) < area
    page.fill("#opacity input[type=number]", "0")
    page.press("#opacity input[type=number]", "Tab")
    outlines, shown = pixels(page, before=shown)
    assert 0 < (outlines != plain).any(-1).mean() < (tighter != plain).any(-1).mean()

    page.click("#make-0")
    link = page.locator("#files-0 a[href*='masks.zip']").first
    link.wait_for()
    with zipfile.ZipFile(io.BytesIO(page.request.get(link.get_attribute("href")).body())) as archive:
        assert sum(name.endswith("_mask.png") for name in archive.namelist()) == len(text.splitlines())

    _refuse_what_is_too_large(page, tmp_path)
    outside = [url for url in asked if not url.startswith((command[1], "data:", "blob:"))]
    assert asked and not outside, outside
    command[0].send_signal(signal.SIGINT)
    _, errors = command[0].communicate(timeout=WAIT / 1000)
    assert command[0].returncode == 130
    assert [line.split(":")[1] for line in errors.splitlines()] == [" warning", " stopped"], errors


def _refuse_what_is_too_large(page: Any, folder: Path) -> None:
    many, heavy = folder / "many.png", folder / "heavy.png"
    Image.new("1", (2100, 2000)).save(many)
    Image.effect_noise((1700, 1700), 90).save(heavy)
    upload(page, many)
    page.locator("#message .mistake", has_text="many.png is 2100 x 2000 pixels").wait_for()
    upload(page, heavy)
    page.get_by_text("maximum").first.wait_for()


def _take_screenshot(page: Any, folder: Path) -> None:
    path = Path(os.environ.get("FASTRIS_SCREENSHOT") or folder / "app.png")
    page.mouse.move(0, 0)
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        assert image.width == 1240 and np.unique(np.asarray(image.convert("L"))).size > 100

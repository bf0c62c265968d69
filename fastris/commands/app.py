"""``fastris app``: a page in the browser, on which a picture is dropped and phrases are typed."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastris.app.limits import Limits
from fastris.inference.masks import check_threshold
from fastris.options.declare import option
from fastris.runtime.extras import need
from fastris.runtime.plain import printable
from fastris.weights.shipped import NAME, NOTICE, shipped_model

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine reaches."""


@dataclass
class AppConfig:
    """Opens a page for the browser: drop a picture, type phrases, and see the masks in colours.

    fastris app
    fastris app model=best_model.pth
    fastris app model=runs/first model_b=runs/second

    The picture is encoded once, and each further phrase is answered from that. Sliders redraw without asking the model.
    Only this machine reaches the page, and it needs no internet; host=0.0.0.0 lets all in who reach this machine.
    Ctrl-C ends it. Needs pip install 'fastris[app]'.
    """

    model: str | None = option(
        None,
        "model folder, CRIS checkpoint (.pth, .safetensors) or Hugging Face id; without it the tiny model that comes "
        "with fastris and knows drawn shapes only",
        default_text="shapes",
    )
    model_b: str | None = option(None, "another model, asked the same, side by side", default_text="none")
    host: str = option("127.0.0.1", "address to answer on; 0.0.0.0: all addresses of this machine")
    port: int = option(7860, "port to answer on; 0: any that is free")
    browser: bool = option(False, "open the page in the browser")
    threshold: float = option(
        None, "where the sliders begin: pixels above it belong to the mask", "probability, 0..1",
        default_text="each system's",
    )  # fmt: skip
    upload_mb: float = option(32.0, "largest file that is taken", "MB")
    upload_megapixels: float = option(50.0, "largest picture that is taken", "million pixels")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "of weights and arithmetic", default_text="the model's"
    )

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must lie in 0..65535")
        Limits(self.upload_mb, self.upload_megapixels)


def run(config: AppConfig) -> None:
    """Load the models, answer on the page until Ctrl-C or SIGTERM, and leave no file behind."""
    port = free_port(config.host, config.port)  # before anything slow
    if config.model is None:
        shipped_model()
    try:
        with tempfile.TemporaryDirectory(prefix="fastris-app-", ignore_cleanup_errors=True) as folder:
            _keep_to_ourselves(folder)
            need("gradio", "app", "for fastris app")
            _answer(config, port, Path(folder))
    except KeyboardInterrupt:
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            print("fastris app: stopped", file=sys.stderr, flush=True)  # Python would wait for Gradio's threads,
            os._exit(130)  # which wait for browsers that are still open
        raise


def _answer(config: AppConfig, port: int, folder: Path) -> None:
    """Answer until a signal comes, which raises KeyboardInterrupt."""
    page, app = _page(config, folder)
    from fastris.app.page import close, serve
    from fastris.runtime.interrupt import StopSignal

    with StopSignal("") as stop, stop.at_once():
        try:
            serve(page, app, config.host, port, config.browser)
            print(_welcome(config.host, port), flush=True)
            threading.Event().wait()
        finally:
            close(page)


def free_port(host: str, port: int) -> int:
    """The port, or one that is free for 0. Raises ValueError for one that is taken, or a host that is not here."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise ValueError(f"host={host} is no address ({error.strerror}); leave it out, or give 0.0.0.0") from None
    except PermissionError:
        raise ValueError(f"port={port} is for the system alone; give one from 1024 on") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"port={port} cannot be had on {host} ({why}); give another, or port=0 for any") from None


def _keep_to_ourselves(folder: str) -> None:
    """Tell Gradio, before it is imported, to report nothing, to keep its files here, and to reach this machine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = folder
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOCAL)))


def _page(config: AppConfig, folder: Path) -> tuple[Any, Any]:
    """The page and the app behind it."""
    from fastris.app.examples import write_examples
    from fastris.app.page import build
    from fastris.app.visit import App, Model
    from fastris.inference.segmenter import Segmenter

    models = []
    for source in [config.model] if config.model_b is None else [config.model, config.model_b]:
        segmenter = Segmenter.from_pretrained(
            source, device=config.device, dtype=config.dtype, threshold=config.threshold
        )
        models.append(Model(source or NAME, segmenter))
        models[-1].warm_up()
    app = App(models, Limits(config.upload_mb, config.upload_megapixels))
    (folder / "examples").mkdir()
    examples = write_examples(folder / "examples")
    notice = f"*{NOTICE[0].upper()}{NOTICE[1:]}.*" if config.model is None else ""
    return build(app, [model.segmenter.threshold for model in models], examples, notice), app


def _welcome(host: str, port: int) -> str:
    if host in LOCAL:
        return f"open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends it"
    return f"answering all who reach port {port} of {printable(host)}; Ctrl-C ends it"

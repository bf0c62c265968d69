"""The page itself, in Gradio: what is where, and what happens on a click. All else is beside this file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from fastris.app.downloads import write_files
from fastris.app.drawing import drawn, message, table, times
from fastris.app.limits import LONGEST
from fastris.app.visit import App, Visit
from fastris.runtime.plain import printable

HEAD = "# fastris: a picture and phrases in, masks out"
STALE = 3600  # seconds after which a visit that nobody goes on with is forgotten, and its files are deleted
VISITS = 50  # that are remembered at a time: each holds a picture and its encodings
CSS = """
#message .mistake { color: var(--error-text-color, #b91c1c); font-weight: 600; }
#message .note { color: var(--body-text-color-subdued); font-size: 0.9em; }
table.found { width: 100%; margin: 0; border-collapse: collapse; }
table.found, table.found * { border: 0 !important; }
table.found tr { border-bottom: 1px solid var(--border-color-primary) !important; }
table.found th, table.found td { padding: 3px 8px; text-align: left; }
table.found td:last-child { white-space: nowrap; }
table.found th { color: var(--body-text-color-subdued); font-weight: 500; }
table.found td.missing { opacity: 0.55; }
.swatch { display: inline-block; width: 1em; height: 1em; border-radius: 3px; vertical-align: middle; }
footer { display: none !important; }
"""


class Asking(NamedTuple):
    """What one asks with."""

    picture: Any
    phrases: Any
    find: Any
    said: Any
    opacity: Any
    scenes: Any


class Panel(NamedTuple):
    """What belongs to one model."""

    image: Any
    table: Any
    times: Any
    threshold: Any
    make: Any
    files: Any

    @property
    def shown(self) -> list[Any]:
        """What :func:`_show` fills in."""
        return [self.image, self.table, self.times, self.files]


def build(app: App, thresholds: Sequence[float], examples: Sequence[tuple[str, str]], notice: str = "") -> gr.Blocks:
    """The page for these models, with their thresholds to begin with; ``notice`` stands below the title."""
    with gr.Blocks(title="fastris", analytics_enabled=False, delete_cache=(STALE, STALE)) as page:
        gr.Markdown("\n\n".join(filter(None, (HEAD, notice))))
        visit = gr.State(time_to_live=STALE)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                asking = _asking(examples)
            with gr.Column(scale=3 * len(app.models), min_width=320), gr.Row():
                panels = [_panel(app, number, threshold) for number, threshold in enumerate(thresholds)]
        _connect(app, visit, asking, panels, examples)
    return page


def serve(page: gr.Blocks, app: App, host: str, port: int, browser: bool) -> None:
    """Start answering, in threads of Gradio's. Nothing is loaded from elsewhere, and nothing is told to anybody."""
    page.queue(default_concurrency_limit=4)
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        max_file_size=app.limits.bytes,
        state_session_capacity=VISITS,
        theme=gr.themes.Default(primary_hue="pink", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        **_QUIET,
    )


def close(page: gr.Blocks) -> None:
    """Stop answering at once, though browsers keep their connections open."""
    logging.getLogger("uvicorn.error").disabled = True  # it would tell of each that is cut
    server = getattr(page, "server", None)
    if server is not None:
        server.should_exit = server.force_exit = True
        server.thread.join(timeout=2)


_QUIET: dict[str, Any] = {
    "share": False,
    "quiet": True,
    "inline": False,
    "prevent_thread_lock": True,
    "show_error": True,
    "footer_links": [],
    "ssr_mode": False,
    "pwa": False,
    "enable_monitoring": False,
    "mcp_server": False,
}


def _asking(examples: Sequence[tuple[str, str]]) -> Asking:
    picture = gr.Image(
        label="Picture",
        show_label=False,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        placeholder="Drop a picture here, paste it,\nor click to choose one",
        buttons=[],
        height=280,
        elem_id="picture",
    )
    phrases = gr.Textbox(
        label="What to look for, one phrase a line",
        placeholder="the red circle on the left\nthe small square",
        lines=3,
        max_lines=8,
        max_length=LONGEST,
        elem_id="phrases",
    )
    find = gr.Button("Find (Shift+Enter)", variant="primary", elem_id="find")
    said = gr.HTML(elem_id="message", padding=False)
    opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity of the masks", elem_id="opacity")
    thumbnail, samples = gr.Image(render=False, type="filepath"), [[path] for path, _ in examples]
    scenes = gr.Dataset(
        components=[thumbnail], samples=samples, type="index", layout="gallery", label="Drawn scenes to try",
        elem_id="scenes",
    )  # fmt: skip
    return Asking(picture, phrases, find, said, opacity, scenes)


def _panel(app: App, number: int, threshold: float) -> Panel:
    model = app.models[number]
    letter = f"{'AB'[number]}: " if len(app.models) > 1 else ""
    with gr.Column(min_width=280):
        gr.HTML(f"<b>{letter}{escape(printable(model.name))}</b><br>{escape(model.title)}", padding=False)
        image = gr.Image(
            show_label=False,
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id=f"masks-{number}",
        )
        taken = gr.HTML(elem_id=f"times-{number}")
        rows = gr.HTML(elem_id=f"table-{number}")
        label = "Threshold of probability: pixels above it belong to the mask"
        slider = gr.Slider(0, 1, threshold, step=0.01, label=label, elem_id=f"threshold-{number}")
        make = gr.Button("Make files: masks (PNG in a zip) and COCO JSON", size="sm", elem_id=f"make-{number}")
        files = gr.File(
            visible=False, label="Download", file_count="multiple", interactive=False, elem_id=f"files-{number}"
        )
    return Panel(image, rows, taken, slider, make, files)


def _connect(app: App, visit: Any, asking: Asking, panels: list[Panel], examples: Sequence[tuple[str, str]]) -> None:
    """Say what happens when. What the browser sends is taken as it is: a file's path was checked to be an upload."""
    picture, phrases, find, said, opacity, scenes = asking
    sliders = [panel.threshold for panel in panels]
    shown = [each for panel in panels for each in panel.shown]

    def answer(
        visit: Visit | None, picture: dict[str, Any] | None, text: str, alpha: float, *levels: float
    ) -> list[Any]:
        if not picture:
            told = message(["drop, paste or choose a picture first"]) if text.strip() else ""
            return [None, told, *_nothing() * len(panels)]
        name = str(picture.get("orig_name") or Path(picture["path"]).name)
        try:
            visit = app.answer(visit, picture["path"], name, text)
            filled = [each for number, level in enumerate(levels) for each in _show(visit, number, level, alpha)]
        except (ValueError, OSError, RuntimeError) as error:
            return [visit, message([str(error)], mistake=True), *[gr.skip()] * len(shown)]
        return [visit, message(visit.notes), *filled]

    asked = {"fn": answer, "inputs": [visit, picture, phrases, opacity, *sliders], "outputs": [visit, said, *shown]}
    common: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}
    first = {**common, "concurrency_limit": 1, "concurrency_id": "models", "show_progress_on": shown[::4]}
    gr.on([picture.change, phrases.submit, find.click], **asked, **first)
    given = scenes.click(lambda number: list(examples[number]), scenes, [picture, phrases], api_visibility="private")
    given.then(**asked, **first)  # where the picture is the same, its phrases may have changed
    redrawn: dict[str, Any] = {**common, "trigger_mode": "always_last", "show_progress": "hidden"}

    def redraw(visit: Visit | None, alpha: float, *levels: float) -> list[Any]:
        if visit is None:
            return _nothing() * len(levels)
        return [each for number, level in enumerate(levels) for each in _show(visit, number, level, alpha)]

    opacity.change(redraw, [visit, opacity, *sliders], shown, **redrawn)
    for number, panel in enumerate(panels):
        _connect_panel(number, panel, visit, opacity, said, redrawn, common)


def _connect_panel(
    number: int, panel: Panel, visit: Any, opacity: Any, said: Any, redrawn: dict[str, Any], common: dict[str, Any]
) -> None:
    def redraw(visit: Visit | None, alpha: float, level: float) -> list[Any]:
        return _nothing() if visit is None else _show(visit, number, level, alpha)

    def make(visit: Visit | None, level: float) -> list[Any]:
        try:
            if visit is None:
                raise ValueError("there are no masks yet: give a picture and a phrase first")
            paths = write_files(visit, number, level)
        except (ValueError, OSError) as error:
            return [gr.skip(), message([str(error)], mistake=True)]
        return [gr.update(value=[str(path) for path in paths], visible=True), message(visit.notes)]

    panel.threshold.change(redraw, [visit, opacity, panel.threshold], panel.shown, **redrawn)
    panel.make.click(make, [visit, panel.threshold], [panel.files, said], **common)


def _show(visit: Visit, number: int, threshold: float, opacity: float) -> list[Any]:
    seen = visit.seen[number]
    image, rows = drawn(seen, visit.phrases, threshold, opacity)
    return [image, table(rows), times(seen, rows), _no_files()]


def _nothing() -> list[Any]:
    return [None, "", "", _no_files()]


def _no_files() -> Any:
    """Files are of the masks that were there when they were made, so they go with them."""
    return gr.update(value=None, visible=False)

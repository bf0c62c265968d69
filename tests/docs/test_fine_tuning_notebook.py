"""The notebook of docs/ runs from beginning to end, and what it shows is what it does.

After a change of its cells, ``python tests/docs/test_fine_tuning_notebook.py`` runs them and keeps what they print.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "fine-tuning.ipynb"
IMPROVED = re.compile(r"mIoU of the validation pictures: ([\d.]+) % before, ([\d.]+) % after")


def run(notebook: Any, folder: Path) -> None:
    """Run all cells in the folder."""
    from nbclient import NotebookClient

    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=500, startup_timeout=300, kernel_name="python3", resources=where).execute()


def printed(notebook: Any) -> str:
    """All that its cells have written."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text", "") for output in outputs)


def gain(notebook: Any) -> float:
    """By how many points the training has raised the mIoU, as the notebook tells."""
    before, after = map(float, IMPROVED.search(printed(notebook)).groups())
    return after - before


@pytest.mark.slow
def test_notebook_runs_and_the_training_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, *_ = [pytest.importorskip(name) for name in ("nbformat", "nbclient", "ipykernel")]
    monkeypatch.setenv("FASTRIS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook, tmp_path)
    assert gain(notebook) > 15


def test_notebook_is_kept_as_it_was_run() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert gain(notebook) > 15 and NOTEBOOK.stat().st_size < 1_000_000


def refresh() -> None:
    """Run the notebook, and keep its outputs in the file: text, and one form of each picture."""
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                for form in ("image/png", "text/html"):
                    output.get("data", {}).pop(form, None)
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    refresh()

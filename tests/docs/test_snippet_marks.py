"""The tests of the pages' snippets can fail: each kind of mistake on a page is told, with the page and the line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from snippet_runner import try_blocks
from snippets import SnippetError, blocks

READ = "<!-- test: only read: it is an example -->\n"


def tried(folder: Path, text: str) -> list[str]:
    page = folder / "page.md"
    page.write_text(f"# A page\n\n{text}\n")
    return try_blocks(blocks(page, folder))


def fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"


WRONG = {
    "misspelt option": (
        READ + fenced("bash", "fastris data check here\nfastris predict a.png cup treshold=0.5"),
        r":6: .*unknown option treshold; did you mean threshold",
    ),
    "missing option": (
        READ + fenced("bash", "fastris eval dataset=refcoco data_root=data"),
        r":5: .*model=... is missing",
    ),
    "wrong value": (
        READ + fenced("bash", "fastris predict a.png cup \\\n  threshold=high"),
        r":5: .*threshold must be",
    ),
    "unknown command": (
        READ + fenced("console", "$ fastris trian model=tiny\nsome output"),
        r":5: .*unknown command 'trian'",
    ),
    "option behind torchrun": (
        READ + fenced("sh", "torchrun --nnodes 2 -m fastris train ... batch_sise=8"),
        "unknown option batch_sise",
    ),
    "option of a benchmark": (
        READ + fenced("bash", "python -m bench.gpu_hour out=here minuts=9"),
        "unknown option minuts",
    ),
    "option of the gate": (
        READ + fenced("bash", "python -m fastris.kernels.gate --breif"),
        "unrecognized arguments: --breif",
    ),
    "unknown benchmark": (READ + fenced("bash", "python -m bench.memoir"), "no command python -m bench.memoir"),
    "unknown extra": (READ + fenced("bash", "pip install 'fastris[toaster]'"), "no extra 'toaster'"),
    "missing file": (READ + fenced("bash", "python -m pytest tests/gone"), "there is no tests/gone"),
    "not Python": (READ + fenced("python", "a = 1\na ="), ":6: SyntaxError"),
    "raises": (fenced("python", "a = 1\n\na / 0"), ":6: ZeroDivisionError"),
    "fails": (fenced("bash", "# first\nfastris predict gone.png cup"), ":5: .*exit code 2: .*gone.png"),
    "cannot run": (fenced("bash", "git push"), ":4: .*not run here; mend it, or mark what cannot run here"),
    "has an ellipsis": (fenced("bash", "fastris train ..."), "unexpected argument '...'"),
    "redirects": (fenced("bash", "fastris doctor > report.txt"), "more shell than a test reads"),
    "assertion": ("<!-- test: then: assert a == 2 -->\n" + fenced("python", "a = 1"), "AssertionError"),
    "prints otherwise": (
        fenced("python", "print('one', 1)") + "\n\n<!-- test: printed: above -->\n" + fenced("", "two ..."),
        ":9: `two ...` is not what the snippet before it prints",
    ),
    "indented": ("Type\n\n    fastris doctor\n", ":5: a command in an indented block"),
    "mark before nothing": ("<!-- test: only read: so -->\n\nText.", ":3: this mark stands before no fenced block"),
    "mark without a reason": (
        "<!-- test: only read: -->\n" + fenced("bash", "fastris doctor"),
        ":3: 'only read:' is no clause",
    ),
    "unknown mark": (
        "<!-- test: skip: it fails -->\n" + fenced("bash", "fastris doctor"),
        "'skip: it fails' is no clause",
    ),
    "mark that takes nothing": (
        "<!-- test: take: a for b -->\n" + fenced("python", "c = 1"),
        "the block does not have",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_on_a_page_is_told_with_its_line(tmp_path: Path, kind: str) -> None:
    text, message = WRONG[kind]
    with pytest.raises(SnippetError) as caught:
        tried(tmp_path, text)
    assert re.search(message, str(caught.value), re.S) and str(caught.value).startswith("page.md:")


def test_blocks_of_a_page_share_a_namespace_and_marks_shrink_what_they_run(tmp_path: Path) -> None:
    mark = (
        "<!-- test\ntake: 2 for 4000\nfirst: steps = []\nfound = 'set before'\nthen:\nassert steps == [2], steps\n-->\n"
    )
    text = f"{mark}{fenced('python', 'steps.append(4000)')}\n\n{fenced('python', 'print(found, steps)')}"
    text += f"\n\n<!-- test: printed: above -->\n{fenced('text', 'set ... [2]')}"
    assert tried(tmp_path, text) == []


def test_what_needs_an_absent_library_is_passed_over_and_told(tmp_path: Path) -> None:
    text = "<!-- test: needs: json no_such_library -->\n" + fenced("python", "import no_such_library")
    assert tried(tmp_path, text) == ["page.md:5 needs no_such_library"]


def test_lines_and_options_of_a_mark_are_for_the_commands_that_they_name(tmp_path: Path) -> None:
    mark = "<!-- test\nonly read bench: it takes long\nadd to fastris tune: show=true\n-->\n"
    assert (
        tried(tmp_path, mark + fenced("bash", "fastris bench --quick  # long\nfastris tune           # needs a GPU"))
        == []
    )

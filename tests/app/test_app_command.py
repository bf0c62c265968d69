"""``fastris app`` before any page is there: wrong turns, each told in one line."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from fastris.commands import app, cli
from fastris.weights import shipped


def told(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["app", *args]) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1
    return errors


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = told([f"port={port}"], capsys)
    why = "cannot be had on 127.0.0.1 (Address already in use); give another, or port=0 for any"
    assert line == f"fastris app: port={port} {why}\n"


def test_a_host_that_is_no_address_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "host=300.0.0.1 is no address" in told(["host=300.0.0.1"], capsys)


def test_without_gradio_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = told(["port=0"], capsys)
    assert line == "fastris app: gradio is needed for fastris app, and is not installed: pip install 'fastris[app]'\n"


def test_an_installation_without_the_tiny_model_asks_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    assert "model is missing, and this installation lacks the tiny one" in told(["port=0"], capsys)


def test_only_this_machine_is_answered_unless_told_otherwise() -> None:
    assert app.AppConfig().host == "127.0.0.1" and app.AppConfig().host in app.LOCAL
    assert app.free_port("127.0.0.1", 0) > 0
    assert app._welcome("::1", 7860).startswith("open http://[::1]:7860 ")
    assert "all who reach port 7860 of 0.0.0.0" in app._welcome("0.0.0.0", 7860)

"""Runs of several processes in a test: each is forked from a server that has imported what they need."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "fastris.commands.assemble",
        "fastris.training.loop",
        "fastris.models.cris.model",
        "fastris.weights.load",
        "fastris.data.scenes.dataset",
        "cv2",
        "rich.console",
        "pytest",
    ]
)


def run_processes(
    function: Callable[..., Any], count: int, *args: Any, timeout: float = 120, **variables: str
) -> list[Any]:
    """What `function(*args)` returned in each of `count` processes that find each other as under `torchrun`.

    `variables` are environment variables to set for all. An exception is returned as its text, "TypeName: message"; a
    process that died without a word as its exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, answers = [], []
    for rank in range(count):
        answer, send = _context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **variables,
        }
        process = _context.Process(target=_child, args=(environment, send, function, args))
        process.start()
        send.close()
        processes.append(process)
        answers.append(answer)
    try:
        return [_answer(process, answer, timeout) for process, answer in zip(processes, answers, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(process: Any, answer: Any, timeout: float) -> Any:
    try:
        assert answer.poll(timeout), "the process hangs"
        return pickle.loads(answer.recv_bytes())
    except EOFError:
        process.join()
        return process.exitcode


def _child(environment: dict[str, str], send: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        result = function(*args)
    except BaseException as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    send.send_bytes(pickle.dumps(result))  # not send(), whose tensors would live as long as the process
    send.close()

"""Several processes of one test, joined by gloo: forked from a server that has imported everything once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

import torch

# Not forked from the test's own process: once that has computed gradients, its children no longer can.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch.distributed.fsdp", "autoregressive.train.recipe"])
ForkingPickler.register(ModuleType, lambda module: (importlib.import_module, (module.__name__,)))


def free_port() -> int:
    """A port of this machine that nobody listens on, for processes that have to meet: tests run beside each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `world` processes, under the variables that torchrun would set.

    A process alone has none of them. The function and its arguments are sent there: modules, paths and plain values. An
    error in one of them fails the test.
    """
    port = free_port()
    pipes = [_SERVER.Pipe(duplex=False) for _ in range(world)]
    members = [
        _SERVER.Process(target=_member, args=(rank, world, port, pipe[1], function, args))
        for rank, pipe in enumerate(pipes)
    ]
    for member, (_, sending) in zip(members, pipes):
        member.start()
        sending.close()
    results = [_receive(receiving, rank) for rank, (receiving, _) in enumerate(pipes)]
    for member in members:
        member.join(60)
    failed = [text for ok, text in results if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in results]


def command_in_processes(world: int, command: ModuleType, work: Callable[..., Any], *flags: object) -> None:
    """`work(arguments)` in each of `world` processes, with the arguments that `command` makes of `flags`.

    What torchrun and the command do, without its start: most of that is importing torch.
    """
    in_processes(world, _parse_and_work, command, work, [str(flag) for flag in flags])


def _parse_and_work(command: ModuleType, work: Callable[..., Any], flags: list[str]) -> None:
    work(command.parser().parse_args(flags))


def _receive(pipe: Any, rank: int) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(300) else (False, f"process {rank} said nothing for five minutes")
    except EOFError:
        return False, f"process {rank} died"


def _member(rank: int, world: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}
    else:
        for name in numbers:
            os.environ.pop(name, None)
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # no clean-up of what belongs to the parent

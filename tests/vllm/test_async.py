"""The engine for servers: streams, many at once, cancelling, shutting down, dying."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from autoregressive.serve.export import export_model
from autoregressive.serve.vllm_engine import EngineDied, VLLMEngine
from tests.vllm.engines import drawn, greedy, tiny


@pytest.fixture(scope="module")
def model():
    return tiny(block_size=64)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def engine(model, loop, tmp_path_factory) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(export_model(model, tmp_path_factory.mktemp("gpt") / "gpt"), max_images=4)
    yield engine
    loop.run_until_complete(engine.shutdown())


async def whole(engine: VLLMEngine, label: int, **options) -> list[int]:
    """All codes of one image; checks on the way that each part continues the one before."""
    codes: list[int] = []
    async for more in engine.draw_codes(label, **options):
        assert len(more) > len(codes)
        assert more[: len(codes)] == codes
        codes = more
    return codes


async def idle(engine: VLLMEngine) -> None:
    """Wait until nothing is at work."""
    for _ in range(500):
        if not engine.unfinished:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("images are still at work")


def test_one_image_arrives_in_parts(engine, model, loop):
    async def parts() -> list[int]:
        return [len(codes) async for codes in engine.draw_codes(2, cfg_scale=4.0, temperature=0.0)]

    lengths = loop.run_until_complete(parts())
    assert lengths[-1] == 64
    assert len(lengths) > 8
    assert loop.run_until_complete(whole(engine, 2, temperature=0.0)) == greedy(model, [2], [4.0])[0].tolist()


def test_many_at_once_with_settings_of_their_own(engine, model, loop):
    async def all_of_them() -> list[list[int]]:
        async def late(i: int) -> list[int]:
            await asyncio.sleep(0.02 * i)
            return await whole(engine, i % 5, seed=i, cfg_scale=1.0 + i, top_k=10 * i)

        return await asyncio.gather(*(late(i) for i in range(9)))

    got = loop.run_until_complete(all_of_them())
    assert got == [drawn(model, [i % 5], [i], cfg_scale=1.0 + i, top_k=10 * i)[0].tolist() for i in range(9)]
    assert engine.unfinished == 0


def test_who_stops_listening_stops_the_drawing(engine, loop):
    async def first_part_only() -> None:
        stream = engine.draw_codes(0)
        await anext(stream)
        assert engine.unfinished == 1
        await stream.aclose()
        await idle(engine)

    loop.run_until_complete(first_part_only())


def test_a_cancelled_task_stops_the_drawing(engine, model, loop):
    async def cancel() -> list[int]:
        task = asyncio.ensure_future(whole(engine, 1))
        other = asyncio.ensure_future(whole(engine, 3, temperature=0.0))
        while engine.unfinished < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        codes = await other
        await idle(engine)
        return codes

    assert loop.run_until_complete(cancel()) == greedy(model, [3], [4.0])[0].tolist()


def test_mistakes_are_told_before_anything_is_drawn(engine):
    with pytest.raises(ValueError, match="classes are 0 to 4, not 99"):
        engine.draw_codes(99)
    with pytest.raises(ValueError, match="temperature"):
        engine.draw_codes(0, temperature=-1.0)
    assert engine.unfinished == 0


def test_shutdown_ends_the_process_and_those_who_wait(model, loop, tmp_path):
    others = set(children())
    engine = VLLMEngine(export_model(model, tmp_path / "gpt"), max_images=4)
    own = set(children()) - others

    async def stop() -> None:
        stream = engine.draw_codes(0)
        await anext(stream)
        await engine.shutdown()
        assert not engine.alive
        with pytest.raises(EngineDied):
            async for _ in stream:
                pass

    assert own
    loop.run_until_complete(asyncio.wait_for(stop(), 30))
    assert not own & set(children())


def test_a_dead_engine_is_told_to_those_who_wait(model, loop, tmp_path):
    others = set(children())
    engine = VLLMEngine(export_model(model, tmp_path / "gpt"), max_images=4)
    own = set(children()) - others

    async def killed() -> None:
        stream = engine.draw_codes(0)
        await anext(stream)
        for child in own:
            os.kill(child, signal.SIGKILL)
        with pytest.raises(EngineDied, match="vLLM's process ended"):
            async for _ in stream:
                pass
        assert not engine.alive
        with pytest.raises(EngineDied, match="make a new engine"):
            await anext(engine.draw_codes(0))
        await engine.shutdown()
        await engine.shutdown()

    assert own
    loop.run_until_complete(killed())
    assert not own & set(children())


def test_engines_do_not_outlive_a_killed_server(model, tmp_path):
    folder = export_model(model, tmp_path / "gpt")
    program = f"""
import sys, time
from autoregressive.serve.vllm_engine import VLLMEngine
engine = VLLMEngine({str(folder)!r}, max_images=2)
print("ready", flush=True)
time.sleep(300)
"""
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert any(line == "ready\n" for line in server.stdout)
    engines = children(server.pid)
    assert engines
    server.kill()
    server.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in engines) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in engines if os.path.exists(f"/proc/{pid}")]


def children(parent: int | None = None) -> list[int]:
    """The process ids of those that this process, or `parent`, has started."""
    listed = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/status") as file:
                    status = dict(line.split(":\t", 1) for line in file if ":\t" in line)
            except OSError:
                continue
            if status["PPid"].strip() == str(parent or os.getpid()) and status["State"][0] != "Z":
                listed.append(int(entry.name))
    return listed

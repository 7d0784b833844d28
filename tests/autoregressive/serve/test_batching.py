"""Requests become batches and come back whole, whatever happens to the workers."""

import asyncio
import contextlib
import os
import signal
import threading

import numpy as np
import pytest
import torch

from autoregressive.serve.batching import LocalSource, _Call, local_source
from autoregressive.serve.requests import BadRequest, Drawn, Edit, Failed, Progress, Request, Sampling, Unavailable
from autoregressive.serve.studio import Job, Studio
from autoregressive.serve.workers import WorkerDied
from tests.autoregressive.serve.fake import FakeWorker, picture_of, source_of
from tests.autoregressive.serve.tiny import tiny_cards

PLAIN = Sampling(cfg_scale=3.0, top_k=20, top_p=1.0, temperature=0.8)
OTHER = Sampling(cfg_scale=1.0, top_k=20, top_p=1.0, temperature=0.8)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return tiny_cards(tmp_path_factory.mktemp("cards"))


def ask(seed, n=1, sampling=PLAIN, **options):
    return Request("tiny-class", 1, sampling, seed, n, **options)


async def pictures(source, request):
    found = {}
    async with contextlib.aclosing(source.draw(request)) as events:
        async for event in events:
            if isinstance(event, Drawn):
                assert event.number not in found
                found[event.number] = event.picture
    return [found[number] for number in range(request.n)]


async def seeds(source, request):
    return [int(picture[0, 0, 0]) for picture in await pictures(source, request)]


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


async def behind(source, worker, *requests):
    """Hold the worker at a first picture, let the requests queue up, and let it go: their outcomes."""
    worker.gate.clear()
    worker.at_work.clear()
    first = asyncio.create_task(seeds(source, ask(99)))
    await until(worker.at_work.is_set)
    tasks = [asyncio.create_task(seeds(source, request)) for request in requests]
    await until(lambda: source.waiting == sum(request.n for request in requests))
    worker.gate.set()
    assert await first == [99]
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_pictures_of_many_requests_share_batches_of_equal_settings(cards):
    worker, sizes = FakeWorker(), []
    with source_of(cards, worker, max_batch_size=4) as source:
        source.observe = lambda model, size, seconds: sizes.append((model, size))
        found = asyncio.run(behind(source, worker, ask(1, 3), ask(11, 2), ask(21, 2, OTHER)))
    assert found == [[1, 2, 3], [11, 12], [21, 22]]
    assert worker.batches == [[99], [1, 11, 2, 12], [21, 22], [3]]
    assert sizes == [("tiny-class", size) for size in (1, 4, 2, 1)]


def test_a_request_with_many_pictures_is_shared_by_the_workers_that_are_free(cards):
    one, two = FakeWorker(), FakeWorker()
    with source_of(cards, one, two) as source:
        one.gate.clear(), two.gate.clear()

        async def main():
            task = asyncio.create_task(seeds(source, ask(1, 4)))
            await until(lambda: one.batches and two.batches)
            one.gate.set(), two.gate.set()
            return await task

        assert asyncio.run(main()) == [1, 2, 3, 4]
    assert sorted(map(len, one.batches + two.batches)) == [2, 2]


def test_progress_and_previews_reach_who_asked_for_them(cards):
    async def main(source):
        shown = [event async for event in source.draw(ask(5, 2, previews=True))]
        return shown, [event async for event in source.draw(ask(5, 2))]

    with source_of(cards, FakeWorker()) as source:
        shown, plain = asyncio.run(main(source))
    assert [e.number for e in shown] == [0, 1, 0, 1] or [type(e) for e in shown] == [Drawn, Drawn]  # it may be quick
    assert all(e.done == 1 and e.total == 16 for e in shown + plain if isinstance(e, Progress))
    assert all((e.preview == picture_of(5 + e.number)).all() for e in shown if isinstance(e, Progress))
    assert all(e.preview is None for e in plain if isinstance(e, Progress))


def test_a_slow_reader_finds_the_newest_event_of_each_picture(cards):
    class Chatty(FakeWorker):
        def draw(self, batch):
            for done in range(1, 1000):
                preview = picture_of(done)[None].repeat(len(batch.jobs), 0) if done == 500 else None
                batch.tell(range(len(batch.jobs)), done, 1000, preview)
            return super().draw(batch)

    async def main(source):
        finished = threading.Event()
        source.observe = lambda *_: finished.set()
        events = source.draw(ask(1, 2, previews=True))
        task = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        assert finished.wait(20)  # the loop stands still during two thousand events
        return [await task] + [event async for event in events]

    with source_of(cards, Chatty()) as source:
        seen = asyncio.run(main(source))
    assert len(seen) <= 4 and [type(e) for e in seen].count(Drawn) == 2


def test_a_preview_stays_until_a_newer_one_comes():
    async def main():
        call = _Call(ask(1))
        call.post(Progress(0, 1, 16, picture_of(1)))
        call.post(Progress(0, 2, 16))
        return await call.next()

    event = asyncio.run(main())
    assert event.done == 2 and (event.preview == picture_of(1)).all()


def test_closing_a_request_drops_what_waits_and_stops_what_runs(cards):
    worker = FakeWorker()

    async def main(source):
        worker.gate.clear()
        running = asyncio.create_task(seeds(source, ask(1, 3)))
        await until(worker.at_work.is_set)
        waiting = asyncio.create_task(seeds(source, ask(11, 3)))
        await until(lambda: source.waiting == 3)
        for task in (waiting, running):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert source.waiting == 0
        await until(lambda: worker.batches[-1] == "stopped")
        worker.gate.set()
        return await seeds(source, ask(21))

    with source_of(cards, worker) as source:
        assert asyncio.run(main(source)) == [21]
    assert worker.batches == ["stopped", [21]]


def test_a_batch_with_one_reader_left_goes_on(cards):
    worker = FakeWorker()

    async def main(source):
        worker.gate.clear()
        first = asyncio.create_task(seeds(source, ask(99)))
        await until(worker.at_work.is_set)
        stays, leaves = (asyncio.create_task(seeds(source, ask(first, 1))) for first in (1, 11))
        await until(lambda: source.waiting == 2)
        worker.gate.set()
        await until(lambda: len(worker.batches) == 2)
        leaves.cancel()
        return [await first, await stays]

    with source_of(cards, worker) as source:
        assert asyncio.run(main(source)) == [[99], [1]]


@pytest.mark.parametrize("how", ["deadly", "broken"])
def test_a_picture_that_goes_wrong_twice_fails_alone(cards, how):
    worker = FakeWorker(**{how: (2,)})
    with source_of(cards, worker) as source:
        found = asyncio.run(behind(source, worker, ask(1, 2), ask(11, 2)))
        assert isinstance(found[0], Failed) and "twice" in str(found[0])
        assert found[1] == [11, 12]
        assert source.restarts == (2 if how == "deadly" else 0) == worker.started - 1
        assert asyncio.run(seeds(source, ask(31))) == [31]


def test_lost_batches_are_drawn_again(cards):
    class DiesOnce(FakeWorker):
        def draw(self, batch):
            pictures = super().draw(batch)
            if len(batch.jobs) == 3:
                raise WorkerDied("by a test")
            return pictures

    worker = DiesOnce(starts=[None, OSError("not yet"), None])
    with source_of(cards, worker) as source:
        assert asyncio.run(seeds(source, ask(1, 3))) == [1, 2, 3]
        assert source.restarts == 2 and source.workers == (1, 1)


def test_the_last_worker_that_cannot_come_back_fails_everybody(cards, monkeypatch):
    monkeypatch.setattr("autoregressive.serve.batching._STARTS", 2)
    worker = FakeWorker(deadly=(1,), starts=[None, *[OSError("no")] * 9])
    with source_of(cards, worker) as source:
        with pytest.raises(Unavailable, match="no worker is left"):
            asyncio.run(seeds(source, ask(1)))
        assert source.workers == (0, 1)
        with pytest.raises(Unavailable, match="no worker is left"):
            asyncio.run(seeds(source, ask(2)))


def test_requests_that_cannot_be_drawn_are_refused_at_once(cards):
    with source_of(cards, FakeWorker()) as source:
        with pytest.raises(BadRequest, match="no model other") as refused:
            source.draw(Request("other", 1, PLAIN))
        assert refused.value.param == "model"
        with pytest.raises(BadRequest, match="classes are 0 to 2"):
            source.draw(Request("tiny-class", 7, PLAIN))


def test_closing_finishes_what_has_begun_and_refuses_the_rest(cards):
    worker = FakeWorker()

    async def main(source):
        worker.gate.clear()
        begun = asyncio.create_task(seeds(source, ask(1, 3)))
        await until(worker.at_work.is_set)
        waiting = asyncio.create_task(seeds(source, ask(11)))
        await until(lambda: source.waiting == 2)
        closing = asyncio.create_task(asyncio.to_thread(source.close, 30))
        with pytest.raises(Unavailable, match="stopping"):
            await waiting
        worker.gate.set()
        await closing
        with pytest.raises(Unavailable, match="stopping"):
            await seeds(source, ask(21))
        return await begun

    source = LocalSource(cards, [worker], "test", max_batch_size=2)
    source.start()
    assert asyncio.run(main(source)) == [1, 2, 3]


def test_closing_without_grace_ends_what_runs(cards):
    worker = FakeWorker()

    async def main(source):
        worker.gate.clear()
        begun = asyncio.create_task(seeds(source, ask(1, 3)))
        await until(worker.at_work.is_set)
        await asyncio.to_thread(source.close, 0)
        with pytest.raises(Unavailable, match="stopping"):
            await begun

    source = LocalSource(cards, [worker], "test", max_batch_size=2)
    source.start()
    asyncio.run(main(source))


def test_two_event_loops_share_a_source(cards):
    with source_of(cards, FakeWorker()) as source:
        found = {}
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: asyncio.run(seeds(source, ask(i, 3)))}))
            for i in (1, 11, 21)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == {i: [i, i + 1, i + 2] for i in (1, 11, 21)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_checkpoint_is_one_clear_error_at_the_start(cards, tmp_path, workers):
    (tmp_path / "gpt.pt").write_bytes(b"nothing")
    card = tiny_cards(tmp_path)[0]
    card.args.gpt_ckpt = str(tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=r"gpt\.pt"):
        local_source([card], workers=workers)


def test_settings_that_mean_nothing(cards):
    for wrong in ({"workers": -1}, {"max_batch_size": 0}):
        with pytest.raises(ValueError, match="at least one picture"):
            local_source(cards, **wrong)
    with pytest.raises(ValueError, match="the same name"):
        local_source([cards[0], cards[0]])


@pytest.fixture(scope="module")
def expected(cards):
    """Pictures by a studio: class 1, seeds 0 to 5, and one edit."""
    studio = Studio(cards, torch.device("cpu"))
    edit = Edit(picture_of(7), np.arange(16) > 9)
    plain = [studio.draw([Job("tiny-class", 1, PLAIN, seed)])[0] for seed in range(6)]
    return plain, edit, studio.draw([Job("tiny-class", 1, PLAIN, 3, edit)])[0]


def test_a_thread_of_this_process_draws_the_same_pictures(cards, expected):
    source = local_source(cards, workers=0)
    try:
        assert np.array_equal(asyncio.run(pictures(source, ask(0, 6))), expected[0])
        found = asyncio.run(pictures(source, ask(3, edit=expected[1])))
        assert np.array_equal(found[0], expected[2]) and source.where == "cpu, eager"
    finally:
        source.close()


@pytest.mark.slow
def test_a_killed_process_loses_nothing(cards, expected):
    source = local_source(cards, workers=1)
    try:
        worker = source._workers[0]
        assert np.array_equal(asyncio.run(pictures(source, ask(0, 6))), expected[0])
        assert np.array_equal(asyncio.run(pictures(source, ask(3, edit=expected[1])))[0], expected[2])
        pid = worker.pid
        os.kill(pid, signal.SIGSTOP)  # so that it dies with a batch in hand, however fast it is

        async def main():
            task = asyncio.create_task(pictures(source, ask(0, 6)))
            await until(lambda: source.waiting == 0)
            os.kill(pid, signal.SIGKILL)
            return await task

        assert np.array_equal(asyncio.run(main()), expected[0])
        assert source.restarts == 1 and worker.pid != pid
    finally:
        source.close()
    assert worker._process.poll() is not None

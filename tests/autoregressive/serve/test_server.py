"""The server as a process: started as people start it, killed in parts, stopped under load."""

import asyncio
import base64
import io
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from autoregressive.serve.requests import Sampling
from autoregressive.serve.server import listen, main
from autoregressive.serve.studio import Job, Studio
from tests.autoregressive.serve.http import GENERATIONS
from tests.autoregressive.serve.tiny import tiny_card_files, tiny_cards
from tests.commands.shell import ROOT, command_line, environment, run

SERVER = "autoregressive/serve/server.py"
PLAIN = Sampling(cfg_scale=3.0, top_k=20, top_p=1.0, temperature=0.8)


class Served:
    """A server process and its address."""

    def __init__(self, folder):
        self.log = folder / "log"
        cards = [flag for file in tiny_card_files(folder) for flag in ("--card", file)]
        line = command_line(SERVER, *cards, "--port", 0, "--max-n", 64, "--max-queue", 400, "--max-batch-size", 8)
        with self.log.open("w") as output:
            self.process = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=output, stderr=output)
        self.address = self.wait_for(r"ready: (http://\S+)/v1")

    def wait_for(self, pattern):
        for _ in range(1200):
            if found := re.search(pattern, self.log.read_text()):
                return found.group(1)
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def worker(self):
        """The process id of its worker."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()  # a child belongs to the thread that started it
        (child,) = " ".join((task / "children").read_text() for task in tasks).split()
        return int(child)

    def memory(self):
        """Bytes that it holds."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text()).group(1)) * 1024

    def health(self):
        return httpx.get(f"{self.address}/health").json()


def serve(folder):
    served = Served(folder)
    yield served
    if served.process.poll() is None:
        served.process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    yield from serve(tmp_path_factory.mktemp("server"))


@pytest.fixture
def to_stop(tmp_path):
    """A server of its own: other tests, in whatever order, go on with theirs."""
    yield from serve(tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Pictures of class 1, by seed."""
    studio = Studio(tiny_cards(tmp_path_factory.mktemp("cards")), torch.device("cpu"))
    return studio.draw([Job("tiny-class", 1, PLAIN, seed) for seed in range(24)])


def fields(seed, n):
    return {"class": 1, "n": n, "seed": seed, **vars(PLAIN)}


def pictures(answer):
    entries = answer.json()["data"]
    return np.stack([np.array(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))) for entry in entries])


@pytest.mark.slow
def test_two_clients_at_once_get_what_each_gets_alone(served, expected):
    with ThreadPoolExecutor() as pool:
        answers = [
            pool.submit(httpx.post, served.address + GENERATIONS, json=fields(seed, 12), timeout=60) for seed in (0, 12)
        ]
    assert np.array_equal(np.concatenate([pictures(answer.result()) for answer in answers]), expected)
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none") as client:
        answer = client.images.generate(model="tiny-text", prompt="a red cat", n=2, extra_body={"seed": 3})
    assert len(answer.data) == 2 and answer.data[0].b64_json != answer.data[1].b64_json


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(served, expected):
    worker = served.worker()
    os.kill(worker, signal.SIGSTOP)  # so that it dies with a batch in hand, however fast it is
    with ThreadPoolExecutor() as pool:
        answers = [
            pool.submit(httpx.post, served.address + GENERATIONS, json=fields(seed, 4), timeout=60)
            for seed in range(0, 24, 4)
        ]
        while served.health()["pictures"]["outstanding"] < 24:
            time.sleep(0.02)
        os.kill(worker, signal.SIGKILL)
    assert np.array_equal(np.concatenate([pictures(answer.result()) for answer in answers]), expected)
    health = served.health()
    assert health["workers"] == {"ready": 1, "all": 1, "restarts": 1} and served.worker() != worker
    assert "a worker died (signal 9)" in served.log.read_text()


async def crowd(address, clients, each, outcomes):
    """So many clients at once that each ask for pictures again and again; status codes go into `outcomes`."""

    async def one(number):
        async with httpx.AsyncClient(timeout=60) as client:
            for i in range(each):
                try:
                    answer = await client.post(address + GENERATIONS, json=fields(number * each + i, 2))
                    outcomes.append(answer.status_code)
                except httpx.TransportError as error:
                    outcomes.append(type(error).__name__)

    await asyncio.gather(*(one(number) for number in range(clients)))


@pytest.mark.slow
def test_memory_does_not_grow_with_requests(served):
    outcomes, sizes = [], []
    for _ in range(4):
        asyncio.run(crowd(served.address, 20, 3, outcomes))
        sizes.append(served.memory())
    assert outcomes == [200] * 240
    assert sizes[-1] - sizes[0] < 8 * 2**20, sizes  # the first 60 requests warm up
    assert served.health()["pictures"] == {"waiting": 0, "outstanding": 0}


@pytest.mark.slow
def test_it_stops_in_good_order_under_load(to_stop):
    outcomes, worker = [], to_stop.worker()

    async def load():
        task = asyncio.create_task(crowd(to_stop.address, 20, 50, outcomes))
        while len(outcomes) < 20:
            await asyncio.sleep(0.01)
        to_stop.process.send_signal(signal.SIGTERM)
        await task

    asyncio.run(load())
    assert to_stop.process.wait(40) == 0
    # what was begun is there, the rest was told; afterwards nobody answers, or closes the connection that was kept
    assert set(outcomes) <= {200, 503, "ConnectError", "RemoteProtocolError", "ReadError"}
    assert outcomes.count(200) > 20 and "ConnectError" in outcomes
    assert "Traceback" not in to_stop.log.read_text() and to_stop.log.read_text().endswith("stopped\n")
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--max-n", "0"], "--max-n must be more than 0"),
        (["--timeout", "nan"], "--timeout must be more than 0"),
        (["--card", "nowhere.json"], r"nowhere\.json"),
        (["--gpt-ckpt", "nowhere.pt", "--vq-ckpt", "nowhere.pt", "--workers", "0"], r"nowhere\.pt"),
        (["--gpt-ckpt", "nowhere.pt", "--vq-ckpt", "nowhere.pt", "--gpt-type", "t2i", "--workers", "0"], "nowhere|t5"),
    ],
)
def test_settings_that_cannot_be(flags, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        main(flags)


def test_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.slow
def test_its_help_shows_the_limits_and_the_models_flags():
    text = run("-m", "autoregressive.serve.server", "--help")
    assert "--max-queue" in text and "--gpt-ckpt" in text and "LLAMAGEN_API_KEY" in text

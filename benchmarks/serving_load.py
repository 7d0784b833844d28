"""Many clients at once against an image server: throughput, latency, what is lost, memory.

    python -m benchmarks.serving_load --url http://127.0.0.1:8000 --clients 1 4 16
    python -m benchmarks.serving_load --start tiny --clients 1 8 64 --requests 20

With --start the server is started here, with random weights: "tiny" (GPT-XS, 4 x 4 codes; what the server itself costs)
or "gpt-b" (GPT-B and VQ-16 at 256 pixels); or with the emoji models ("bundled"). Further flags go to that server. Every
client sends its next request when it has its answer. Pictures of an answer are counted if no two of them are the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from autoregressive.models.gpt import GPT_models
from autoregressive.serve import server
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint
from utils.args import make_parser
from utils.errors import run
from utils.files import write_json

_RANDOM = {  # GPT, tokenizer, codes, edge of a picture
    "tiny": ("GPT-XS", "VQ-4-S", 64, 16),
    "gpt-b": ("GPT-B", "VQ-16", 16384, 256),
}


@dataclass
class Load:
    """What the clients of one run saw."""

    outcomes: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of requests that were answered with pictures
    pictures: int = 0
    lost: int = 0  # pictures of requests that were answered, missing or twice the same
    duration: float = 0.0

    def percentile(self, share: float) -> float:
        """Seconds below which this share of the answers came."""
        ordered = sorted(self.seconds) or [float("nan")]
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    where = flags.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server that runs")
    where.add_argument("--start", choices=[*_RANDOM, "bundled"], help="start one here")
    flags.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="how many at once, a run for each")
    flags.add_argument("--requests", type=int, default=10, help="of each client")
    flags.add_argument("--n", type=int, default=1, help="pictures of a request")
    return flags


async def load(url: str, clients: int, requests: int, n: int, first_seed: int = 0) -> Load:
    """Let so many clients send so many requests each."""
    seen, started = Load(), time.perf_counter()
    await asyncio.gather(*(_client(url, first_seed + i * requests * n, requests, n, seen) for i in range(clients)))
    seen.duration = time.perf_counter() - started
    return seen


async def _client(url: str, seed: int, requests: int, n: int, seen: Load) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        subject = await _subject(client)
        for i in range(requests):
            started = time.perf_counter()
            try:
                fields = {**subject, "n": n, "seed": seed + i * n}
                answer = await client.post("/v1/images/generations", json=fields)
            except httpx.HTTPError as error:
                seen.outcomes[type(error).__name__] += 1
                continue
            seen.outcomes[answer.status_code] += 1
            if answer.status_code == 200:
                seen.seconds.append(time.perf_counter() - started)
                different = {entry["b64_json"] for entry in answer.json()["data"]}
                seen.pictures += len(different)
                seen.lost += n - len(different)


async def _subject(client: httpx.AsyncClient) -> dict[str, object]:
    """Something that the first model can draw."""
    model = (await client.get("/v1/models")).json()["data"][0]
    return {"class": 0} if model["kind"] == "c2i" else {"prompt": (model["examples"] or ["a red cat"])[0]}


def numbers(url: str) -> dict[str, float]:
    """The server's metrics, summed over their labels."""
    sums: Counter = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return sums


@contextlib.contextmanager
def started(what: str, flags: list[str]) -> Iterator[str]:
    """A server on this machine; gives its address, ends it in good order."""
    with tempfile.TemporaryDirectory() as folder:
        cards = [] if what == "bundled" else ["--card", str(random_card(what, Path(folder)))]
        log = Path(folder) / "log"
        command = [sys.executable, server.__file__, *cards, "--port", "0", "--max-queue", "4096", *flags]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield _address(process, log)
            process.send_signal(signal.SIGTERM)
            if code := process.wait(60):
                raise RuntimeError(f"the server ended with {code}:\n{log.read_text()[-2000:]}")
        finally:
            process.kill()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        if found := re.search(r"ready: (http://\S+)/v1", log.read_text()):
            return found.group(1)
        time.sleep(0.1)
    raise ValueError(f"the server did not start:\n{log.read_text()[-2000:]}")


def random_card(what: str, folder: Path) -> Path:
    """Write random models and their card into `folder`."""
    torch.manual_seed(0)
    gpt, vq, codes, edge = _RANDOM[what]
    tokenizer = VQ_models[vq](codebook_size=codes)
    stride = 4 if what == "tiny" else 16
    weights = GPT_models[gpt](vocab_size=codes, block_size=(edge // stride) ** 2, num_classes=10)
    torch.nn.init.normal_(weights.output.weight, std=0.02)
    checkpoint.save({"model": weights.state_dict()}, folder / "gpt.pt")
    checkpoint.save({"model": tokenizer.state_dict()}, folder / "vq.pt")
    flags = {"gpt-model": gpt, "gpt-ckpt": "gpt.pt", "vq-model": vq, "vq-ckpt": "vq.pt", "codebook-size": codes,
             "num-classes": 10, "image-size": edge, "downsample-size": stride}  # fmt: skip
    write_json(folder / "card.json", {"name": what, "flags": flags})
    return folder / "card.json"


def measure(url: str, args: argparse.Namespace) -> None:
    """One row for each number of clients."""
    print("| clients | requests | pictures/s | p50 | p95 | p99 | mean batch | answers | lost | server's memory |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    asyncio.run(load(url, 2, 2, args.n))  # warms up
    seed = 10**6
    for clients in args.clients:
        before = numbers(url)
        seen = asyncio.run(load(url, clients, args.requests, args.n, seed))
        seed += clients * args.requests * args.n
        after = numbers(url)
        drawn, batches = (
            after[f"llamagen_batch_pictures_{name}"] - before[f"llamagen_batch_pictures_{name}"]
            for name in ("sum", "count")
        )
        times = " | ".join(f"{seen.percentile(share):.3f} s" for share in (0.5, 0.95, 0.99))
        answers = json.dumps({str(key): count for key, count in seen.outcomes.items()})
        memory = after["process_resident_memory_bytes"] / 2**20
        print(
            f"| {clients} | {sum(seen.outcomes.values())} | {seen.pictures / seen.duration:.2f} | {times} | "
            f"{drawn / max(batches, 1):.1f} | {answers} | {seen.lost} | {memory:.0f} MiB |",
            flush=True,
        )
        if seen.seconds:
            print(f"mean latency {statistics.mean(seen.seconds):.3f} s", file=sys.stderr)


def main(words: list[str]) -> None:
    """Measure a server that runs, or one that is started here."""
    args, flags = parser().parse_known_args(words)
    if args.url:
        if flags:
            raise ValueError(f"unknown flags: {' '.join(flags)}")
        measure(args.url.rstrip("/").removesuffix("/v1"), args)
        return
    with started(args.start, flags) as url:
        measure(url, args)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))

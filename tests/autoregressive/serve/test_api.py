"""The image API over real connections, with a worker that the test holds back, breaks or kills."""

import base64
import contextlib
import io
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from autoregressive.serve import slow_clients
from autoregressive.serve.api import Limits
from tests.autoregressive.serve.fake import FakeWorker, picture_of, source_of
from tests.autoregressive.serve.http import EDITS, GENERATIONS, connect, events_of, generation, post, serving
from tests.autoregressive.serve.test_parameters import png, transparent
from tests.autoregressive.serve.tiny import tiny_cards

LIMITS = Limits(max_n=8, max_queue=12, timeout=20, body_timeout=1, max_body=100_000)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return tiny_cards(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def worker():
    return FakeWorker(broken=(66,))


@pytest.fixture(scope="module")
def source(cards, worker):
    with source_of(cards, worker, max_batch_size=4) as source:
        yield source


@pytest.fixture(scope="module")
def address(source):
    with serving(source, LIMITS) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def held(worker):
    """The worker draws nothing until `worker.gate` is set."""
    worker.gate.clear()
    worker.at_work.clear()
    yield worker
    worker.gate.set()


def draw(address, **fields):
    return httpx.post(address + GENERATIONS, json={"prompt": "1", **fields}, timeout=30)


def pixels(content):
    return np.array(Image.open(io.BytesIO(base64.b64decode(content))))


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def numbers(address):
    """The metrics, by name and labels."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_the_official_client_draws_pictures(client):
    extra = {"seed": 5, "guidance_scale": 3.0, "top_k": 9, "top_p": 0.5, "temperature": 0.5}
    answer = client.images.generate(model="tiny-class", prompt="blue square", n=3, size="16x16", extra_body=extra)
    assert [pixels(entry.b64_json)[0, 0, 0] for entry in answer.data] == [5, 6, 7]
    assert (answer.seed, answer.size, answer.output_format, answer.usage.output_tokens) == (5, "16x16", "png", 48)
    facts = Image.open(io.BytesIO(base64.b64decode(answer.data[2].b64_json))).text
    assert (facts["seed"], facts["class_name"], facts["model"]) == ("7", "blue square", "tiny-class")
    assert json.loads(facts["settings"]) == {"cfg_scale": 3.0, "top_k": 9, "top_p": 0.5, "temperature": 0.5}


def test_a_url_holds_the_picture(client):
    answer = client.images.generate(prompt="1", response_format="url", extra_body={"seed": 9})
    assert pixels(answer.data[0].url.removeprefix("data:image/png;base64,"))[0, 0, 0] == 9


def test_the_official_client_edits(client):
    answer = client.images.edit(
        image=("a.png", png(picture_of(1)), "image/png"), mask=("m.png", png(transparent(3, 4)), "image/png"),
        prompt="green star", n=2, extra_body={"seed": 20},
    )  # fmt: skip
    assert [pixels(entry.b64_json)[0, 0, 0] for entry in answer.data] == [20, 21]
    assert answer.usage.output_tokens == 4  # two cells of two pictures


def test_the_official_client_streams(client, held):
    stream = client.images.generate(prompt="1", stream=True, partial_images=1, n=1, extra_body={"seed": 3})
    assert held.at_work.wait(10)
    held.gate.set()
    final = list(stream)[-1]
    assert final.type == "image_generation.completed" and pixels(final.b64_json)[0, 0, 0] == 3


def test_streams_tell_progress_and_show_parts(address, worker):
    class Slow:
        def __call__(self, batch):
            for done in (4, 8, 12):
                batch.tell(range(len(batch.jobs)), done, 16, np.stack([picture_of(done)] * len(batch.jobs)))
                until(lambda: not any(ticket.call._events for ticket in batch.tickets))  # they are on their way
            return np.stack([picture_of(job.seed) for job in batch.jobs])

    plain, worker.draw = worker.draw, Slow()
    try:
        answer = draw(address, seed=7, n=2, stream=True, partial_images=1, progress=True)
    finally:
        worker.draw = plain
    events = events_of(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all(name == content["type"] for name, content in events)
    for index in (0, 1):
        own = [content for _, content in events if content["index"] == index]
        assert [e["done"] for e in own if e["type"] == "image_generation.progress"] == [4, 8, 12]
        (part,) = [e for e in own if e["type"] == "image_generation.partial_image"]
        assert part["partial_image_index"] == 0 and (pixels(part["b64_json"]) == picture_of(8)).all()
        assert own[-1]["type"] == "image_generation.completed" and own[-1]["seed"] == 7 + index
        assert (pixels(own[-1]["b64_json"]) == picture_of(7 + index)).all()


def test_models(client, cards):
    of_classes, of_texts = client.models.list().data
    assert (of_classes.id, of_classes.kind, of_classes.size, of_classes.grid) == ("tiny-class", "c2i", "16x16", 4)
    assert of_classes.classes == list(cards[0].classes.names) and of_classes.sampling == cards[0].sampling
    assert (of_texts.kind, of_texts.classes) == ("t2i", None)
    assert client.models.retrieve("tiny-text").id == "tiny-text"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("gpt-image-1")


def test_errors_have_the_shape_that_the_official_client_knows(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="blue sqare")
    assert refused.value.param == "prompt" and "did you mean 'blue square'" in refused.value.message
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(model="dall-e-3", prompt="1")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError, match="went wrong twice"):
        client.images.generate(prompt="1", extra_body={"seed": 66})
    with pytest.raises(openai.APIError, match="went wrong twice"):
        list(client.images.generate(prompt="1", stream=True, extra_body={"seed": 66}))


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in answer.text
    return error


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"top_p": NaN}', b"[" * 50_000, b'{"n": 1e400}', b'{"seed": "\\ud800"}']
)
def test_malformed_bodies(address, body):
    answer = httpx.post(address + GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and error_of(answer)["type"] == "invalid_request_error"


def test_paths_methods_and_types(address):
    expected = [
        (httpx.get(address + "/v2"), 404),
        (httpx.get(address + GENERATIONS), 405),
        (httpx.delete(address + "/v1/models"), 405),
        (httpx.post(address + GENERATIONS, content=b'{"prompt": "1"}'), 415),
        (httpx.post(address + EDITS, json={}), 415),
        (httpx.post(address + EDITS, content=b"x", headers={"Content-Type": "multipart/form-data"}), 400),
        (httpx.post(address + EDITS, data={"prompt": "1"}, files={"picture": b"x"}), 400),
        (httpx.post(address + EDITS, data={"prompt": "1"}, files={"image": b"x"}), 400),
        (httpx.post(address + EDITS, data={"n": "x"}, files={"image": b"x"}), 400),
        (httpx.post(address + EDITS, data={f"x{i}": "1" for i in range(50)}, files={"image": b"x"}), 400),
    ]
    for answer, status in expected:
        assert answer.status_code == status, answer.text
        assert error_of(answer)["message"]
    assert expected[1][0].headers["allow"] == "POST"


def test_bodies_that_are_too_large_are_refused_while_they_come(address):
    def parts():
        for _ in range(1000):  # 10 MB in chunks, whose length nobody said
            yield b"x" * 10_000

    for content in (b"x" * 100_001, parts()):
        try:
            answer = httpx.post(address + GENERATIONS, content=content, headers={"Content-Type": "application/json"})
        except httpx.TransportError:  # the answer was given while the client still sent, which closes the connection
            continue
        assert answer.status_code == 413 and error_of(answer)["code"] == "too_large"
    with connect(address) as line:
        line.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        line.sendall(b"Content-Length: 9999999999999\r\n\r\n")
        assert line.recv(4096).startswith(b"HTTP/1.1 413")
    files = {"image": b"x" * 100_001}
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(address + EDITS, data={"prompt": "1"}, files=files).status_code == 413


def test_a_full_queue(address, held, source):
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(draw, address, n=6, seed=seed) for seed in (1, 11)]
        until(lambda: source.waiting >= 8)
        refused = draw(address, n=1)
        assert refused.status_code == 429 and error_of(refused)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        held.gate.set()
        for answer, seed in zip(answers, (1, 11)):
            assert [entry["seed"] for entry in answer.result().json()["data"]] == list(range(seed, seed + 6))
    assert draw(address, n=8).status_code == 200  # all places are free again


def test_pictures_that_take_too_long(cards):
    held = FakeWorker()
    held.gate.clear()
    with source_of(cards, held) as source, serving(source, Limits(timeout=0.3)) as address:
        late = draw(address, seed=1)
        assert late.status_code == 504 and error_of(late)["code"] == "timeout"
        name, content = events_of(draw(address, seed=1, stream=True).text)[-1]
        assert name == "error" and content["error"]["code"] == "timeout"
        until(lambda: held.batches == ["stopped", "stopped"])


def test_a_client_that_goes_away_takes_its_pictures_along(address, held, source):
    for stream in (False, True):
        held.at_work.clear()
        with connect(address) as line:
            line.sendall(generation(prompt="1", n=6, stream=stream))
            assert held.at_work.wait(10)
            until(lambda: source.waiting == 2)
        until(lambda: held.batches[-1] == "stopped" and source.waiting == 0)
    until(lambda: numbers(address).get(("llamagen_requests_total", "generations", "client gone"), 0) >= 2)
    assert httpx.get(f"{address}/health").json()["pictures"] == {"waiting": 0, "outstanding": 0}


def test_two_clients_at_once_share_a_batch_and_get_their_own(address, held):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(draw, address, seed=99)
        assert held.at_work.wait(10)
        answers = [pool.submit(draw, address, n=2, seed=seed) for seed in (1, 11)]
        before = numbers(address)
        until(lambda: numbers(address)[("llamagen_waiting_pictures",)] == 4)
        held.gate.set()
        pictures = [[pixels(entry["b64_json"])[0, 0, 0] for entry in a.result().json()["data"]] for a in answers]
    assert pictures == [[1, 2], [11, 12]] and first.result().status_code == 200
    assert sorted(held.batches[-1]) == [1, 2, 11, 12]
    count, total = ("llamagen_batch_pictures_count", "tiny-class"), ("llamagen_batch_pictures_sum", "tiny-class")
    after = numbers(address)
    assert after[count] - before.get(count, 0) == 2 and after[total] - before.get(total, 0) == 5


def test_slow_clients_wait_alone(address, monkeypatch):
    monkeypatch.setattr(slow_clients, "HEADER_SECONDS", 0.5)
    whole = generation(prompt="1", seed=1)
    silent, headers, body = (connect(address) for _ in range(3))
    idle = connect(address)
    idle.sendall(whole)
    assert idle.recv(2**20).startswith(b"HTTP/1.1 200")
    headers.sendall(whole[:30])
    body.sendall(whole[:-5])
    crowd = [connect(address) for _ in range(100)]
    for line in crowd:
        line.sendall(b"POST /v1/ima")
    assert draw(address, seed=4).status_code == 200
    idle.sendall(whole[:20])  # a second request on a connection, never finished
    for line in (silent, headers, idle, *crowd):
        line.settimeout(20)
        while line.recv(2**16):  # until it is closed
            pass
    assert body.recv(100).startswith(b"HTTP/1.1 408")
    for line in (silent, headers, body, idle, *crowd):
        line.close()


def test_a_reader_that_does_not_read_stops_nobody(address):
    lines = [connect(address) for _ in range(4)]
    for seed, line in enumerate(lines):
        line.sendall(generation(prompt="1", n=1, seed=seed, stream=True, partial_images=8))
    assert draw(address, seed=4, n=8).status_code == 200
    for line in lines:
        assert line.recv(100).startswith(b"HTTP/1.1 200")
        line.close()


def test_a_key_when_there_is_one(cards):
    with source_of(cards, FakeWorker()) as source, serving(source, LIMITS, key="sésame") as address:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "sésame".encode()}):
            answer = httpx.post(address + GENERATIONS, json={"prompt": "1"}, headers=headers)
            assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
            assert httpx.get(f"{address}/metrics", headers=headers).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        headers = {"Authorization": "Bearer sésame".encode()}
        assert httpx.post(address + GENERATIONS, json={"prompt": "1"}, headers=headers).status_code == 200


def test_a_mistake_of_ours_is_in_the_log_and_not_in_the_answer(address, source, monkeypatch, caplog):
    def broken(request):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(source, "draw", broken)
    with caplog.at_level(logging.INFO, "llamagen"):
        answer = draw(address)
        until(lambda: f"POST '{GENERATIONS}' 500" in caplog.text)  # is written after the answer was sent
    assert answer.status_code == 500 and "secret" not in answer.text and error_of(answer)["type"] == "server_error"
    assert "ZeroDivisionError: a secret" in caplog.text


def test_a_request_is_one_line_in_the_log(address, caplog):
    with caplog.at_level(logging.INFO, "llamagen"):
        draw(address, n=2, seed=4)
        until(lambda: len(caplog.records) == 1)
        httpx.get(address + "/x%0d%0aforged")
        until(lambda: len(caplog.records) == 2)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "\n" not in "".join(lines)
    assert lines[0].startswith(f"127.0.0.1 POST '{GENERATIONS}' 200 ") and "model=tiny-class n=2 seed=4" in lines[0]


def test_the_metrics_say_what_happened(address):
    before, refused = numbers(address), ("llamagen_requests_total", "generations", "400")
    draw(address, n=3), draw(address, n=0)
    until(lambda: numbers(address).get(refused, 0) > before.get(refused, 0))
    changed = {key: value - before.get(key, 0) for key, value in numbers(address).items()}
    assert (
        changed["llamagen_pictures_total", "tiny-class"] == 3 and changed["llamagen_tokens_total", "tiny-class"] == 48
    )
    assert changed["llamagen_requests_total", "generations", "200"] == 1
    assert changed[refused] == 1
    assert changed["llamagen_request_seconds_count", "generations"] == 2
    assert numbers(address)[("llamagen_workers_ready",)] == numbers(address)[("llamagen_workers",)] == 1


def test_stopping_finishes_what_has_begun(cards):
    worker = FakeWorker()
    with source_of(cards, worker, max_batch_size=2) as source, ThreadPoolExecutor() as pool:
        worker.gate.clear()
        with serving(source, LIMITS, grace=20) as address:
            begun = pool.submit(draw, address, n=2, seed=1)
            assert worker.at_work.wait(10)
            waiting = [pool.submit(draw, address, seed=11), pool.submit(draw, address, seed=12, stream=True)]
            kept = connect(address)
            until(lambda: source.waiting == 2)
            pool.submit(lambda: (waiting[0].result(), worker.gate.set()))  # what waits is told before the rest is drawn
        kept.close()
        assert begun.result().status_code == 200
        refused = waiting[0].result()
        assert refused.status_code == 503 and error_of(refused)["code"] == "unavailable"
        assert events_of(waiting[1].result().text)[-1][1]["error"]["code"] == "unavailable"


def test_raw_rubbish(address):
    for rubbish in (b"\0" * 50 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" * 40 + b"\r\n\r\n"):
        with connect(address) as line:
            line.sendall(rubbish)
            assert line.recv(4096).startswith((b"HTTP/1.1 400", b""))
    with connect(address) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
        assert line.recv(4096).startswith(b"HTTP/1.1 400")
    assert post("/x", b"")[:4] == b"POST" and draw(address).status_code == 200

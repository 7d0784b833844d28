"""Finding, downloading and recognising the frozen graph; the network is a server on this machine."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evaluations import inception_weights
from evaluations.inception_weights import FILE, VARIABLE, download, find_weights, identify

CONTENT = b"weights" * 1000


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """The address of a server that has the file."""
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / FILE).write_bytes(CONTENT)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/{FILE}"
        serving.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """An empty working directory and cache."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)


def publish(monkeypatch, content: bytes = CONTENT) -> None:
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(content).hexdigest())


def test_the_published_file_is_fetched_once(tmp_path, server, monkeypatch, capsys):
    publish(monkeypatch)
    path = find_weights(url=server)
    assert path == tmp_path / "cache" / FILE and path.read_bytes() == CONTENT
    assert identify(path).published and identify(path).name.startswith("Inception 2015-12-05 (weights ")
    assert f"from {server} to {path}" in capsys.readouterr().out
    assert find_weights(url="http://127.0.0.1:1/gone") == path
    assert capsys.readouterr().out == ""


def test_another_file_is_not_kept(tmp_path, server):
    with pytest.raises(ValueError, match=r"gave 7000 bytes with sha256 .*, expected 95673916 bytes with 009d6814"):
        find_weights(url=server)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/graph.pb", "{server}/none"])
def test_without_a_network_the_error_says_what_to_do(tmp_path, server, url):
    target = tmp_path / "cache" / FILE
    with pytest.raises(ValueError, match=r"cannot download .*give its path with --weights, or put it at") as caught:
        download(target, url.format(server=server))
    assert str(target) in str(caught.value)
    assert not target.exists()


def test_where_the_file_is_looked_for(tmp_path, monkeypatch):
    cached, named, given = tmp_path / "cache" / FILE, tmp_path / "named.pb", tmp_path / "given.pb"
    cached.parent.mkdir()
    for path in (cached, named, given):
        path.write_bytes(b"x")
    assert find_weights() == cached
    Path(FILE).write_bytes(b"x")
    assert find_weights() == Path(FILE)
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_weights() == named
    assert find_weights(given) == given
    with pytest.raises(FileNotFoundError, match=r"there is no file gone\.pb \(--weights\)"):
        find_weights("gone.pb")
    monkeypatch.setenv(VARIABLE, "gone.pb")
    with pytest.raises(FileNotFoundError, match=rf"there is no file gone\.pb \({VARIABLE}\)"):
        find_weights()


def test_other_weights_are_told_apart(tmp_path):
    (tmp_path / "other.pb").write_bytes(b"other")
    found = identify(tmp_path / "other.pb")
    assert not found.published and found.name == f"Inception with unknown weights ({found.sha256[:16]})"

"""The frozen Inception graph that published FIDs are measured with: where it lies, and whether a file is it."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from utils.distributed import barrier, is_main
from utils.files import atomic_path, cache_folder, sha256_of
from utils.progress import progress

FILE = "classify_image_graph_def.pb"
URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{FILE}"
SIZE = 95_673_916
SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
VARIABLE = "LLAMAGEN_INCEPTION"
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20


@dataclass(frozen=True)
class Weights:
    """Which weights a file holds: its hash, and whether it is the published file."""

    sha256: str
    published: bool

    @property
    def name(self) -> str:
        if self.published:
            return f"Inception 2015-12-05 (weights {self.sha256[:16]})"
        return f"Inception with unknown weights ({self.sha256[:16]})"


def identify(path: str | Path) -> Weights:
    """Hash a weights file and compare it with the published one."""
    digest = sha256_of(path)
    return Weights(digest, digest == SHA256)


def find_weights(path: str | Path | None = None, url: str = URL) -> Path:
    """The weights file: `path`, else $LLAMAGEN_INCEPTION, else in the working directory, else in the cache folder.

    Where there is none, it is downloaded into the cache folder, by one process.

    Raises:
        FileNotFoundError: when the path that was given does not exist.
        ValueError: when the download fails or gives another file.
    """
    if is_main():
        found = find_local(path) or download(cache_folder() / FILE, url)
    barrier()
    return found if is_main() else find_local(path) or download(cache_folder() / FILE, url)


def find_local(path: str | Path | None) -> Path | None:
    """The weights file in one of the places of `find_weights`, or None; nothing is downloaded."""
    for given, whence in ((path, "--weights"), (os.environ.get(VARIABLE), VARIABLE)):
        if given:
            if not Path(given).is_file():
                raise FileNotFoundError(f"there is no file {given} ({whence}); expected the Inception graph, {FILE}")
            return Path(given)
    places = (Path(FILE), cache_folder() / FILE)
    return next((place for place in places if place.is_file()), None)


def download(target: Path, url: str = URL) -> Path:
    """Fetch the published file, check it, and put it at `target`, whole or not at all."""
    print(f"downloading the Inception weights ({SIZE / 1e6:.0f} MB) from {url} to {target}", flush=True)
    digest = hashlib.sha256()
    try:
        with atomic_path(target) as temporary:
            with (
                urllib.request.urlopen(url, timeout=_TIMEOUT) as source,
                open(temporary, "wb") as file,
                progress(SIZE, "B", what=FILE) as bar,
            ):
                while chunk := source.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                size = file.tell()
            if digest.hexdigest() != SHA256:
                raise ValueError(
                    f"{url} gave {size} bytes with sha256 {digest.hexdigest()}, expected {SIZE} bytes with {SHA256}; "
                    f"nothing was kept: download {FILE} from elsewhere and give its path with --weights"
                )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"cannot download {url} ({reason}); fetch it on a machine with internet access and give its path with "
            f"--weights, or put it at {target}"
        ) from error
    return target

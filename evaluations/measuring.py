"""From files of pictures to what the metrics compare: statistics, stored or computed, with a cache for references."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evaluations.features import FeatureNetwork, PictureStatistics, feature_statistics, rank_share
from evaluations.metrics import NEIGHBOURS, Gaussian, ScoreStatistics
from evaluations.picture_sets import NpzPictures, PictureFolder, PictureSet, open_pictures, read_arrays
from utils import checkpoint
from utils.distributed import broadcast_object, get_world_size, is_main
from utils.files import cache_folder, sha256_of
from utils.progress import progress

STORED = ("mu", "sigma", "mu_s", "sigma_s")
_FORMAT = 1  # of cached files


@dataclass(frozen=True)
class Facts:
    """What was measured: a file or folder, its hash where it was taken, and the pictures in it."""

    path: str
    sha256: str | None
    pictures: int
    resolution: tuple[int, int]  # height, width
    stored_statistics: bool  # whether mean and covariance stood in the file, e.g. of a whole training set


@dataclass
class Measured:
    """A set of pictures as the metrics see it. `features` (pictures, D) float32 are those of its pictures."""

    facts: Facts
    pool: Gaussian
    spatial: Gaussian | None
    features: Tensor
    score: ScoreStatistics | None = None


@dataclass(frozen=True)
class HowToMeasure:
    """The network and how pictures are put through it."""

    network: FeatureNetwork
    device: torch.device | str = "cpu"  # of the statistics
    batch_size: int = 64
    shuffle_seed: int | None = None  # of the splits of the Inception Score


def check_count(pictures: PictureSet) -> None:
    """Raise ValueError where there are too few pictures for every metric."""
    least = NEIGHBOURS + 1
    if pictures.shape[0] < least:
        raise ValueError(f"{pictures.path} holds {pictures.shape[0]} pictures; at least {least} are needed")


def measure(path: str | Path, how: HowToMeasure, what: str) -> Measured | None:
    """Put all pictures at `path` through the network. Every process calls this and does its share; rank 0 gets it.

    As established, statistics that stand in an npz (mu, sigma, mu_s, sigma_s) take the place of those of its pictures.

    Raises:
        FileNotFoundError, ValueError: when `path` holds no pictures, too few, or statistics of another network.
    """
    pictures = open_pictures(path)
    check_count(pictures)
    seen = look(pictures, how, what)
    if not is_main():
        return None
    count, height, width, _ = pictures.shape
    stored = read_arrays(pictures.path, STORED) if isinstance(pictures, NpzPictures) else {}
    facts = Facts(str(path), None, count, (height, width), "mu" in stored)
    if "mu" in stored:
        pool, spatial = _stored_gaussians(stored, seen, pictures.path)
    else:
        pool, spatial = seen.pool.gaussian(), seen.spatial.gaussian() if seen.spatial else None
    return Measured(facts, pool, spatial, seen.features, seen.score)


def look(pictures: PictureSet, how: HowToMeasure, what: str) -> PictureStatistics:
    """The statistics and features of pictures, each put through the network by one of the processes."""
    count = pictures.shape[0]
    share, order = rank_share(count), None
    if how.shuffle_seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(how.shuffle_seed))
    batches = _counted(pictures, share, how.batch_size, what)
    return feature_statistics(how.network, batches, first=share.start, keep_features=True, split_order=order)


def _counted(pictures: PictureSet, share: range, batch_size: int, what: str) -> Iterator[Tensor]:
    """Batches of this process's share, with a bar over those of all."""
    count = pictures.shape[0]
    seen = brightest = 0
    with progress(count, "image", what=what) as bar:
        for batch in pictures.batches(share, batch_size):
            seen, brightest = seen + len(batch), max(brightest, int(batch.max()))
            if brightest <= 1 and seen >= min(64, len(share)):
                raise ValueError(
                    f"pictures of {pictures.path} have no value above 1: they seem to be scaled to [0, 1] before they "
                    f"became uint8; expected values 0..255"
                )
            yield batch
            bar.update(min(len(batch) * get_world_size(), count - bar.n))


def _stored_gaussians(stored: dict, seen: PictureStatistics, path: Path) -> tuple[Gaussian, Gaussian | None]:
    missing = [name for name in STORED if name not in stored]
    if missing:
        raise ValueError(f"{path} holds mu but not {', '.join(missing)}; expected all of {', '.join(STORED)} or none")
    gaussians = []
    for mean, covariance, own in (("mu", "sigma", seen.pool), ("mu_s", "sigma_s", seen.spatial)):
        if own is None:
            gaussians.append(None)
            continue
        d = len(own.mean)
        if stored[mean].shape != (d,) or stored[covariance].shape != (d, d):
            raise ValueError(
                f"{path} holds {mean} {stored[mean].shape} and {covariance} {stored[covariance].shape}, but the "
                f"network ({seen.label}) has {d} features: the file was made with another network"
            )
        gaussians.append(Gaussian.of(*(torch.from_numpy(stored[n]).to(own.mean.device) for n in (mean, covariance))))
    return gaussians[0], gaussians[1]


def measure_reference(path: str | Path, how: HowToMeasure, cache: Path | None) -> Measured | None:
    """`measure`, kept in the folder `cache` under the hashes of the file and the network's weights; None keeps nothing.

    Raises:
        FileNotFoundError, ValueError: as `measure`.
    """
    check_count(open_pictures(path))
    sha256 = broadcast_object(hash_of(path) if is_main() else None)
    key = hashlib.sha256(f"{_FORMAT} {sha256} {how.network.label}".encode()).hexdigest()[:32]
    kept = None if cache is None else cache / f"{key}.safetensors"
    known = _read_cached(kept, str(path), how.device) if kept and is_main() else None
    if broadcast_object(known is not None):
        return known
    measured = measure(path, how, "reference")
    if measured is not None:
        measured.facts = replace(measured.facts, sha256=sha256)
        if kept:
            _write_cached(kept, measured)
    return measured


def reference_cache() -> Path:
    """The default folder of `measure_reference`."""
    return cache_folder() / "references"


def hash_of(path: str | Path) -> str:
    """The SHA-256 of a file, or of the names and bytes of the pictures in a folder."""
    pictures = open_pictures(path)
    if not isinstance(pictures, PictureFolder):
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in pictures.files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _write_cached(kept: Path, measured: Measured) -> None:
    tensors = {"pool.mean": measured.pool.mean, "pool.factor": measured.pool.factor, "features": measured.features}
    if measured.spatial is not None:
        tensors |= {"spatial.mean": measured.spatial.mean, "spatial.factor": measured.spatial.factor}
    checkpoint.save_weights(tensors, kept, {"facts": json.dumps(asdict(measured.facts))})


def _read_cached(kept: Path, path: str, device: torch.device | str) -> Measured | None:
    """What was kept, under the path it has now; None where nothing is, or where it is damaged."""
    if not kept.is_file():
        return None
    try:
        with safe_open(kept, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()["facts"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    facts = Facts(**{**facts, "path": path, "resolution": tuple(facts["resolution"])})
    gaussians = [
        Gaussian(tensors[f"{which}.mean"], tensors[f"{which}.factor"]) if f"{which}.mean" in tensors else None
        for which in ("pool", "spatial")
    ]
    return Measured(facts, gaussians[0], gaussians[1], tensors["features"])

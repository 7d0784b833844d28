"""Where a set of pictures comes from, as far as the files beside it tell, and which known mistakes that shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evaluations.measuring import Facts
from evaluations.picture_sets import open_pictures
from evaluations.render import beside
from utils.files import read_json

PUBLISHED_COUNT = 50_000
GENERATION_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
GENERATED, RECONSTRUCTED, ORIGINALS, UNKNOWN = "generated", "reconstructed", "originals", "unknown"
LABEL_NOTES = ("class_id", "label")  # what the samplers call the class of a picture
_READERS = 8


@dataclass(frozen=True)
class Provenance:
    """`kind` says how the pictures were made, `settings` with which, `labels` how their classes are spread."""

    kind: str
    settings: Mapping[str, Any]
    labels: str
    resized: str


def provenance(path: str | Path) -> Provenance:
    """Read the settings beside a folder or npz that `evaluations.render` wrote, and the notes in its pictures."""
    path = Path(path)
    folder = path if path.is_dir() else path.with_name(path.name.removesuffix(".npz"))
    settings = _settings(folder)
    labels = _spread(Counter(_labels(folder))) if settings else "unknown"
    return Provenance(_kind(settings), settings, labels, _resized(settings))


def _settings(folder: Path) -> Mapping[str, Any]:
    record = beside(folder, ".json")
    try:
        found = read_json(record) if record.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _kind(settings: Mapping[str, Any]) -> str:
    if not settings:
        return UNKNOWN
    if any(name in settings for name in ("gpt_model", "gpt_ckpt", "gpt_sha256")):
        return GENERATED
    if any(name in settings for name in ("vq_sha256", "vqgan_sha256", "vae", "decoder", "padded_to")):
        return RECONSTRUCTED
    return ORIGINALS if "data_path" in settings else UNKNOWN


def _resized(settings: Mapping[str, Any]) -> str:
    made, saved = settings.get("image_size"), settings.get("image_size_eval")
    if made is None or saved is None:
        return "unknown"
    if made == saved:
        return "no"
    return f"from {made} to {saved}, bicubic {'with' if settings.get('antialias') else 'without'} antialiasing"


def _labels(folder: Path) -> Iterator[str]:
    """The class of each picture in the folder, until one has no note of it."""
    if not folder.is_dir():
        return
    with ThreadPoolExecutor(_READERS) as readers:
        for label in readers.map(_label, open_pictures(folder).files):
            if label is None:
                return
            yield label


def _label(file: Path) -> str | None:
    with Image.open(file) as image:  # reads the notes and not the pixels
        return next((str(image.info[name]) for name in LABEL_NOTES if name in image.info), None)


def _spread(counts: Counter) -> str:
    if not counts:
        return "unknown"
    low, high = min(counts.values()), max(counts.values())
    if high - low <= 1:
        return f"balanced: {len(counts)} classes, {low if low == high else f'{low} or {high}'} pictures each"
    return f"random: {len(counts)} classes, {low} to {high} pictures each"


def is_validation(reference: Facts, origin: Provenance) -> bool:
    """Whether the reference looks like a validation set's originals and not like a training set's statistics."""
    name = Path(reference.path).name.lower()
    return not reference.stored_statistics and (origin.kind == ORIGINALS or name.startswith("val"))


def warnings(reference: Facts, samples: Facts, of_reference: Provenance, of_samples: Provenance) -> list[str]:
    """A sentence for each known mistake that makes a number incomparable with published ones."""
    found = []
    validation = is_validation(reference, of_reference)
    if of_samples.kind == GENERATED and validation:
        found.append(
            f"the samples are generated, but the reference {reference.path} is a validation set; published FIDs of "
            f"generation use {GENERATION_REFERENCE}, and a validation reference gives higher ones"
        )
    elif of_samples.kind == UNKNOWN and validation:
        found.append(
            f"the reference {reference.path} is a validation set: right for the rFID of a tokenizer, wrong for "
            f"generated samples, which are compared with {GENERATION_REFERENCE}"
        )
    elif of_samples.kind == RECONSTRUCTED and reference.stored_statistics:
        found.append(
            f"the samples are reconstructions, but the reference {reference.path} holds statistics of a training set; "
            f"published rFIDs compare with the originals of the validation set"
        )
    if samples.pictures < PUBLISHED_COUNT:
        found.append(
            f"{samples.pictures:,} samples; published numbers use {PUBLISHED_COUNT:,}, and FID is higher with fewer"
        )
    if samples.resolution != reference.resolution:
        found.append(
            f"the samples are {_size(samples)} pixels, the reference {_size(reference)}: resize the samples as the "
            f"sampler does (--image-size-eval), the sizes leave traces in every metric"
        )
    return found


def _size(facts: Facts) -> str:
    return f"{facts.resolution[1]}x{facts.resolution[0]}"

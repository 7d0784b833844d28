"""Tar shards (the WebDataset layout): images, captions, labels and codes in a few large files, read in one go.

    python3 dataset/tars.py --data-path data/mine/train --output data/mine_tars --samples-per-shard 1000

packs a folder of images, with the captions and labels beside them and on request their codes. The members of a sample
stand one after another and share a key, the name up to the first dot after the last slash:

    {key}.png .jpg .webp    the image
    {key}.txt               its caption
    {key}.cls               the number of its class
    {key}.json              anything else, here: captions and label
    {key}.codes.npy         its codes, int64 (views, tokens)

`shards.json` beside the shards counts them. Nothing is ever unpickled: of what a foreign tar may hold, only these five
kinds are decoded.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import io
import logging
import random
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dataset.imagenet import build_imagenet_code
from dataset.images import ClassFolders, read_rgb
from dataset.lists import CaptionLists
from dataset.tar_members import IMAGE_FORMATS, BadSample, decode_member, encode_member, member_kind, read_tar
from utils import errors
from utils.args import make_parser
from utils.claim import claim_folder
from utils.distributed import get_rank, get_world_size
from utils.files import read_json, write_atomic, write_json
from utils.progress import progress
from utils.seeding import mix_seed, seeded

MANIFEST = "shards.json"
PATIENCE = 100  # samples after which the share of bad ones means something
_MAX_WORKERS = 1024
_log = logging.getLogger("llamagen.dataset")


# ---- writing


def write_shards(
    folder: str | Path,
    samples: Sequence[Mapping[str, Any]],
    samples_per_shard: int = 1000,
    classes: Sequence[str] | None = None,
) -> list[Path]:
    """Write samples (member name -> value as in `encode_member`, and "__key__") as `folder`/shard-000000.tar, ...

    Shards appear whole or not at all, and those that are there already are kept; the manifest comes last.

    Raises:
        ValueError: when a sample or key is unfit, or the folder holds shards of another set.
    """
    if samples_per_shard < 1 or not len(samples):
        raise ValueError(f"nothing to write: {len(samples)} samples, {samples_per_shard} in a shard")
    folder = Path(folder)
    settings = {"samples": len(samples), "samples_per_shard": samples_per_shard, "classes": classes and list(classes)}
    claim_folder(folder, folder / MANIFEST, {**settings, "shards": []}, "shards", unchecked=["shards"])
    starts = range(0, len(samples), samples_per_shard)
    shards = [folder / f"shard-{number:06d}.tar" for number in range(len(starts))]
    with progress(len(samples), "sample", what="writing tar shards") as bar:
        for shard, start in zip(shards, starts):
            part = range(start, min(start + samples_per_shard, len(samples)))
            if not shard.is_file():
                write_atomic(shard, lambda file, part=part: _write_tar(file, (samples[index] for index in part)))
            bar.update(len(part))
    counts = [min(samples_per_shard, len(samples) - start) for start in starts]
    entries = [{"name": shard.name, "samples": count} for shard, count in zip(shards, counts)]
    write_json(folder / MANIFEST, {**settings, "shards": entries})
    return shards


def _write_tar(file: Any, samples: Iterable[Mapping[str, Any]]) -> None:
    from webdataset.writer import TarWriter  # here, so that everything that reads no tars does without the package

    keys: set[str] = set()
    with TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False, format="PAX_FORMAT") as writer:
        for sample in samples:
            key = sample["__key__"]
            if "." in key.rpartition("/")[2] or not key.rpartition("/")[2] or key in keys:
                raise ValueError(f"the key {key!r} is empty, comes twice or has a dot in it")
            keys.add(key)
            members = {name: encode_member(name, value) for name, value in sample.items() if name != "__key__"}
            writer.write({"__key__": key, **members})


class FolderSamples(Sequence[dict[str, Any]]):
    """The images of class folders as samples for `write_shards`, numbered as `ClassFolders` numbers them.

    Captions come from the .jsonl lists in the folder, if any; `codes` gives the codes of an image by its number.
    """

    def __init__(self, data_path: str | Path, codes: Callable[[int], np.ndarray] | None = None) -> None:
        images = ClassFolders(data_path)
        self.samples, self.classes, self.codes = images.samples, images.classes, codes
        lists = sorted(Path(data_path).glob("*.jsonl"))
        records = CaptionLists(lists) if lists and any(path.stat().st_size for path in lists) else ()
        self.captions = {str(record.image_file.resolve()): list(record.text) for record in records}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        path, label = self.samples[index]
        captions = self.captions.get(str(Path(path).resolve()), [])
        sample = {"__key__": f"{index:09d}", "cls": label, **image_member(Path(path))}
        sample["json"] = {"text": captions, "label": self.classes[label], "image_path": Path(path).name}
        if captions:
            sample["txt"] = captions[0]
        if self.codes:
            sample["codes.npy"] = self.codes(index)
        return sample


def image_member(path: Path) -> dict[str, bytes]:
    """An image file as a member: its own bytes, or as PNG where shards do not take its format."""
    suffix = path.suffix.lower()[1:]
    if suffix in IMAGE_FORMATS:
        return {suffix: path.read_bytes()}
    stream = io.BytesIO()
    read_rgb(path).save(stream, "PNG")
    return {"png": stream.getvalue()}


# ---- reading


def list_tars(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tars that `source` means, sorted: a folder of them, one, or several.

    Raises:
        FileNotFoundError: when one is missing, or the folder has none, or fewer than its manifest says.
    """
    several = [source] if isinstance(source, (str, Path)) else source
    paths = [Path(path) for path in several]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        counts = shard_counts(folder)
        paths = sorted({*folder.glob("*.tar"), *(folder / name for name in counts)})
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"there is no tar {missing[0]}" if missing else f"there are no tars in {source}")
    return sorted(paths)


def shard_counts(folder: Path) -> dict[str, int]:
    """How many samples each shard in `folder` has, from the manifest; empty without one."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {"shards": []}
    try:
        return {entry["name"]: int(entry["samples"]) for entry in manifest["shards"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged; delete it or write the shards again") from error


class TarSamples(IterableDataset):
    """The samples of tar shards; items are tuples of `members`, each once per epoch over all ranks and workers.

    `members` are names such as "txt", "cls", "json", "codes.npy", or "image" (RGB, whatever its format, then through
    `transform`) or "key" (str). Each worker of each rank reads shards of its own, so have at least as many shards as
    workers in all; ranks may differ in the number of their samples, which `endless` (the next epoch follows at once)
    makes good for trainers that count steps.

    With `shuffle` samples in a buffer, the order is random and, as that of the transform's randomness, a function of
    `seed`, epoch, rank and worker alone; a run goes on with `set_epoch`.

    Raises:
        FileNotFoundError: when there are no tars.
        ValueError: when there are fewer shards than ranks; on reading, when more than `max_bad_share` of the samples
            so far are bad: undecodable, lacking a member, or lost with the end of a shard. Those up to it are left
            out, counted (`bad`) and logged.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        members: Sequence[str] = ("image", "cls"),
        *,
        transform: Callable | None = None,
        seed: int = 0,
        shuffle: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        max_bad_share: float = 0.01,
        endless: bool = False,
    ) -> None:
        self.shards, self.members, self.transform = list_tars(source), tuple(members), transform
        self.seed, self.shuffle, self.endless, self.max_bad_share = seed, shuffle, endless, max_bad_share
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size
        if len(self.shards) < self.world_size:
            raise ValueError(f"{len(self.shards)} shards are too few for {self.world_size} ranks; write smaller shards")
        folders = {path.parent for path in self.shards}
        self._expected = {folder / name: count for folder in folders for name, count in shard_counts(folder).items()}
        # shared with the workers, a row for each so that no lock is needed: samples seen, bad ones
        self._counts = torch.zeros(_MAX_WORKERS, 2, dtype=torch.int64).share_memory_()
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def total(self) -> int:
        """Samples in all shards, of all ranks.

        Raises:
            ValueError: when a shard is not counted in its shards.json.
        """
        uncounted = [path for path in self.shards if path not in self._expected]
        if uncounted:
            raise ValueError(
                f"{uncounted[0]} is not counted in a {MANIFEST} beside it; write the shards with dataset/tars.py"
            )
        return sum(self._expected[path] for path in self.shards)

    @property
    def bad(self) -> int:
        """How many bad samples this rank has left out so far."""
        return int(self._counts[:, 1].sum())

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; reaches workers that live on as well."""
        self._epoch[0] = epoch

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        consumer, consumers, epoch = self.rank * workers + worker, self.world_size * workers, int(self._epoch)
        while True:
            shards = self._order(epoch)[consumer::consumers]
            chance = random.Random(mix_seed(self.seed, epoch, consumer, consumers))
            for sample in shuffled(self._samples(shards, worker), self.shuffle, chance):
                item = self._decoded(sample, epoch, worker)
                if item is not None:
                    yield item
            epoch += 1
            if not self.endless or not shards:
                return

    def _order(self, epoch: int) -> list[Path]:
        shards = list(self.shards)
        if self.shuffle:
            random.Random(mix_seed(self.seed, epoch)).shuffle(shards)
        return shards

    def _samples(self, shards: list[Path], worker: int) -> Iterator[dict[str, Any]]:
        for shard in shards:
            complaints: list[str] = []
            count = 0
            for sample in read_tar(shard, complaints.append):
                count += 1
                yield sample
            for complaint in complaints:
                self._note_bad(worker, complaint, 1)
            lost = self._expected.get(shard, count) - count - len(complaints)
            if lost > 0:
                self._note_bad(worker, f"{shard} lacks samples that {MANIFEST} counts", lost)

    def _decoded(self, sample: dict[str, Any], epoch: int, worker: int) -> tuple[Any, ...] | None:
        key = sample["__key__"]
        self._counts[worker, 0] += 1
        try:
            with seeded(mix_seed(self.seed, epoch, zlib.crc32(key.encode("utf-8", "surrogateescape")))):
                return tuple(self._member(sample, name) for name in self.members)
        except BadSample as error:
            self._note_bad(worker, f"sample {key}: {error}", 1)
            return None

    def _member(self, sample: dict[str, Any], name: str) -> Any:
        if name == "key":
            return sample["__key__"]
        found = next((m for m in sample if m == name or (name == "image" and member_kind(m) == "image")), None)
        if found is None:
            raise BadSample(f"there is no {name} among {', '.join(sorted(sample.keys() - {'__key__'})) or 'nothing'}")
        value = decode_member(found, sample[found])
        return self.transform(value) if name == "image" and self.transform else value

    def _note_bad(self, worker: int, reason: str, number: int) -> None:
        _log.warning("left out: %s", reason)
        self._counts[worker, 1] += number
        seen, bad = self._counts.sum(0).tolist()
        if bad > self.max_bad_share * max(seen, PATIENCE):
            raise ValueError(
                f"{bad} bad samples among the first {max(seen, bad)}, more than {self.max_bad_share:.1%}; "
                f"check the shards. The last one: {reason}"
            )


def shuffled(items: Iterable[Any], size: int, chance: random.Random) -> Iterator[Any]:
    """The items in random order, as far as a buffer of `size` of them allows."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        elif size:
            place = chance.randrange(size)
            buffer[place], item = item, buffer[place]
            yield item
        else:
            yield item
    chance.shuffle(buffer)
    yield from buffer


def build_tars(args: Namespace, transform: Callable) -> TarSamples:
    """The images and classes of the shards in `args.data_path`, over and over, for training."""
    share = getattr(args, "max_bad_share", 0.01)
    order = {"seed": args.global_seed, "shuffle": 1000, "endless": True}
    return TarSamples(args.data_path, transform=transform, max_bad_share=share, **order)


def _codes_of(args: Namespace) -> Callable[[int], np.ndarray]:
    codes = build_imagenet_code(args)
    return lambda index: codes.source.read(index)[0][0]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder with a sub-folder of images per class")
    parser.add_argument("--output", required=True, help="folder to write the shards to")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples in one tar")
    parser.add_argument("--code-path", help="put the codes that were extracted from --data-path to here in as well")
    parser.add_argument("--image-size", type=int, default=256, help="image size of those codes")
    args = parser.parse_args()
    samples = FolderSamples(args.data_path, _codes_of(args) if args.code_path else None)
    shards = write_shards(args.output, samples, args.samples_per_shard, samples.classes)
    print(f"{args.output}: {len(samples)} samples in {len(shards)} shards")


if __name__ == "__main__":
    errors.run(main)

"""Turning captions into text features, so that training never runs the text encoder. `extract_t5_feature.py` is its
command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.features import FeatureWriter, Item
from dataset.images import BadItems
from dataset.lists import CaptionLists, list_files
from language.build import load_text_encoder
from language.embedder import TextEmbedder
from utils.args import apply_threads, num_workers
from utils.claim import claim
from utils.distributed import barrier, get_rank, get_world_size, is_main, process_group, read_launch, sum_over_ranks
from utils.files import write_atomic
from utils.progress import progress

_UNIT = 2048  # captions that are sorted by length together, and the captions of a packed shard


def extract(args: argparse.Namespace) -> None:
    """Write the features of every caption in the lists of ``args.data_path``; what is there already is kept.

    Raises:
        ValueError: when too many captions are missing, or the folder holds features that were made otherwise.
    """
    apply_threads(args)
    with process_group(args.device) as device:
        records = CaptionLists(list_files(args.data_path, args.data_start, args.data_end))
        encoder = load_text_encoder(args, args.t5_model_path, device)
        settings = {
            "encoder": encoder.name,
            "width": encoder.width,
            "precision": args.precision,
            "max_tokens": args.t5_feature_max_len,
            "caption_key": args.caption_key,
            "truncated_at_full_stop": args.trunc_caption,
        }
        claim(Path(args.t5_path, "extraction.json"), settings, "text features", "--t5-path")
        job = Job(args, records, encoder, device)
        job.write_files() if args.layout == "files" else job.write_packed()
        job.report()


class Tokens(NamedTuple):
    """The captions of one unit: their places in the records, their token ids, how many tokens each lost."""

    places: list[int]
    ids: list[list[int]]
    lost: list[int]


class Units(Dataset):
    """Captions, read and tokenized `_UNIT` at a time; those that `skip` names are left out."""

    def __init__(self, args: argparse.Namespace, records: CaptionLists, encoder: TextEmbedder, skip: set[int]) -> None:
        self.key, self.truncated = args.caption_key, args.trunc_caption
        self.records, self.skip = records, skip
        self.tokenize = encoder.tokenize
        self.bad = BadItems(len(records), args.max_bad_share)

    def __len__(self) -> int:
        return -(-len(self.records) // _UNIT)

    def places(self, unit: int) -> range:
        """Places of the captions of `unit`."""
        return range(unit * _UNIT, min((unit + 1) * _UNIT, len(self.records)))

    def __getitem__(self, unit: int) -> Tokens:
        places, captions = [], []
        for place in self.places(unit):
            if place in self.skip:
                continue
            try:
                captions.append(self.records[place].caption(self.key, self.truncated))
                places.append(place)
            except ValueError as error:
                self.bad.add(place, error)
        return Tokens(places, *(self.tokenize(captions) if captions else ([], [])))


class Job:
    """This process's share: unit u belongs to rank u modulo the number of ranks."""

    def __init__(
        self, args: argparse.Namespace, records: CaptionLists, encoder: TextEmbedder, device: torch.device
    ) -> None:
        self.args, self.records, self.encoder, self.device = args, records, encoder, device
        self.units = Units(args, records, encoder, set())
        self.mine = range(get_rank(), len(self.units), get_world_size())
        self.cut = self.lost = 0

    def write_files(self) -> None:
        """One float32 file (1, n, width) per caption, the established layout."""
        mine = [place for unit in self.mine for place in self.units.places(unit)]
        self.units.skip = {place for place in mine if self._file(place).is_file()}
        with progress(len(mine), "caption", done=len(self.units.skip)) as bar:
            for _, tokens in self._tokenized(self.mine):
                for place, features in self._encoded(tokens):
                    array = features[None].float().cpu().numpy()
                    write_atomic(self._file(place), lambda file, array=array: np.save(file, array, allow_pickle=False))
                    bar.update()

    def write_packed(self) -> None:
        """Packed bfloat16 shards, one for each unit."""
        writer = None
        if is_main():  # the manifest is there before the others look for it
            writer = self._writer()
        barrier()
        writer = writer or self._writer()
        missing = [unit for unit in self.mine if not writer.has(unit)]
        count = sum(len(self.units.places(unit)) for unit in self.mine)
        with progress(count, "caption", done=count - sum(len(self.units.places(unit)) for unit in missing)) as bar:
            for unit, tokens in self._tokenized(missing):
                if tokens.places:
                    writer.write(unit, self._items(tokens))
                bar.update(len(self.units.places(unit)))
        barrier()
        if is_main():
            writer.finish()

    def report(self) -> None:
        """Say how many captions were cut, or had no text."""
        counts = torch.tensor([self.cut, self.lost, len(self.units.bad)], device=self.device)
        cut, lost, bad = sum_over_ranks(counts).tolist()
        if is_main() and cut:
            print(
                f"warning: {cut} captions have more than {self.encoder.model_max_length} tokens; "
                f"{lost} tokens at their ends were cut off"
            )
        if is_main() and bad:
            print(f"warning: {bad} lines have no caption {self.args.caption_key!r} and got no features")

    def _writer(self) -> FeatureWriter:
        return FeatureWriter(self.args.t5_path, self.records.stems, self.encoder.width, self.encoder.name)

    def _file(self, place: int) -> Path:
        record = self.records[place]
        return Path(self.args.t5_path, record.stem, f"{record.line}.npy")

    def _tokenized(self, units: Sequence[int]) -> Iterator[tuple[int, Tokens]]:
        workers = num_workers(self.args, read_launch().local_size)
        loader = DataLoader(self.units, batch_size=None, sampler=units, num_workers=workers)
        return zip(units, loader)

    def _encoded(self, tokens: Tokens) -> Iterator[tuple[int, Tensor]]:
        """(place, features) in batches of about equal length, so that little padding is computed."""
        self.cut += sum(lost > 0 for lost in tokens.lost)
        self.lost += sum(tokens.lost)
        order = sorted(range(len(tokens.ids)), key=lambda i: len(tokens.ids[i]), reverse=True)
        for first in range(0, len(order), self.args.batch_size):
            batch = order[first : first + self.args.batch_size]
            features = self.encoder.encode_tokens([tokens.ids[i] for i in batch])
            yield from zip((tokens.places[i] for i in batch), features)

    def _items(self, tokens: Tokens) -> Iterator[Item]:
        for place, features in self._encoded(tokens):
            record = self.records[place]
            yield record.stem, record.line, features.cpu()

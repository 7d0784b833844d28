"""Convert text features between one file per caption and packed shards.

    python3 tools/convert_features.py --source t5_features --output t5_packed
    python3 tools/convert_features.py --source t5_packed --output t5_features

The layout of --source decides the direction. Packing rounds to bfloat16; unpacking writes float32. What is done
already is kept, so a conversion that was stopped goes on where it was. With --verify nothing is written: checksums
of packed features are compared, and given both folders, all features as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from dataset.features import FeatureFiles, FeatureWriter, PackedFeatures, from_bits, open_features, to_bits
from utils import errors
from utils.args import make_parser
from utils.files import write_atomic
from utils.progress import progress


def pack(
    source: FeatureFiles,
    output: str | Path,
    items_per_shard: int = 2048,
    encoder: str | None = None,
    encoder_sha256: str | None = None,
) -> PackedFeatures:
    """Pack all captions of `source`, in the order of lists and lines; finished shards are kept.

    Raises:
        ValueError: when a file is unreadable, or the folder was packed from other files.
    """
    if items_per_shard < 1:
        raise ValueError(f"a shard needs at least one caption, found --items-per-shard {items_per_shard}")
    keys = list(source.keys())
    writer = FeatureWriter(output, sorted({stem for stem, _ in keys}), source.dim, encoder, encoder_sha256)
    with progress(len(keys), "caption", what="packing") as bar:
        for shard, start in enumerate(range(0, len(keys), items_per_shard)):
            part = keys[start : start + items_per_shard]
            if not writer.has(shard):
                writer.write(shard, ((stem, line, source.read(stem, line)) for stem, line in part))
            bar.update(len(part))
    packed = writer.finish()
    if list(packed.keys()) != keys:
        raise ValueError(
            f"{output} was packed from other files or with another --items-per-shard; give another folder or delete it"
        )
    return packed


def unpack(source: PackedFeatures, output: str | Path) -> FeatureFiles:
    """Write one float32 file (1, n, dim) per caption; files that are there already are kept."""
    with progress(len(source), "caption", what="unpacking") as bar:
        for stem, line in source.keys():  # noqa: SIM118 - not a dictionary
            file = Path(output, stem, f"{line}.npy")
            if not file.is_file():
                array = source.read(stem, line)[None].numpy()
                write_atomic(file, lambda stream, array=array: np.save(stream, array, allow_pickle=False))
            bar.update()
    return FeatureFiles(output, source.dim)


def compare(source: FeatureFiles | PackedFeatures, output: FeatureFiles | PackedFeatures) -> int:
    """Check that both hold the same captions with features that are equal in bfloat16; returns their number.

    Raises:
        ValueError: naming the first difference.
    """
    keys, others = list(source.keys()), set(output.keys())
    if set(keys) != others:
        stem, line = min(set(keys) ^ others)
        where, lacking = (source, output) if (stem, line) not in others else (output, source)
        raise ValueError(f"line {line} of the list {stem!r} is in {where.path} but not in {lacking.path}")
    with progress(len(keys), "caption", what="comparing") as bar:
        for stem, line in keys:
            one, other = (from_bits(to_bits(store.read(stem, line))) for store in (source, output))
            if not torch.equal(one, other):
                raise ValueError(f"line {line} of the list {stem!r} differs between {source.path} and {output.path}")
            bar.update()
    return len(keys)


def _verify(source: FeatureFiles | PackedFeatures, output: str | None) -> str:
    stores = [source] + ([open_features(output)] if output else [])
    packed = [store for store in stores if isinstance(store, PackedFeatures)]
    if not packed and len(stores) == 1:
        raise ValueError(f"{source.path} is not packed and has no checksums; give --output as well to compare with it")
    shards = sum(len(list(store.verify())) for store in packed)
    compared = f", {compare(*stores)} captions agree" if len(stores) == 2 else ""
    return f"verified: {shards} shards have their checksums{compared}"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", required=True, help="folder of features, packed or one file per caption")
    parser.add_argument("--output", help="folder to write, or with --verify to compare with")
    parser.add_argument("--items-per-shard", type=int, default=2048, help="captions in one packed shard")
    parser.add_argument("--encoder", help="name of the text encoder, noted in the manifest of packed features")
    parser.add_argument("--encoder-sha256", help="checksum of the text encoder's weights, noted as well")
    parser.add_argument("--verify", action="store_true", help="check in place of converting")
    args = parser.parse_args()
    source = open_features(args.source)
    if args.verify:
        print(_verify(source, args.output))
    elif not args.output:
        raise ValueError("--output is missing: give the folder to write")
    elif isinstance(source, FeatureFiles):
        packed = pack(source, args.output, args.items_per_shard, args.encoder, args.encoder_sha256)
        print(f"{args.output}: {len(packed)} captions in {len(packed.manifest['shards'])} shards")
    else:
        print(f"{unpack(source, args.output).path}: {len(source)} captions")


if __name__ == "__main__":
    errors.run(main)

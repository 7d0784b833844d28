"""Text features, packed and in one file per caption."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.augmentation import eval_transform
from dataset.build import build_dataset
from dataset.features import (
    MANIFEST,
    FeatureFiles,
    FeatureWriter,
    PackedFeatures,
    from_bits,
    open_features,
    to_bits,
)
from tests.dataset.test_t2i import small_set  # noqa: F401 - a fixture
from tools import convert_features
from tools.convert_features import compare, pack, unpack

DIM = 6
STEMS = st.sampled_from(["a", "part.0001", "part.0002", "Ü x"])


def save(folder: Path, stem: str, line: int, array: np.ndarray) -> Path:
    path = folder / stem / f"{line}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def random_features(tokens: int, seed: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, tokens, dim)).astype(np.float32) * 10.0 ** (seed % 9 - 4)


@pytest.fixture
def files(tmp_path: Path) -> FeatureFiles:
    """Ten captions of 1 to 5 tokens in two lists."""
    for number in range(10):
        save(tmp_path / "files", "ab"[number % 2], 3 * number, random_features(number % 5 + 1, number))
    return FeatureFiles(tmp_path / "files")


@pytest.fixture
def packed(files: FeatureFiles, tmp_path: Path) -> PackedFeatures:
    return pack(files, tmp_path / "packed", items_per_shard=4, encoder="t5", encoder_sha256="abc")


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.tuples(STEMS, st.integers(0, 10**7)), st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_packed_equals_files_up_to_rounding(tokens: dict[tuple[str, int], int], items_per_shard: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed, ((stem, line), count) in enumerate(tokens.items()):
            save(Path(folder, "files"), stem, line, random_features(count, seed))
        files = open_features(Path(folder, "files"))
        packed = pack(files, Path(folder, "packed"), items_per_shard)
        assert isinstance(files, FeatureFiles) and isinstance(open_features(packed.path), PackedFeatures)
        assert list(packed.keys()) == list(files.keys()) == sorted(tokens) and len(packed) == len(tokens)
        assert packed.dim == files.dim == DIM
        assert len(packed.manifest["shards"]) == -(-len(tokens) // items_per_shard)
        for stem, line in tokens:
            exact, rounded = files.read(stem, line), packed.read(stem, line)
            assert rounded.dtype == torch.float32 and torch.equal(rounded, exact.bfloat16().float())
            assert torch.all((rounded - exact).abs() <= exact.abs() * 2**-8)
        assert compare(files, packed) == len(tokens)
        assert len(list(packed.verify())) == len(packed.manifest["shards"])
        again = unpack(packed, Path(folder, "again"))
        assert all(torch.equal(again.read(*key), packed.read(*key)) for key in tokens)
        assert np.load(Path(folder, "again", *map(str, min(tokens))).with_name(f"{min(tokens)[1]}.npy")).ndim == 3


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bits_are_those_of_bfloat16(values: list[float]) -> None:
    tensor = torch.tensor(values)
    assert torch.equal(from_bits(to_bits(tensor)), tensor.bfloat16().float())
    assert to_bits(torch.tensor([1.0, -2.0])).tolist() == [0x3F80, 0xC000]


def test_no_padding_on_disk(packed: PackedFeatures) -> None:
    tokens = sum(number % 5 + 1 for number in range(10))
    assert packed.manifest["tokens"] == tokens == 30 and packed.manifest["items"] == 10
    sizes = [path.stat().st_size - 128 for path in packed.path.glob("*.features.npy")]  # less the headers
    assert sum(sizes) == tokens * DIM * 2


def test_manifest(packed: PackedFeatures) -> None:
    manifest = json.loads((packed.path / MANIFEST).read_text())
    assert {name: manifest[name] for name in ("dtype", "dim", "encoder", "encoder_sha256", "lists", "complete")} == {
        "dtype": "bfloat16", "dim": DIM, "encoder": "t5", "encoder_sha256": "abc", "lists": ["a", "b"], "complete": True
    }  # fmt: skip
    assert [shard["items"] for shard in manifest["shards"]] == [4, 4, 2]


def test_has(files: FeatureFiles, packed: PackedFeatures) -> None:
    for store in (files, packed):
        assert store.has("a", 6) and store.has("b", 27) and store.has_list("b")
        assert not any(
            [store.has("a", 3), store.has("c", 0), store.has("a", -1), store.has("a", 2**40), store.has_list("c")]
        )


@pytest.mark.parametrize(("stem", "line"), [("a", 3), ("c", 0), ("b", 10**9)])
def test_missing_features(files: FeatureFiles, packed: PackedFeatures, stem: str, line: int) -> None:
    with pytest.raises(ValueError, match=rf"packed has no text features of line {line} of the list '{stem}'"):
        packed.read(stem, line)
    with pytest.raises(ValueError, match=rf"cannot read .*{line}\.npy"):
        files.read(stem, line)


def test_width_is_checked(files: FeatureFiles, packed: PackedFeatures) -> None:
    with pytest.raises(ValueError, match="holds text features of width 6, but 2048 is asked for"):
        open_features(packed.path, 2048)
    with pytest.raises(ValueError, match=r"must have the shape \(1, tokens, 2048\)"):
        open_features(files.path, 2048).read("a", 0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_features(files.path / "nowhere")


@pytest.mark.parametrize("kind", ["features", "offsets", "keys"])
def test_truncated_shard(packed: PackedFeatures, kind: str) -> None:
    file = packed.path / f"00001.{kind}.npy"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"00001\.{kind}\.npy must have \d+ bytes, found \d+; delete 00001\.json"):
        open_features(packed.path)
    file.unlink()
    with pytest.raises(ValueError, match="found none"):
        open_features(packed.path)


@pytest.mark.parametrize("kind", ["features", "offsets", "keys"])
def test_a_flipped_bit_is_found(packed: PackedFeatures, kind: str) -> None:
    file = packed.path / f"00002.{kind}.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"00002\.{kind}\.npy does not have the checksum"):
        list(open_features(packed.path).verify())


def test_offsets_never_lead_outside(packed: PackedFeatures) -> None:
    file = packed.path / "00000.offsets.npy"
    offsets = np.load(file)
    np.save(file, offsets + 10**6)
    with pytest.raises(ValueError, match=r"offsets\.npy points outside"):
        open_features(packed.path).read("a", 0)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "packed codes"}'])
def test_damaged_manifest(packed: PackedFeatures, text: str) -> None:
    (packed.path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"features\.json"):
        open_features(packed.path)


def test_damaged_entry(packed: PackedFeatures) -> None:
    manifest = {**packed.manifest, "shards": [{"name": "00000"}]}
    (packed.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"features\.json is damaged"):
        open_features(packed.path)


def test_packing_continues_where_it_stopped(files: FeatureFiles, packed: PackedFeatures, tmp_path: Path) -> None:
    """A file that cannot be read stops packing in the second of three shards."""
    save(files.path, "a", 24, np.zeros((1, 0, DIM), np.float32))
    with pytest.raises(ValueError, match=r"24\.npy"):
        pack(files, tmp_path / "half", 4, "t5", "abc")
    with pytest.raises(ValueError, match="packing has not finished"):
        open_features(tmp_path / "half")
    first = tmp_path / "half" / "00000.features.npy"
    written = first.stat().st_mtime_ns
    save(files.path, "a", 24, random_features(4, 8))
    pack(files, tmp_path / "half", 4, "t5", "abc")
    assert first.stat().st_mtime_ns == written
    for path in packed.path.iterdir():
        assert (tmp_path / "half" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list((tmp_path / "half").glob(".*"))


def test_packing_into_the_wrong_folder(files: FeatureFiles, packed: PackedFeatures) -> None:
    with pytest.raises(ValueError, match="another encoder"):
        pack(files, packed.path, 4, "other", "abc")
    save(files.path, "b", 99, random_features(1, 1))
    with pytest.raises(ValueError, match="packed from other files"):
        pack(files, packed.path, 4, "t5", "abc")
    with pytest.raises(ValueError, match="at least one caption"):
        pack(files, packed.path, 0)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "would be empty"),
        ([("a", 0, torch.zeros(1, DIM)), ("a", 0, torch.zeros(1, DIM))], "comes twice"),
        ([("b", 0, torch.zeros(1, DIM))], "in none of the lists"),
        ([("a", 0, torch.zeros(0, DIM))], r"shape \(tokens, 6\), found \(0, 6\)"),
        ([("a", 0, torch.zeros(1, DIM + 1))], r"found \(1, 7\)"),
        ([("a", 0, torch.full((1, DIM), torch.nan))], "cannot hold"),
        ([("a", 0, torch.full((1, DIM), 3.4e38))], "cannot hold"),  # rounds to infinity
    ],
)
def test_bad_items_are_not_written(tmp_path: Path, items: list, message: str) -> None:
    writer = FeatureWriter(tmp_path, ["a"], DIM)
    with pytest.raises(ValueError, match=message):
        writer.write(0, items)
    assert not writer.has(0)
    with pytest.raises(ValueError, match="no shards"):
        writer.finish()


def test_shards_in_any_order(tmp_path: Path) -> None:
    """Two processes that take turns: the shards' ranges of keys overlap."""
    for rank in (1, 0):
        writer = FeatureWriter(tmp_path, ["a"], DIM)
        writer.write(rank, [("a", line, torch.full((2, DIM), float(line))) for line in range(9 - rank, -1, -2)])
    packed = writer.finish()
    assert sorted(packed.keys()) == [("a", line) for line in range(10)]
    assert all(float(packed.read("a", line)[1, 0]) == line for line in range(10))


def test_a_pickled_reader_carries_no_data(packed: PackedFeatures) -> None:
    packed.read("a", 0)
    copy = pickle.loads(pickle.dumps(packed))
    assert len(pickle.dumps(packed)) < 5000
    assert torch.equal(copy.read("b", 27), packed.read("b", 27))


def test_both_layouts_give_the_same_items(small_set: Namespace, tmp_path: Path) -> None:  # noqa: F811
    from_files = build_dataset(small_set, transform=eval_transform(32))
    small_set.t5_feat_path = str(pack(FeatureFiles(tmp_path / "long"), tmp_path / "packed", 3).path)
    from_shards = build_dataset(small_set, transform=eval_transform(32))
    for one, other in zip(from_files, from_shards):
        assert all(torch.equal(a, b) for a, b in zip(one, other)) and int(one[3]) == 1
    small_set.caption_dim = 99
    with pytest.raises(ValueError, match="width 16, but 99"):
        build_dataset(small_set, transform=eval_transform(32))


def test_packed_features_of_other_lists_are_refused(small_set: Namespace, packed: PackedFeatures) -> None:  # noqa: F811
    (Path(small_set.data_path) / "a.jsonl").rename(Path(small_set.data_path) / "z.jsonl")
    small_set.t5_feat_path, small_set.caption_dim = str(packed.path), DIM
    with pytest.raises(FileNotFoundError, match="no text features of the list 'z'"):
        build_dataset(small_set, transform=eval_transform(32))


def test_verify_names_what_differs(files: FeatureFiles, packed: PackedFeatures) -> None:
    save(files.path, "a", 6, random_features(3, 77))
    with pytest.raises(ValueError, match="line 6 of the list 'a' differs"):
        compare(files, packed)
    (files.path / "a" / "6.npy").unlink()
    with pytest.raises(ValueError, match=r"line 6 of the list 'a' is in .*packed but not in .*files"):
        compare(files, packed)


@pytest.mark.slow
def test_command(files: FeatureFiles, tmp_path: Path) -> None:
    def convert(*flags: object, code: int = 0) -> str:
        line = [sys.executable, convert_features.__file__, *map(str, flags)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "10 captions in 2 shards" in convert("--source", "files", "--output", "p", "--items-per-shard", 5)
    verified = convert("--source", "p", "--output", "files", "--verify")
    assert "2 shards have their checksums, 10 captions agree" in verified
    assert "error: --output is missing" in convert("--source", "p", code=2)

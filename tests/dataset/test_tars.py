"""Tar shards: what is written is read, each sample once, and damaged or hostile tars do no harm."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dataset import tars
from dataset.augmentation import eval_transform
from dataset.codes import CodeFolder, write_codes
from dataset.tar_members import BadSample, decode_member, encode_member, member_kind, read_tar
from dataset.tars import MANIFEST, FolderSamples, TarSamples, list_tars, write_shards
from tests.dataset.test_images import grey


def picture(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(stream, kind)
    return stream.getvalue()


def sample(number: int) -> dict:
    return {"__key__": f"{number:04d}", "png": picture(number), "cls": number % 3, "txt": f"Bild {number} ü"}


def make(folder: Path, count: int = 40, per_shard: int = 4) -> Path:
    write_shards(folder, [sample(number) for number in range(count)], per_shard, ["a", "b", "c"])
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def with_bad(path: Path, bad: dict[str, bytes]) -> Path:
    """Two good samples around the members `bad`."""
    good = lambda key: {f"{key}.png": picture(9), f"{key}.cls": b"1"}  # noqa: E731
    return write_tar(path, {**good("a"), **bad, **good("z")})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make(tmp_path / "shards")


def items(source: Path | list[Path], members: tuple[str, ...] = ("key",), **kwargs: object) -> list[tuple]:
    return list(TarSamples(source, members, **kwargs))


def consumers_keys(shards: Path, epoch: int, **kwargs: object) -> list[list[str]]:
    """The keys that each of two ranks gets from two workers."""
    result = []
    for rank in range(2):
        dataset = TarSamples(shards, ("key",), rank=rank, world_size=2, **kwargs)
        dataset.set_epoch(epoch)
        result.append([key for (key,) in DataLoader(dataset, batch_size=None, num_workers=2)])
    return result


# ---- writing and reading


def test_round_trip(shards: Path) -> None:
    found = items(shards, ("key", "image", "cls", "txt"), transform=eval_transform(8))
    assert [(key, label, text) for key, _, label, text in found] == [
        (f"{n:04d}", n % 3, f"Bild {n} ü") for n in range(40)
    ]
    assert all(image.shape == (3, 8, 8) for _, image, _, _ in found)
    assert [grey(image) for (image,) in items(shards, ("image",))] == list(range(40))


def test_the_package_reads_what_is_written(shards: Path) -> None:
    source = webdataset.WebDataset([str(path) for path in list_tars(shards)], shardshuffle=False)
    assert [entry["txt"].decode() for entry in source] == [f"Bild {number} ü" for number in range(40)]


@given(st.text(), st.integers(-(2**60), 2**60))
def test_members_round_trip(text: str, number: int) -> None:
    if text.isprintable():  # a lone surrogate is no text
        assert decode_member("txt", encode_member("txt", text)) == text
    assert decode_member("cls", encode_member("cls", number)) == number
    assert decode_member("json", encode_member("json", {"x": number, "y": [text]}))["x"] == number


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<u4", "i4", "i8", "<f2", ">f4"])
def test_arrays(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = decode_member("codes.npy", encode_member("codes.npy", array))
    assert tensor.tolist() == array.tolist()
    assert tensor.dtype == (torch.int64 if dtype.strip("<>")[0] in "ui" else tensor.dtype)


def test_shards_are_the_same_bytes_and_resumable(shards: Path, tmp_path: Path) -> None:
    first, *rest = list_tars(shards)
    stamp, whole = first.stat().st_mtime_ns, rest[3].read_bytes()
    rest[3].unlink()
    make(shards)
    assert first.stat().st_mtime_ns == stamp and rest[3].read_bytes() == whole
    other = make(tmp_path / "other")
    assert all((other / path.name).read_bytes() == path.read_bytes() for path in shards.iterdir())


def test_wrong_folders(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds shards made with another samples_per_shard \(.*, now 5\)"):
        make(shards, per_shard=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match=r"shards\.json is missing"):
        make(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="no tars in"):
        list_tars(tmp_path / "full")
    (shards / "shard-000003.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no tar .*shard-000003\.tar"):
        list_tars(shards)
    (shards / MANIFEST).write_text('{"shards": [{}]}')
    with pytest.raises(ValueError, match=r"shards\.json is damaged"):
        list_tars(shards)


@pytest.mark.parametrize("key", ["", "a.b", "dir/", "x/a.b"])
def test_unfit_keys(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="the key"):
        write_shards(tmp_path / "s", [{"__key__": key, "cls": 1}])
    with pytest.raises(ValueError, match="comes twice"):
        write_shards(tmp_path / "t", [{"__key__": "a", "cls": 1}] * 2)
    assert not list((tmp_path / "s").glob("*.tar"))
    with pytest.raises(ValueError, match="is unknown"):
        write_shards(tmp_path / "u", [{"__key__": "a", "pkl": b""}])


def test_folders_with_captions_and_codes(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = [{"image_path": f"a/{n}.png", "text": [f"caption {n}"]} for n in range(2)]
    (class_folders / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    codes = CodeFolder.named(tmp_path / "codes", "imagenet", 16)
    for index in range(6):
        write_codes(codes, index, np.full((2, 4), 100 + index), index // 2)
    flags = ["--data-path", class_folders, "--output", tmp_path / "out", "--samples-per-shard", 4]
    flags += ["--code-path", tmp_path / "codes", "--image-size", 16]
    monkeypatch.setattr(sys, "argv", ["tars.py", *map(str, flags)])
    tars.main()
    assert "6 samples in 2 shards" in capsys.readouterr().out
    found = items(tmp_path / "out", ("image", "cls", "codes.npy", "json"))
    for index, (image, label, tokens, entry) in enumerate(found):
        assert (grey(image), label, tokens.tolist()) == (10 * index, index // 2, [[100 + index] * 4] * 2)
        assert entry["label"] == "abc"[index // 2]
    assert [text for (text,) in items(tmp_path / "out", ("txt",), max_bad_share=1)] == ["caption 0", "caption 1"]


def test_formats_that_shards_do_not_take_become_png(class_folders: Path) -> None:
    Image.open(class_folders / "a" / "1.png").save(class_folders / "a" / "1.bmp")
    member = FolderSamples(class_folders)[1]["png"]
    assert decode_member("png", member).getpixel((0, 0)) == (10, 10, 10) and member[1:4] == b"PNG"


# ---- order


@pytest.mark.parametrize("shuffle", [0, 7])
def test_two_ranks_with_two_workers_get_every_sample_once(shards: Path, shuffle: int) -> None:
    first, second = consumers_keys(shards, 0, shuffle=shuffle)
    assert Counter(first + second) == Counter(f"{n:04d}" for n in range(40))
    assert first and second


def test_the_epoch_decides_the_order(shards: Path) -> None:
    zero = consumers_keys(shards, 0, shuffle=7, seed=3)
    assert consumers_keys(shards, 0, shuffle=7, seed=3) == zero
    assert consumers_keys(shards, 1, shuffle=7, seed=3) != zero
    assert consumers_keys(shards, 0, shuffle=7, seed=4) != zero
    assert set(zero[0]) != set(consumers_keys(shards, 1, shuffle=7, seed=3)[0])  # ranks trade shards


def test_living_workers_hear_of_the_epoch(shards: Path) -> None:
    dataset = TarSamples(shards, ("key",), shuffle=50)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(list(loader))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_without_shuffling_the_order_is_that_of_the_shards(shards: Path) -> None:
    assert [key for (key,) in items(shards)] == [f"{n:04d}" for n in range(40)]


def test_a_transform_draws_the_same_for_a_sample_in_any_split(shards: Path) -> None:
    draw = lambda image: float(torch.rand(1))  # noqa: E731
    alone = dict(items(shards, ("key", "image"), transform=draw, shuffle=9, seed=1))
    parts = [items(shards, ("key", "image"), transform=draw, seed=1, rank=r, world_size=3) for r in range(3)]
    assert {key: value for part in parts for key, value in part} == alone
    assert len(set(alone.values())) == 40


def test_endless(shards: Path) -> None:
    stream = iter(TarSamples(shards, ("key",), shuffle=5, endless=True))
    keys = [next(stream)[0] for _ in range(100)]
    assert Counter(keys[:40]) == Counter(keys[40:80]) and keys[:40] != keys[40:80]


def test_more_ranks_than_shards(shards: Path) -> None:
    with pytest.raises(ValueError, match="10 shards are too few for 11 ranks"):
        TarSamples(shards, rank=0, world_size=11)


def test_more_workers_than_shards(tmp_path: Path) -> None:
    dataset = TarSamples(make(tmp_path / "one", 3), ("key",), endless=False)
    assert len(list(DataLoader(dataset, batch_size=None, num_workers=2))) == 3


# ---- damage


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.62])
def test_truncated_tar(shards: Path, keep: float) -> None:
    path = shards / "shard-000002.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    complaints: list[str] = []
    rest = list(read_tar(path, complaints.append))
    assert complaints and "shard-000002.tar" in complaints[0] and len(rest) <= 4
    dataset = TarSamples(shards, ("image", "cls", "txt"), max_bad_share=0.05)
    good = list(dataset)
    assert 36 <= len(good) < 41 and dataset.bad >= max(1, 40 - len(good))
    with pytest.raises(ValueError, match=r"bad samples among the first .*shard-000002|bad samples"):
        items(shards, ("image", "cls", "txt"), max_bad_share=0)


def test_a_tar_cut_between_two_members(shards: Path) -> None:
    """Python's tarfile takes this for a whole archive."""
    path = shards / "shard-000009.tar"
    with tarfile.open(path) as archive:
        third = archive.getmembers()[6]
    path.write_bytes(path.read_bytes()[: third.offset])
    dataset = TarSamples(shards, max_bad_share=0.02)
    assert len(list(dataset)) == 38 and dataset.bad == 2
    complaints: list[str] = []
    assert len(list(read_tar(path, complaints.append))) == 2
    assert "no end mark" in complaints[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"m.png": picture(1)},
        {"m.cls": b"1"},
        {"m.png": b"no image", "m.cls": b"1"},
        {"m.png": picture(1)[:40], "m.cls": b"1"},
        {"m.png": picture(1, "GIF"), "m.cls": b"1"},
        {"m.png": picture(1), "m.cls": b"one"},
        {"m.png": picture(1), "m.cls": b""},
        {"m.pkl": pickle.dumps(1)},
    ],
    ids=["no label", "no image", "no picture", "cut", "gif", "text", "empty", "pickle"],
)
def test_bad_samples_are_counted_and_left_out(tmp_path: Path, bad: dict[str, bytes]) -> None:
    path = with_bad(tmp_path / "x.tar", bad)
    dataset = TarSamples(path)
    assert [label for _, label in dataset] == [1, 1] and dataset.bad == 1
    with pytest.raises(ValueError, match=r"1 bad samples among the first 2, more than 0\.0%.*sample m"):
        items(path, ("image", "cls"), max_bad_share=0)


def test_bad_samples_are_counted_over_workers(tmp_path: Path) -> None:
    paths = [with_bad(tmp_path / f"{n}.tar", {"m.cls": b"1"}) for n in range(4)]
    dataset = TarSamples(paths, max_bad_share=0.04, transform=eval_transform(8))
    assert len(list(DataLoader(dataset, batch_size=None, num_workers=2))) == 8 and dataset.bad == 4


def test_a_member_that_comes_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for data in (b"1", b"2"):
            info = tarfile.TarInfo("a.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(data))
    dataset = TarSamples(tmp_path / "x.tar", ("cls",))
    assert list(dataset) == [(1,)] and dataset.bad == 1


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("kind", ["pickle", "object array", "archive"])
def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Evil(), stream)
    elif kind == "object array":
        np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
    else:
        np.savez(stream, np.array([Evil()], dtype=object))
    with pytest.raises(BadSample):
        decode_member("codes.npy", stream.getvalue())
    for name in ("pkl", "pickle", "pyd", "pth", "mp4"):
        assert member_kind(name) is None
        with pytest.raises(BadSample):
            decode_member(name, stream.getvalue())
    assert not (tmp_path / "unpickled").exists()


def test_an_array_that_claims_to_be_huge() -> None:
    data = bytearray(encode_member("npy", np.zeros((1, 1))))
    place = data.index(b"(1, 1)")
    data[place : place + 18] = b"(999999999, 99999)"
    with pytest.raises(BadSample):
        decode_member("npy", bytes(data))


def test_huge_images_and_links_are_refused(tmp_path: Path, huge_png: Path) -> None:
    dataset = TarSamples(with_bad(tmp_path / "x.tar", {"m.png": huge_png.read_bytes(), "m.cls": b"1"}))
    assert len(list(dataset)) == 2 and dataset.bad == 1
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(info)
    assert items(tmp_path / "y.tar", ("txt",)) == []


def test_a_member_of_an_absurd_size(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 2**40
        archive.fileobj.write(info.tobuf())
    complaints: list[str] = []
    assert list(read_tar(tmp_path / "x.tar", complaints.append)) == []
    assert "1099511627776 bytes" in complaints[0]


@given(st.binary(max_size=3000))
def test_garbage_is_never_more_than_a_complaint(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.tar"
    path.write_bytes(data)
    complaints: list[str] = []
    assert list(read_tar(path, complaints.append)) == [] and complaints


def test_names_with_folders_and_capitals(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    path = write_tar(tmp_path / "x.tar", {"v1.2/dir/a.JPG": picture(7, "JPEG"), "v1.2/dir/a.Txt": b"hi"})
    ((key, image, text),) = items(path, ("key", "image", "txt"))
    assert (key, grey(image), text) == ("v1.2/dir/a", 7, "hi")

"""Own data: every kind of source becomes the same layout, split and all."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import own
from dataset.images import ClassFolders, read_rgb
from dataset.lists import CaptionLists, ParquetColumn, list_files
from dataset.own import make_data_set
from dataset.sources import list_entries
from dataset.tars import FolderSamples, write_shards

Save = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path, save_image: Save) -> Path:
    """40 pictures in two classes, of greys 0 to 39."""
    for number in range(40):
        save_image(tmp_path / "source" / ("cat", "dog")[number % 2] / f"{number}.png", grey=number, size=(20, 30))
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def captions(out: Path) -> dict[str, list[str]]:
    """File name -> captions, read as the text-conditional commands read them."""
    found = {}
    for split in own.SPLITS:
        if (out / split / f"{split}.jsonl").stat().st_size:
            for record in CaptionLists(list_files(out / split)):
                read_rgb(record.image_file)
                found[record.image_path] = list(record.text)
    return found


def labels(out: Path) -> dict[int, str]:
    """Grey -> class name, read as the class-conditional commands read them."""
    result = {}
    for split in own.SPLITS:
        if any(path.is_dir() for path in (out / split).glob("*")):
            images = ClassFolders(out / split)
            result |= {image.getpixel((0, 0))[0]: images.classes[label] for image, label in images}
    return result


def side(out: Path) -> dict[str, str]:
    return {file.name: split for split in own.SPLITS for file in (out / split).rglob("*.png")}


def write_csv(path: Path, rows: list[dict], **kwargs: str) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **kwargs)
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- folders


def test_class_folders(source: Path, out: Path) -> None:
    summary = make_data_set(source, out, val_share=0.3)
    assert labels(out) == {number: ("cat", "dog")[number % 2] for number in range(40)}
    assert sum(summary["images"].values()) == 40 and 4 <= summary["images"]["val"] <= 20
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
    assert captions(out)["cat/0.png"] == ["cat"] and len(captions(out)) == 40
    assert (out / side(out)["0.png"] / "cat" / "0.png").samefile(source / "cat" / "0.png")  # a hard link
    assert not list(out.rglob(".*"))


def test_no_classes_and_caption_files(tmp_path: Path, save_image: Save, out: Path) -> None:
    for number in range(6):
        save_image(tmp_path / "flat" / f"{number}.png", grey=number)
    (tmp_path / "flat" / "3.txt").write_text("  a Ünique thing\n")
    make_data_set(tmp_path / "flat", out, val_share=0)
    assert set(labels(out).values()) == {"unlabelled"}
    assert captions(out)["unlabelled/3.png"] == ["a Ünique thing"] and captions(out)["unlabelled/2.png"] == []


def test_nested_folders_hidden_files_and_loops(tmp_path: Path, save_image: Save, out: Path) -> None:
    root = tmp_path / "deep"
    for number, name in enumerate(["cat/a/x.png", "cat/b/x.png", "root.png", ".hidden/x.png", "cat/.x.png"]):
        save_image(root / name, grey=number)
    (root / "cat" / "loop").symlink_to(root)
    make_data_set(root, out, val_share=0)
    assert sorted(captions(out)) == ["cat/a/x.png", "cat/b/x.png", "unlabelled/root.png"]


def test_linked_images_are_followed(tmp_path: Path, save_image: Save, out: Path) -> None:
    (tmp_path / "links" / "cat").mkdir(parents=True)
    (tmp_path / "links" / "cat" / "a.png").symlink_to(save_image(tmp_path / "real.png", grey=5))
    make_data_set(tmp_path / "links", out, val_share=0)
    assert labels(out) == {5: "cat"} and not (out / "train" / "cat" / "a.png").is_symlink()


def test_without_hard_links_images_are_copied(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    make_data_set(source, out)
    copy = out / side(out)["7.png"] / "dog" / "7.png"
    assert copy.read_bytes() == (source / "dog" / "7.png").read_bytes() and copy.stat().st_nlink == 1


def test_size_crops_and_writes_png(tmp_path: Path, save_image: Save, out: Path) -> None:
    for name in ("a.jpg", "a.png", "b.webp"):
        save_image(tmp_path / "mixed" / "x" / name, size=(50, 30), grey=90)
    make_data_set(tmp_path / "mixed", out, size=16, val_share=0)
    assert sorted(captions(out)) == ["x/a.jpg.png", "x/a.png", "x/b.webp.png"]
    for name in captions(out):
        with Image.open(out / "train" / name) as image:
            assert image.size == (16, 16) and image.format == "PNG" and abs(image.getpixel((8, 8))[0] - 90) < 3


# ---- the split


def test_new_images_do_not_move_the_others(source: Path, out: Path, tmp_path: Path, save_image: Save) -> None:
    make_data_set(source, out, val_share=0.3)
    before = side(out)
    for number in range(40, 60):
        save_image(source / "bird" / f"{number}.png", grey=number)
    summary = make_data_set(source, out, val_share=0.3)
    assert {name: split for name, split in side(out).items() if name in before} == before
    assert sum(summary["images"].values()) == 60 and summary["classes"] == 3
    make_data_set(source, tmp_path / "afresh", val_share=0.3)
    assert side(tmp_path / "afresh") == side(out)


def test_the_seed_decides(source: Path, out: Path, tmp_path: Path) -> None:
    make_data_set(source, out, val_share=0.3)
    make_data_set(source, tmp_path / "other", val_share=0.3, seed=1)
    assert side(out) != side(tmp_path / "other")


def test_copies_stay_together(tmp_path: Path, save_image: Save, out: Path) -> None:
    for number in range(15):
        for copy in "abc":
            save_image(tmp_path / "copies" / copy / f"{number}{copy}.png", grey=number)
    assert make_data_set(tmp_path / "copies", out, val_share=0.5)["copies"] == 30
    sides = side(out)
    assert len(set(sides.values())) == 2
    for number in range(15):
        assert len({sides[f"{number}{copy}.png"] for copy in "abc"}) == 1


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_shares(source: Path, out: Path, share: float) -> None:
    images = make_data_set(source, out, val_share=share)["images"]
    assert images["val"] == 0 if share == 0 else images["val"] > 28


# ---- tables


@pytest.mark.parametrize("kind", ["csv", "semicolons", "tsv", "jsonl", "parquet"])
def test_tables(source: Path, out: Path, kind: str) -> None:
    rows = [
        {"image": f"{('cat', 'dog')[n % 2]}/{n}.png", "text": f'a "{n}", größer', "label": n % 3} for n in range(40)
    ]
    table = source / f"t.{'csv' if kind == 'semicolons' else kind}"
    if kind == "jsonl":
        table.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        write_parquet(table, rows)
    else:
        write_csv(table, rows, delimiter={"csv": ",", "semicolons": ";", "tsv": "\t"}[kind])
    make_data_set(table, out)
    assert labels(out) == {number: str(number % 3) for number in range(40)}
    assert captions(out)["1/cat/4.png"] == ['a "4", größer']


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_a_parquet_of_images(tmp_path: Path, out: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = []
    for number in range(12):
        stream = io.BytesIO()
        Image.fromarray(np.full((9, 9, 3), number, np.uint8)).save(stream, "PNG")
        image = stream.getvalue() if number % 2 else {"bytes": stream.getvalue(), "path": None}
        rows.append({"image": image, "caption": f"number {number}"})
    write_parquet(tmp_path / "odd.parquet", rows[1::2])
    write_parquet(tmp_path / "even.parquet", rows[::2])
    for name, start in (("odd", 1), ("even", 0)):
        make_data_set(tmp_path / f"{name}.parquet", out / name, val_share=0)
        assert captions(out / name)["unlabelled/000000002.png"] == [f"number {4 + start}"]
        assert sorted(labels(out / name)) == list(range(start, 12, 2))


def test_a_parquet_column_by_row(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"x": range(100, 117)}), tmp_path / "t.parquet", row_group_size=5)
    column = ParquetColumn(tmp_path / "t.parquet", "x")
    assert [column[row] for row in (0, 4, 5, 16, 9, 10)] == [100, 104, 105, 116, 109, 110]


def test_several_captions_of_one_image_and_outside_paths(source: Path, tmp_path: Path, out: Path) -> None:
    cat, dog = source / "cat" / "2.png", "../source/dog/3.png"
    (tmp_path / "tables").mkdir()
    rows = [{"path": path, "caption": text} for path, text in [(cat, "one"), (dog, "other"), (cat, "two"), (cat, "")]]
    make_data_set(write_csv(tmp_path / "tables" / "t.csv", rows), out, val_share=0)
    found = captions(out)
    assert sorted(map(tuple, found.values())) == [("one", "two"), ("other",)]
    assert all(name.startswith("unlabelled/") and ".." not in name for name in found)


def test_numbers_as_labels_keep_their_order(source: Path, out: Path) -> None:
    rows = [{"path": f"cat/{n}.png", "label": str(n)} for n in (2, 10, 0, 8, 4, 6, 12)]
    make_data_set(write_csv(source / "t.csv", rows), out, val_share=0)
    assert json.loads((out / "classes.json").read_text()) == ["0", "2", "4", "6", "8", "10", "12"]


@pytest.mark.parametrize("given", [True, False])
def test_a_table_of_captions_for_a_folder(source: Path, out: Path, given: bool) -> None:
    rows = [{"file_name": "cat/0.png", "words": "mine", "kind": "lion"}, {"file_name": "x", "words": "", "kind": ""}]
    table = write_csv(source / ("some.csv" if given else "metadata.csv"), rows)
    columns = {"caption": "words", "label": "kind"}
    make_data_set(source, out, captions=table if given else None, columns=columns)
    assert captions(out)["lion/cat/0.png"] == ["mine"] and captions(out)["dog/1.png"] == ["dog"]


def test_its_own_result_is_a_source(source: Path, out: Path, tmp_path: Path) -> None:
    make_data_set(source, out, val_share=0)
    make_data_set(out / "train" / "train.jsonl", tmp_path / "again", val_share=0)
    assert captions(tmp_path / "again") == captions(out) and labels(tmp_path / "again") == labels(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has the columns a, b; say with --path-column"),
        ("path,label\nx.png\n", "does not have as many fields"),
        ("path,label\nx.png,1,2\n", "does not have as many fields"),
        ("path,label\n", "there are no images"),
        ("path\n\xff", "cannot be read as a csv table in UTF-8"),
    ],
)
def test_bad_tables(tmp_path: Path, out: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        make_data_set(tmp_path / "t.csv", out)


def test_bad_columns_and_names(source: Path, out: Path) -> None:
    table = write_csv(source / "t.csv", [{"path": "cat/0.png", "label": "a/b"}, {"path": "cat/2.png", "label": "a_b"}])
    with pytest.raises(ValueError, match="no column 'nope'; its columns are path, label"):
        make_data_set(table, out, columns={"label": "nope"})
    with pytest.raises(ValueError, match="'a/b' and 'a_b' would share the folder a_b"):
        make_data_set(table, out)
    with pytest.raises(ValueError, match=r"no row of .* names an image of the folder"):
        make_data_set(source, out, captions=write_csv(source / "u.csv", [{"path": "no.png", "text": "x"}]))
    for text, message in (("[1]", "line 1: expected a JSON object"), ("{", "cannot be read as a jsonl table")):
        (source / "t.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            make_data_set(source / "t.jsonl", out)


def test_labels_cannot_leave_the_folder(source: Path, out: Path) -> None:
    rows = [{"path": "cat/0.png", "label": "../../evil"}, {"path": "cat/2.png", "label": ".."}]
    make_data_set(write_csv(source / "t.csv", rows), out, val_share=0)
    assert json.loads((out / "classes.json").read_text()) == ["_.", "_._.._evil"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "source"]


def test_parquet_without_pyarrow(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").touch()
    with pytest.raises(ValueError, match="pip install pyarrow"):
        make_data_set(tmp_path / "t.parquet", out)


# ---- tars


def test_tar_shards(source: Path, out: Path, tmp_path: Path) -> None:
    (source / "list.jsonl").write_text(json.dumps({"image_path": "cat/0.png", "text": ["one", "two"]}))
    samples = FolderSamples(source)
    write_shards(tmp_path / "tars", samples, 7, samples.classes)
    make_data_set(tmp_path / "tars", out, val_share=0)
    assert labels(out) == {number: ("cat", "dog")[number % 2] for number in range(40)}
    assert captions(out)["cat/shard-000000/000000000.png"] == ["one", "two"]


def test_a_damaged_tar_is_counted(source: Path, out: Path, tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "tars", FolderSamples(source), 10)[1]
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(ValueError, match="cannot be read"):
        make_data_set(tmp_path / "tars", out)
    summary = make_data_set(tmp_path / "tars", out, max_bad_share=0.2)
    assert 30 < sum(summary["images"].values()) < 40 and "shard-000001" in summary["left_out"][0][0]


# ---- bad images, stopping, refusals


def test_broken_images(source: Path, out: Path, huge_png: Path) -> None:
    (source / "cat" / "bad1.png").write_bytes(b"nothing")
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "cat" / "bad2.png")
    os.truncate(source / "cat" / "bad2.png", 900)
    (source / "dog" / "huge.png").write_bytes(huge_png.read_bytes())
    with pytest.raises(ValueError, match=r"of 43 items cannot be read, more than 1\.0%"):
        make_data_set(source, out)
    summary = make_data_set(source, out, max_bad_share=0.1)
    assert [name for name, _ in summary["left_out"]] == ["cat/bad1.png", "cat/bad2.png", "dog/huge.png"]
    assert len(side(out)) == 40 and json.loads((out / own.MANIFEST).read_text())["left_out"] == summary["left_out"]


def test_rows_without_a_file_are_bad_images(source: Path, out: Path) -> None:
    rows = [{"path": path, "label": "x"} for path in ("cat/0.png", "cat/none.png", "")]
    table = write_csv(source / "t.csv", rows)
    assert len(make_data_set(table, out, max_bad_share=0.7)["left_out"]) == 2


def test_a_format_that_no_command_reads(tmp_path: Path, save_image: Save, out: Path) -> None:
    save_image(tmp_path / "x.gif"), save_image(tmp_path / "y.png")
    table = write_csv(tmp_path / "t.csv", [{"path": "x.gif"}, {"path": "y.png"}])
    assert "format GIF" in make_data_set(table, out, max_bad_share=0.5, val_share=0)["left_out"][0][1]
    assert make_data_set(table, tmp_path / "sized", size=8)["left_out"] == []


def test_a_second_run_does_no_work_twice(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data_set(source, out, size=8)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lost = next(out.rglob("*.png"))
    lost.unlink()
    written = []
    plain = own.write_atomic
    monkeypatch.setattr(own, "write_atomic", lambda path, write: (written.append(path), plain(path, write)))
    make_data_set(source, out, size=8)
    assert [path for path in written if path.suffix == ".png"] == [lost]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_images_that_left_the_source_are_named(source: Path, out: Path) -> None:
    make_data_set(source, out, val_share=0)
    (source / "cat" / "0.png").unlink()
    assert make_data_set(source, out, val_share=0)["not_in_source"] == ["train/cat/0.png"]


def test_refusals(source: Path, out: Path, tmp_path: Path) -> None:
    make_data_set(source, out)
    with pytest.raises(ValueError, match=r"made with another val_share \(0\.05, now 0\.1\) and seed \(0, now 1\)"):
        make_data_set(source, out, val_share=0.1, seed=1)
    with pytest.raises(ValueError, match=r"own\.json is missing"):
        make_data_set(source / "cat", tmp_path)
    with pytest.raises(ValueError, match="lies in the source"):
        make_data_set(source, source / "out")
    for wrong in ({"val_share": 1.0}, {"val_share": -0.1}, {"size": 0}):
        with pytest.raises(ValueError, match="held-out share"):
            make_data_set(source, tmp_path / "new", **wrong)
    with pytest.raises(FileNotFoundError, match="there is no"):
        list_entries(tmp_path / "nowhere", None, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no images in"):
        make_data_set(tmp_path / "empty", tmp_path / "new")


@pytest.mark.slow
def test_command(source: Path, tmp_path: Path) -> None:
    (source / "cat" / "bad.png").touch()
    line = [sys.executable, own.__file__, "--source", "source", "--data-path", "made", "--size", "8"]
    done = subprocess.run([*line, "--max-bad-share", "0.1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "images in 2 classes" in done.stdout and "left out cat/bad.png" in done.stdout
    refused = subprocess.run([*line, "--seed", "3"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "error: made holds images made with another seed (0, now 3)" in refused.stderr

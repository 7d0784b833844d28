"""The list of OpenImages: every readable image once, whatever the number of workers, and none that is broken."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from dataset.openimage import build_openimage
from tools import openimage_json
from tools.openimage_json import parser, write_list


@pytest.fixture
def data(tmp_path):
    """Seven images in two of the folders, among files that are none."""
    for number in range(7):
        folder = tmp_path / f"openimages_{1 + number % 2:04d}"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{['jpg', 'PNG', 'WebP'][number % 3]}")
    (tmp_path / "openimages_0001/notes.txt").write_text("no image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/8.png").write_bytes((tmp_path / "openimages_0002/1.PNG").read_bytes())
    return tmp_path


EXPECTED = [f"openimages_000{f}/{n}" for f, names in ((1, "0.jpg 2.WebP 4.PNG 6.jpg"), (2, "1.PNG 3.jpg 5.WebP"))
            for n in names.split()]  # fmt: skip


def listed(data, *flags: str) -> list[str]:
    write_list(parser().parse_args(["--data-path", str(data), *flags]))
    return json.loads((data / "image_paths.json").read_text())


def test_every_image_whatever_the_number_of_workers(data):
    assert listed(data, "--num-workers", "3") == EXPECTED
    assert (data / "image_paths.json").read_text().startswith('[\n    "openimages_0001/0.jpg"')
    images = build_openimage(Namespace(data_path=data), transform=np.asarray)
    assert len(images) == 7 and images[6][0].shape == (40, 40, 3)


def test_truncated_images_are_left_out_and_named(data, capsys):
    path = data / "openimages_0002/1.PNG"
    path.write_bytes(path.read_bytes()[:300])
    (data / "openimages_0001/9.gif").write_bytes(b"nothing")
    assert listed(data, "--header-only", "--num-workers", "1") == EXPECTED  # a whole header is all it asks for
    assert listed(data, "--num-workers", "1") == [name for name in EXPECTED if name != "openimages_0002/1.PNG"]
    output = capsys.readouterr()
    assert "1.PNG" in output.err and "6 images are listed" in output.out and "2 cannot be read" in output.out


def test_a_finished_folder_is_not_read_again(data, monkeypatch):
    listed(data, "--num-workers", "1")
    asked = []

    class Pool:
        __enter__ = __exit__ = lambda self, *_: self

        def imap(self, check, paths, chunksize):
            asked.extend(paths)
            return map(check, paths)

    monkeypatch.setattr(openimage_json, "_pool", lambda processes: Pool())
    assert listed(data) == EXPECTED and not asked
    (data / "openimages_0002/9.png").write_bytes((data / "openimages_0002/1.PNG").read_bytes())
    assert listed(data) == [*EXPECTED, "openimages_0002/9.png"]
    assert len(asked) == 4 and all("openimages_0002" in path for path in asked)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folders openimages_\*"):
        listed(tmp_path)
    (tmp_path / "openimages_0001").mkdir()
    with pytest.raises(ValueError, match="none of the images"):
        listed(tmp_path, "--num-workers", "1")

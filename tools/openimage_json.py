"""List the readable images of OpenImages: {data_path}/image_paths.json, which --dataset openimage reads.

    python3 tools/openimage_json.py --data-path data/openimages

Looks into every folder openimages_*, as the established tool does into openimages_0001 to openimages_0047. Each image
is decoded, so that truncated files are left out too. A finished folder is noted beside the list: started again after an
interruption, the tool goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image

from dataset.images import UnreadableImage, read_rgb
from utils.args import make_parser
from utils.errors import run
from utils.files import read_json, write_atomic, write_json
from utils.progress import progress

LIST, NOTES = "image_paths.json", ".openimage_json"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")


def fault_of(path: str, header_only: bool = False) -> str | None:
    """Why an image cannot be used; None when it can."""
    try:
        if header_only:
            Image.open(path).close()
        else:
            read_rgb(path)
    except (UnreadableImage, OSError, ValueError) as error:
        return str(error)
    return None


def list_images(data_path: Path, processes: int, header_only: bool = False) -> tuple[list[str], list[str]]:
    """The images below `data_path` that can be used, sorted and relative to it, and the faults of the others.

    Raises:
        FileNotFoundError: when there are no folders openimages_*.
    """
    folders = sorted(entry for entry in data_path.glob("openimages_*") if entry.is_dir())
    if not folders:
        raise FileNotFoundError(f"there are no folders openimages_* in {data_path}; expected openimages_0001 and so on")
    names = {folder: _image_names(folder) for folder in folders}
    good, faults = [], []
    # the pool first: it forks, and a bar has a thread
    with _pool(processes) as pool, progress(sum(map(len, names.values())), "image") as bar:
        for folder in folders:
            note = data_path / NOTES / f"{folder.name}{'-header' if header_only else ''}.json"
            known = read_json(note) if note.is_file() else {}
            if known.get("files") != names[folder]:
                check = partial(fault_of, header_only=header_only)
                paths = [str(folder / name) for name in names[folder]]
                found = []
                for fault in pool.imap(check, paths, chunksize=64):
                    found.append(fault)
                    bar.update()
                known = {"files": names[folder], "faults": [fault for fault in found if fault]}
                known["good"] = [f"{folder.name}/{n}" for n, fault in zip(names[folder], found) if not fault]
                write_json(note, known)
            else:
                bar.update(len(names[folder]))
            good += known["good"]
            faults += known["faults"]
    return good, faults


def _image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and e.is_file())


def _pool(processes: int) -> multiprocessing.pool.Pool:
    return multiprocessing.get_context("fork").Pool(processes)


def write_list(args: argparse.Namespace) -> Sequence[str]:
    """Write the list and say what is in it."""
    good, faults = list_images(args.data_path, args.num_workers or max(os.cpu_count() or 1, 1), args.header_only)
    if not good:
        raise ValueError(f"none of the images in {args.data_path}/openimages_* can be read")
    for fault in faults[:20]:
        print(f"left out: {fault}", file=sys.stderr)
    text = json.dumps(good, indent=4) + "\n"
    write_atomic(args.data_path / LIST, lambda file: file.write(text.encode()))
    print(f"{len(good):,} images are listed in {args.data_path / LIST}; {len(faults):,} cannot be read")
    return good


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--data-path", type=Path, required=True, help="the folder with openimages_0001 and so on")
    flags.add_argument("--num-workers", type=int, help="processes that decode; the default is one per CPU core")
    flags.add_argument(
        "--header-only", action="store_true", help="look at the headers alone, as the established tool: much faster"
    )
    return flags


if __name__ == "__main__":
    run(lambda: write_list(parser().parse_args()))

"""Put what a quick start made onto one page: report.html, with every picture inside the file.

python3 tools/quickstart_report.py --folder quickstart --vq-ckpt VQ.pt --gpt-ckpt GPT.pt --rows cat-face heart
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import platform
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw

from dataset.augmentation import eval_transform
from dataset.imagenet import build_imagenet_code
from dataset.images import ClassFolders
from dataset.lists import CaptionLists, list_files
from dataset.packed import CaptionCodes
from tokenizer.build import load_tokenizer
from tokenizer.tokenizer_image.evaluation import reconstruct
from utils.args import make_parser
from utils.errors import run
from utils.files import read_json, write_atomic
from utils.image import make_grid_image, save_png
from utils.logger import read_metrics

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>LlamaGen quick start</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
 img {{ image-rendering: pixelated; max-width: 100%; display: block }} img.plot {{ image-rendering: auto }}
 table {{ border-collapse: collapse }}
 td {{ padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #ddd }}
 td.number {{ text-align: right; font-variant-numeric: tabular-nums }} figure {{ margin: 1rem 0 }}
 .rows {{ display: grid; grid-template-columns: max-content 1fr; align-items: center; gap: .3rem 1rem }}
 footer {{ color: #666; font-size: .85em; margin-top: 2rem }}
</style>
<h1>From drawings to new drawings</h1>
<p>{summary}</p>
<h2>What came out</h2>
{figures}
<h2>New pictures, row by row</h2>
<p>{explanation}</p>
<div class="rows">{samples}</div>
<h2>Reconstructions of held-out drawings</h2>
<p>Upper rows: drawings that no model has seen. Lower rows: the same after the tokenizer, 64 codes each.</p>
{reconstructions}
<h2>Training</h2>
{curves}
<h2>Where the time went</h2>
{times}
<footer>{machine}<br>Drawings: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0.</footer>
</html>
"""


def picture(image: Image.Image, scale: int = 1, kind: str = "") -> str:
    """An <img> that carries its PNG inside."""
    data = io.BytesIO()
    image.save(data, "PNG")
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img class="{kind}" width="{image.width * scale}" src="data:image/png;base64,{source}" alt="">'


def table(rows: list[tuple[str, str]]) -> str:
    """A table of names and numbers."""
    cells = [(html.escape(name), html.escape(value)) for name, value in rows]
    body = "".join(f'<tr><td>{name}<td class="number">{value}' for name, value in cells)
    return f"<table>{body}</table>"


_CLASSES = """Each row is one class; nothing is selected. The model has seen a few dozen drawings of most classes, so
expect a likeness of faces, hearts, flags and cats, and coloured shapes where a class is varied or small."""
_TEXTS = """Each row is one text; nothing is selected. <b>seen</b>: a drawing of this name was trained on.
<b>held out</b>: there is a drawing of this name, but no model has seen it. <b>new</b>: no drawing has this name. Expect
a likeness of what was seen, and of unseen texts their kind (a face, a flag, a heart) more than what sets them apart."""


def codes_of(folder: Path, text: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes of all training views (n, T), and of the held-out drawings (m, T)."""
    sets = []
    for split in ("train", "val"):
        path = folder / "codes" / split
        if text:
            codes = CaptionCodes(path)
            sets.append([codes.read(*key, view=view)[0] for key in codes.keys for view in range(codes.views)])
        else:
            codes = build_imagenet_code(argparse.Namespace(code_path=path, image_size=32))
            views = 1 if split == "val" else codes.num_views
            sets.append([codes.view(i, view)[0] for i in range(len(codes)) for view in range(views)])
    return np.stack(sets[0]), np.stack(sets[1])


def unigram_bits(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Bits per token of the best model without context: each position's code frequencies, counted on `train` (n, T).

    One is added to every count, so that unseen codes stay possible.
    """
    counts = np.stack([np.bincount(column, minlength=vocab_size) for column in train.T]) + 1.0
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return float(np.take_along_axis(bits, held_out.T, axis=1).mean())


def figures(folder: Path, vq: dict[str, float], gpt: dict[str, float], codebook_size: int, text: bool) -> str:
    """The numbers that say how good the two models are."""
    unigram = unigram_bits(*codes_of(folder, text), codebook_size)
    return table([
        ("reconstruction of held-out drawings, PSNR", f"{vq['val/psnr']:.2f} dB"),
        ("codes that occur in them", f"{vq['val/codebook_usage'] * codebook_size:.0f} of {codebook_size}"),
        ("perplexity of these codes", f"{vq['val/perplexity']:.0f}"),
        ("GPT on held-out drawings, bits per token", f"{gpt['val/bits_per_token']:.3f}"),
        ("for comparison: frequencies of each position, no context", f"{unigram:.3f}"),
        ("for comparison: knowing nothing", f"{math.log2(codebook_size):.3f}"),
        *(retrieval(folder) if text else []),
    ])  # fmt: skip


def retrieval(folder: Path) -> list[tuple[str, str]]:
    """How often a picture of a trained name is nearest to the drawing of that name."""
    found = read_json(folder / "retrieval.json")
    return [
        (
            f"pictures of names with the right drawing among the {k} nearest of {found['gallery']:,}",
            f"{found['hits'][k]:.1%} (chance {found['chance'][k]:.2%})",
        )
        for k in found["hits"]
    ]


def origin_of(folder: Path) -> dict[str, str]:
    """Which names there are drawings of: name -> "seen" or "held out"."""
    known: dict[str, str] = {}
    for split, word in (("val", "held out"), ("train", "seen")):
        known |= {record.caption(): word for record in CaptionLists(list_files(folder / "data" / split))}
    return known


def curves(folder: Path) -> str:
    """Loss curves of both trainings, with the held-out measure on the right axis."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    parts = [("tokenizer", "val/psnr", "held-out PSNR (dB)"), ("gpt", "val/bits_per_token", "held-out bits per token")]
    for axis, (name, key, label) in zip(axes, parts):
        entries = read_metrics(folder / name / "metrics.jsonl")
        train = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        tested = [(e["step"], e[key]) for e in entries if key in e]
        axis.plot(*zip(*train), color="#888", label="training loss")
        axis.set(title=name, xlabel="step", ylabel="training loss")
        twin = axis.twinx()
        twin.plot(*zip(*tested), color="#d33", marker="o", markersize=3)
        twin.set_ylabel(label, color="#d33")
    canvas = io.BytesIO()
    figure.savefig(canvas, dpi=110)
    plt.close(figure)
    return picture(Image.open(canvas), kind="plot")


def sample_strips(folder: Path, names: list[str]) -> list[Image.Image]:
    """The sample grid cut into one strip for each of its rows, enlarged twice."""
    grid = Image.open(folder / "samples.png").convert("RGB")
    height = (grid.height - 2) // len(names)
    strips = [grid.crop((0, 2 + i * height, grid.width, 2 + (i + 1) * height)) for i in range(len(names))]
    return [strip.resize((2 * strip.width, 2 * strip.height), Image.Resampling.NEAREST) for strip in strips]


def overview(names: list[str], strips: list[Image.Image], columns: int = 2) -> Image.Image:
    """All strips with their names on one picture, in `columns`."""
    width, height, label = strips[0].width, strips[0].height, 8 * max(map(len, names)) + 16
    rows = -(-len(strips) // columns)
    page = Image.new("RGB", (columns * (label + width), rows * height), "white")
    draw = ImageDraw.Draw(page)
    for i, (name, strip) in enumerate(zip(names, strips)):
        left, top = (i // rows) * (label + width), (i % rows) * height
        draw.text((left + label - 8, top + height // 2), name, "#333", anchor="rm", font_size=14)
        page.paste(strip, (left + label, top))
    return page


def reconstruction_pairs(
    folder: Path, settings: dict[str, Any], vq_ckpt: str, count: int = 48, columns: int = 16
) -> str:
    """Held-out originals in one row, their reconstructions in the next."""
    images = ClassFolders(folder / "data" / "val", eval_transform(32))
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    originals = torch.stack([images[i][0] for i in chosen])
    args = argparse.Namespace(**{**settings, "vq_ckpt": vq_ckpt})
    outputs, _ = reconstruct(load_tokenizer(args, torch.device("cpu")), originals)
    rows = [part for pair in zip(originals.split(columns), outputs.split(columns)) for part in pair]
    return picture(make_grid_image(torch.cat([row for row in rows if len(row) == columns]), columns), 2)


def stage_times(folder: Path) -> list[tuple[str, int]]:
    """Seconds of each stage, restarts added up."""
    seconds: dict[str, int] = {}
    for line in (folder / "seconds.tsv").read_text().splitlines():
        name, value = line.split("\t")
        seconds[name] = seconds.get(name, 0) + int(value)
    return list(seconds.items())


def last_values(path: Path) -> dict[str, float]:
    """The last value of every number in a metrics file."""
    return {name: value for entry in read_metrics(path) for name, value in entry.items()}


def write_report(folder: Path, vq_ckpt: str, rows: list[str], text: bool = False) -> Path:
    """Write `folder`/report.html and overview.png; returns the page's path. `text`: rows are texts, not classes."""
    plan, times = read_json(folder / "plan.json"), stage_times(folder)
    settings = read_json(folder / "tokenizer" / "args.json")["args"]
    vq, gpt = last_values(folder / "tokenizer" / "metrics.jsonl"), last_values(folder / "gpt" / "metrics.jsonl")
    shown = [(name, f"{seconds // 60}:{seconds % 60:02d}") for name, seconds in times]
    total = sum(seconds for _, seconds in times)
    strips = sample_strips(folder, rows)
    if text:
        known = origin_of(folder)
        rows = [f"{prompt} ({known.get(prompt, 'new')})" for prompt in rows]
    save_png(overview(rows, strips), folder / "overview.png")
    page = _PAGE.format(
        summary=(
            f"A VQ tokenizer ({plan['vq_steps']:,} steps) turned 32-pixel drawings into 8 x 8 codes; a "
            f"{plan['gpt_model']} ({plan['gpt_steps']:,} steps) learned to write such codes for a "
            f"{'text' if text else 'class'}; the tokenizer drew them. All of it took {total / 60:.1f} minutes on this "
            f"machine."
        ),
        figures=figures(folder, vq, gpt, settings["codebook_size"], text),
        explanation=_TEXTS if text else _CLASSES,
        samples="".join(f"<div>{html.escape(n)}</div><div>{picture(s)}</div>" for n, s in zip(rows, strips)),
        reconstructions=reconstruction_pairs(folder, settings, vq_ckpt),
        curves=curves(folder),
        times=table([*shown, ("together", f"{total // 60}:{total % 60:02d}")]),
        machine=html.escape(
            f"{plan['device']}, {plan['cores']} cores, {platform.machine()}, Python {platform.python_version()}, "
            f"torch {plan['torch']}"
        ),
    )
    write_atomic(folder / "report.html", lambda file: file.write(page.encode()))
    return folder / "report.html"


def main() -> None:
    """Write the report of --folder."""
    flags = make_parser(__doc__)
    flags.add_argument("--folder", type=Path, required=True, help="what quickstart.sh wrote")
    flags.add_argument("--vq-ckpt", required=True, help="the tokenizer's checkpoint")
    flags.add_argument("--rows", nargs="+", required=True, help="class or text of each row of samples.png")
    flags.add_argument("--text", action="store_true", help="the rows are texts")
    args = flags.parse_args()
    print(f"The report is {write_report(args.folder, args.vq_ckpt, args.rows, args.text)}: open it in a browser")


if __name__ == "__main__":
    run(main)

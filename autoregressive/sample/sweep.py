"""Which sampling settings give the best pictures: a set for each row of a table, a metric for each set."""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from autoregressive.sample.image_set import folder_name, sample_image_set
from evaluations.distance import distances
from evaluations.features import FeatureNetwork, PictureStatistics, feature_statistics, rank_share
from evaluations.picture_sets import PictureSet, open_pictures
from evaluations.render import beside
from utils.distributed import barrier, broadcast_object, is_main
from utils.files import atomic_path, read_json
from utils.results_table import append_row, read_table

Row = dict[str, str]  # flag, without the dashes, to value


def rows_of_grid(words: Sequence[str]) -> list[Row]:
    """All combinations of ``flag=value,value,...``, the last flag varying fastest.

    Raises:
        ValueError: for a word of another form.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not (name and equals and all(values.split(","))):
            raise ValueError(f"--sweep takes FLAG=VALUE,VALUE such as cfg-scale=1.5,2.0, not {word!r}")
        axes[name.lstrip("-")] = values.split(",")
    return [dict(zip(axes, combination)) for combination in itertools.product(*axes.values())]


def rows_of_table(path: str | Path) -> list[Row]:
    """The rows of a CSV (the first line names the flags, an empty cell leaves one out) or a JSON list of objects.

    Raises:
        ValueError: when it is neither, or empty.
    """
    path = Path(path)
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ValueError(f'{path} must hold a JSON list of objects such as {{"cfg-scale": 1.5}}')
    else:
        with open(path, newline="", encoding="utf-8") as file:
            content = list(csv.DictReader(file))
    rows = [{str(k).lstrip("-"): str(v) for k, v in row.items() if v not in (None, "")} for row in content]
    if not rows:
        raise ValueError(f"{path} has no rows of settings")
    return rows


def arguments_of(row: Row) -> list[str]:
    """A row as command-line flags: true and false are switches."""
    flags: list[str] = []
    for name, value in row.items():
        if value.lower() == "true":
            flags.append(f"--{name}")
        elif value.lower() != "false":
            flags.append(f"--{name}={value}")
    return flags


def sweep(
    args: argparse.Namespace,
    rows: Sequence[Row],
    parse: Callable[[Row], argparse.Namespace],
    defaults: dict[str, Any],
    network: FeatureNetwork,
) -> None:
    """Draw, measure and note the set of each row that is not in the table yet; then draw the plot.

    `parse` makes the sampler's arguments of a row. Every process calls this.
    """
    settings = [parse(row) for row in rows]  # all of them are checked before the first picture is drawn
    reference: PictureStatistics | None = None
    for number, (row, own) in enumerate(zip(rows, settings), start=1):
        identity = _identity(args, own, defaults, network)
        if broadcast_object(is_main() and _done(args.results, identity)):
            continue
        if is_main():
            print(f"set {number} of {len(rows)}: {row}", flush=True)
        folder = sample_image_set(own, defaults)
        pictures = open_pictures(beside(folder, ".npz"))
        reference = reference or statistics(network, open_pictures(args.reference))
        found = distances(reference, statistics(network, pictures))
        if is_main():
            append_row(args.results, {**row, **found, **identity}, [*row, *found, "images"])
        barrier()
    if is_main():
        plot(args.results, list(rows[0]))
        print(Path(args.results).with_suffix(".md").read_text(), end="")


def statistics(network: FeatureNetwork, pictures: PictureSet, batch_size: int = 64) -> PictureStatistics:
    """The statistics of a set, each process looking at a part of it."""
    share = rank_share(pictures.shape[0])
    batches: Iterator[Tensor] = pictures.batches(share, batch_size)
    with torch.inference_mode():
        return feature_statistics(network, batches, first=share.start, keep_features=True)


def _identity(
    args: argparse.Namespace, own: argparse.Namespace, defaults: dict[str, Any], network: FeatureNetwork
) -> dict[str, str]:
    """What makes two rows of the results the same measurement."""
    return {
        "images": str(own.num_fid_samples),
        "set": folder_name(own, defaults),
        "reference": str(args.reference),
        "network": network.label,
    }


def _done(table: str | Path, identity: dict[str, str]) -> bool:
    return any(all(row.get(k) == v for k, v in identity.items()) for row in read_table(table)[1])


def plot(table: str | Path, swept: Sequence[str]) -> None:
    """The first metric over the swept flag with the most numbers, one line per combination of the others, as PNG."""
    columns, rows = read_table(table)
    metrics = [name for name in columns if name.startswith(("KD-", "KID")) and not name.endswith(" std")]
    numeric = {name: {row[name] for row in rows if _is_number(row.get(name, ""))} for name in swept}
    x = max(swept, key=lambda name: len(numeric[name]))
    if not metrics or len(numeric[x]) < 2:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if not (_is_number(row.get(x, "")) and row.get(metrics[0])):
            continue
        name = ", ".join(f"{other} {row[other]}" for other in swept if other != x and row.get(other))
        spread = float(row.get(f"{metrics[0]} std") or 0)
        lines.setdefault(name, []).append((float(row[x]), float(row[metrics[0]]), spread))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, points in sorted(lines.items()):
        across, up, spread = zip(*sorted(points))
        axes.errorbar(across, up, spread, marker="o", capsize=3, label=name or None)
    axes.set(xlabel=x, ylabel=metrics[0])
    if any(lines):
        axes.legend(fontsize="small")
    with atomic_path(Path(table).with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

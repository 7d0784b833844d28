"""The picture of a finished run: its curves at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.files import atomic_path
from utils.logger import read_metrics

NAME = "summary.png"


def draw_summary(folder: str | Path) -> Path | None:
    """Draw loss, validation, learning rate and throughput of the run in `folder` from its metrics.jsonl.

    Returns the picture's path, or None when there is nothing to draw or matplotlib is not installed.
    """
    entries = read_metrics(Path(folder) / "metrics.jsonl")
    try:
        from matplotlib.figure import Figure
    except ImportError:  # the picture is a convenience; metrics.jsonl has everything
        return None
    if not entries:
        return None
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, _panels(entries)):
        for name in names:
            steps, values = zip(*((entry["step"], entry[name]) for entry in entries if name in entry))
            axis.plot(steps, values, label=name, marker="o" if name.startswith("val/") else None, markersize=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if names:
            axis.legend(frameon=False)
    figure.suptitle(Path(folder).name)
    with atomic_path(Path(folder) / NAME) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    return Path(folder) / NAME


def _panels(entries: Sequence[dict[str, float]]) -> list[tuple[str, list[str]]]:
    """Title and curves of each panel, chosen from the numbers that the run wrote."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    validated = [name for name in names if name.startswith("val/")]
    losses = [name for name in ("loss", "val/loss", "val/ema_loss") if name in names]
    measures = [name for name in validated if name not in losses]
    # with and without EMA; other measures have other scales
    shown = [name for name in measures if name.removeprefix("val/ema_") == measures[0].removeprefix("val/")]
    throughput = next((name for name in ("tokens_per_second", "steps_per_second") if name in names), None)
    return [
        ("loss", losses),
        ("validation", measures[:1] + [name for name in shown if name != measures[0]]),
        ("learning rate", [name for name in ("lr",) if name in names]),
        ("throughput", [throughput] if throughput else []),
    ]

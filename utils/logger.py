"""What a run says: lines to the terminal and log.txt, numbers to metrics.jsonl, pictures; both to TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
import types
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from utils.distributed import is_main
from utils.image import make_grid_image, save_png

_COLUMNS = 8  # images in a row of a picture


class _AboveProgressBar(logging.StreamHandler):
    """Writes to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def create_logger(logging_dir: str | Path | None) -> logging.Logger:
    """The logger of a run: rank 0 writes to stderr and `logging_dir`/log.txt (if given), other ranks are silent."""
    logger = logging.getLogger("llamagen")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    if not is_main():
        logger.addHandler(logging.NullHandler())
        return logger
    handlers: list[logging.Handler] = [_AboveProgressBar()]
    if logging_dir is not None:
        handlers.append(logging.FileHandler(Path(logging_dir) / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class Metrics:
    """Named numbers over steps, for people (TensorBoard, in `folder`/tensorboard) and programs (metrics.jsonl).

    `from_step`: entries of later steps, left by a run that died after its last checkpoint, are dropped first.
    `wandb_project`: a project of Weights & Biases that gets everything too.
    """

    def __init__(self, folder: str | Path, from_step: int = 0, wandb_project: str | None = None) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._tensorboard = self._wandb = None
        if is_main():
            kept = [entry for entry in read_metrics(self.path) if entry["step"] <= from_step]
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            self._tensorboard = _summary_writer(Path(folder) / "tensorboard", from_step)
            self._wandb = open_wandb(Path(folder), wandb_project)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line and one TensorBoard point per value; only rank 0 writes."""
        if not is_main():
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{k: round(float(v), 6) for k, v in values.items()}}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(_wandb_names(values), step=step)

    def write_pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Write each set of images (N, 3, H, W) in [-1, 1] as pictures/{step:07d}-{name}.png and to TensorBoard.

        Eight images stand in a row; only rank 0 writes.
        """
        if not is_main():
            return
        for name, images in pictures.items():
            grid = make_grid_image(images.detach(), min(len(images), _COLUMNS))
            save_png(grid, self.path.parent / "pictures" / f"{step:07d}-{name}.png")
            if self._tensorboard is not None:
                self._tensorboard.add_image(name, np.asarray(grid), step, dataformats="HWC")
            if self._wandb is not None:
                self._wandb.log({name: sys.modules["wandb"].Image(grid)}, step=step)

    def close(self) -> None:
        """Write out what TensorBoard and Weights & Biases still hold back."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _summary_writer(folder: Path, from_step: int):
    # With this name importable TensorBoard does not load TensorFlow, which takes seconds and many log lines.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # TensorBoard is a convenience; metrics.jsonl has everything
        return None
    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)


def open_wandb(folder: Path, project: str | None) -> Any:
    """The run of `folder` in a project of Weights & Biases, the same one after a restart; None without a project.

    A missing package, login or connection costs the run nothing: one line in the log says so.
    """
    if project is None:
        return None
    note = folder / "wandb_id.txt"
    if not note.is_file():
        note.write_text(uuid.uuid4().hex[:12])
    try:
        import wandb

        return wandb.init(project=project, name=folder.name, id=note.read_text(), dir=str(folder), resume="allow")
    except Exception as error:  # whatever it is, training matters more
        logging.getLogger("llamagen").info(f"Weights & Biases is not used ({error}); metrics.jsonl has everything")
        return None


def _wandb_names(values: Mapping[str, float]) -> dict[str, float]:
    """The established name of the loss; the others as they are."""
    return {"train_loss" if name == "loss" else name: value for name, value in values.items()}


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """All entries of a metrics.jsonl file in order; a half-written last line is left out."""
    entries = []
    if Path(path).is_file():
        for line in Path(path).read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return entries

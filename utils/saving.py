"""Saving and restoring the state of a training: single files, or sharded folders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from utils import checkpoint, flat_shards, sharded_files
from utils.distributed import barrier, is_main
from utils.optim import Optimizers
from utils.run_folder import RunFolder


@dataclass
class Saver:
    """The checkpoints of one run.

    Args:
        stateful: name -> object with state_dict and load_state_dict; together they are the checkpoint.
        extra: plain values that go into every checkpoint (the command's arguments).
        keep_last: keep this many newest checkpoints; 0 keeps all.
        sharded: write folders by all processes, in the background, instead of one file by rank 0.
        consolidated: put the whole weights into such a folder: "always", "last" (at the end alone) or "never".
    """

    run: RunFolder
    logger: logging.Logger
    stateful: Mapping[str, Any]
    extra: Mapping[str, Any]
    keep_last: int = 0
    sharded: bool = False
    consolidated: str = "always"
    _writer: sharded_files.ShardedWriter | None = field(default=None, init=False)

    def save(self, steps: int, last: bool = False) -> None:
        """Write a checkpoint; all processes call this. A sharded one may be on its way still when this returns.

        Raises:
            ValueError: when the disk is full; earlier checkpoints are untouched.
        """
        if self.sharded:
            self._save_sharded(steps, last)
            return
        if is_main():
            for path in self.run.save(self._content(steps), steps, self.keep_last):
                self.logger.info(f"Saved checkpoint to {path}")
        barrier()

    def _content(self, steps: int) -> dict[str, Any]:
        return {**{name: part.state_dict() for name, part in self.stateful.items()}, **self.extra, "steps": steps}

    def _save_sharded(self, steps: int, last: bool) -> None:
        folder = self.run.checkpoint_folders[0]
        if self._writer is None:
            self._writer = sharded_files.ShardedWriter(self.logger, lambda: checkpoint.prune(folder, self.keep_last))
        whole = self.consolidated == "always" or (self.consolidated == "last" and last)
        self._writer.start(self._content(steps), folder / f"{steps:07d}", whole)

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            ValueError: when the disk was full.
        """
        if self._writer is not None:
            self._writer.wait()

    def restore(self, source: Path, suggest: checkpoint.Suggest | None = None) -> int | None:
        """Restore every part that the checkpoint `source` has, whichever format and number of processes wrote it.

        Parts that it lacks (released files hold weights alone) are named in the log and start afresh. `suggest` names
        the fitting model when the weights do not fit. Returns the steps done, if the checkpoint knows them.
        """
        content = self._read(source)
        for name, part in self.stateful.items():
            self._restore(name, part, content, source, suggest)
        steps = content.get("steps", checkpoint.step_of(source))
        return int(steps) if steps >= 0 else None

    def _read(self, source: Path) -> dict[str, Any]:
        if sharded_files.is_sharded(source):
            like = self._like if any(isinstance(value, DTensor) for value in self._model_values()) else None
            return sharded_files.read(source, like, parts=set(self.stateful))
        content = checkpoint.read(source)
        optimizer = self.stateful.get("optimizer")
        if source.is_dir() and isinstance(optimizer, Optimizers) and (files := flat_shards.shard_files(source)):
            shapes = [p.shape for p in optimizer.parameters]
            shards = [checkpoint.read(file) for file in files]
            content = {"model": content, "optimizer": flat_shards.joined(shards, shapes, source)}
        if (note := source / "resume_step.txt").is_file():
            content = {**({"model": content} if "model" not in content else content), "steps": int(note.read_text())}
        return content

    def _model_values(self) -> list[Tensor]:
        return list(self.stateful["model"].state_dict().values())

    def _like(self, path: tuple[str, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor that is sharded as the part of the state is that `path` leads to."""
        part, target = self.stateful[path[0]], None
        if isinstance(part, nn.Module):
            target = part.state_dict().get(path[1])
        elif isinstance(part, Optimizers):
            target = part.parameter_at(path[1:])
        fits = target is not None and target.shape == shape
        return torch.empty_like(target.detach(), dtype=dtype) if fits else torch.empty(shape, dtype=dtype)

    def _restore(self, name: str, part: Any, content: Mapping[str, Any], source: Any, suggest: Any) -> None:
        if content.get(name) and name != "model":
            state = content[name]
        elif name in ("model", "ema"):
            state = checkpoint.state_dict_of(content, source)
        else:
            self.logger.info(f"{source} has no {name} state: it starts afresh")
            return
        if isinstance(part, nn.Module):
            checkpoint.fit(part, state, source, suggest)
        else:
            part.load_state_dict(state)

"""Where a training run lives on disk.

{results_dir}/{NNN}-{model}/        or exactly the folder given as --run-dir
    args.json  log.txt  metrics.jsonl  tensorboard/
    checkpoints/{step:07d}.pt
{cloud_save_path}/{date}/{NNN}-{model}/checkpoints/      a second copy of every checkpoint, when asked for

Sharded trainings take the time for a number, {YYYYmmddHHMMSS}-{model}, and write each checkpoint once, as a folder:
{cloud_save_path}/{run's name}/{step:07d}/, without that flag into checkpoints/ as above.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import checkpoint, sharded_files
from utils.distributed import broadcast_object, is_main
from utils.files import read_json, write_json

# Flags that may differ between a run and its continuation: they do not change what is learned.
_FREE_FLAGS = {
    "log_every",
    "ckpt_every",
    "keep_last",
    "num_workers",
    "run_dir",
    "resume",
    "compile",
    "device",
    "num_threads",
    "val_every",
    "val_images",
    "sample_images",
    "sample_cfg_scale",
    "eval_samples",
    "eval_reference",
    "eval_features",
    "eval_weights",
    "gpt_ckpt",
    "vq_ckpt",
    "results_dir",
    "cloud_save_path",
    "no_local_save",
    "on_bad_loss",
    "spike_threshold",
    "data_parallel",
    "shard_size",
    "activation_checkpointing",
    "consolidated",
    "init_from",
    "init_from_ema",
    "wandb_project",
    "no_wandb",
}


@dataclass
class RunFolder:
    """The folder of one run, and the folders its checkpoints go to."""

    path: Path
    checkpoint_folders: list[Path] = field(default_factory=list)

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint in any of the run's folders."""
        found = filter(None, (checkpoint.latest(folder) for folder in self.checkpoint_folders))
        return max(found, key=checkpoint.step_of, default=None)

    def save(self, content: dict[str, Any], step: int, keep_last: int) -> list[Path]:
        """Write `content` as the checkpoint of `step` into every folder and drop all but the newest `keep_last`."""
        written = []
        for folder in self.checkpoint_folders:
            checkpoint.save(content, folder / f"{step:07d}.pt")
            checkpoint.prune(folder, keep_last)
            written.append(folder / f"{step:07d}.pt")
        return written


def open_run(args: argparse.Namespace, model_name: str) -> RunFolder:
    """Make the folder of a new run, or find the one to continue; every rank gets the same answer.

    With ``--run-dir`` that folder is used, whatever is in it. Without, an unfinished run in ``--results-dir`` that was
    started with the same settings is continued (not with ``--no-resume``), else the next number is taken.
    """
    chosen = broadcast_object(_choose(args, model_name) if is_main() else None)
    path, folders = chosen
    return RunFolder(path, folders)


def _choose(args: argparse.Namespace, model_name: str) -> tuple[Path, list[Path]]:
    path = Path(args.run_dir) if args.run_dir else _unfinished_run(args, model_name) or _new_folder(args, model_name)
    _refuse_other_settings(path, args)
    path.mkdir(parents=True, exist_ok=True)
    record = path / "args.json"
    known = read_json(record) if record.is_file() else {}
    folders = known.get("checkpoint_folders") or [str(folder) for folder in _checkpoint_folders(path, args)]
    for folder in folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
        sharded_files.clean(Path(folder))
    write_json(record, {"args": vars(args), "checkpoint_folders": folders, "finished": known.get("finished", False)})
    return path, [Path(folder) for folder in folders]


def _checkpoint_folders(path: Path, args: argparse.Namespace) -> list[Path]:
    local = [] if args.no_local_save else [path / "checkpoints"]
    if not args.cloud_save_path:
        if args.no_local_save:
            raise ValueError("--no-local-save needs --cloud-save-path: otherwise no checkpoint would be written at all")
        return local
    if _is_sharded(args):
        return [Path(args.cloud_save_path) / path.name]
    stamp = time.strftime("%Y-%m-%d-%H-%M-%S")
    return [*local, Path(args.cloud_save_path) / stamp / path.name / "checkpoints"]


def mark_finished(run: RunFolder) -> None:
    """Note in the folder that the run reached its last step, so that the same command starts a new one."""
    record = read_json(run.path / "args.json")
    write_json(run.path / "args.json", {**record, "finished": True})


def _is_sharded(args: argparse.Namespace) -> bool:
    return getattr(args, "data_parallel", "ddp") != "ddp"


def _new_folder(args: argparse.Namespace, model_name: str) -> Path:
    root = Path(args.results_dir)
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(entry.name[:3]) for entry in root.iterdir() if re.match(r"\d{3}-", entry.name)]
    names = (f"{number:03d}" for number in range(max(taken, default=-1) + 1, 1000))
    if _is_sharded(args):
        names = (time.strftime("%Y%m%d%H%M%S", time.localtime(time.time() + i)) for i in range(1000))
    for name in names:
        path = root / f"{name}-{model_name.replace('/', '-')}"
        try:
            path.mkdir()  # fails when another run took the number meanwhile
        except FileExistsError:
            continue
        return path
    raise ValueError(f"{root} holds 1000 runs; give another --results-dir")


def _unfinished_run(args: argparse.Namespace, model_name: str) -> Path | None:
    root = Path(args.results_dir)
    if not args.resume or not root.is_dir():
        return None
    for path in sorted(root.glob(f"*-{model_name.replace('/', '-')}"), reverse=True):
        if not (path / "args.json").is_file():
            continue
        record = read_json(path / "args.json")
        if not record.get("finished") and not _differences(record.get("args", {}), vars(args)):
            return path
    return None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = (old.keys() & new.keys()) - _FREE_FLAGS
    return sorted(name for name in names if old[name] != new[name])


def _refuse_other_settings(path: Path, args: argparse.Namespace) -> None:
    record = path / "args.json"
    if not record.is_file() or checkpoint.latest(path / "checkpoints") is None:
        return
    old, new = read_json(record).get("args", {}), vars(args)
    changed = [name for name in _differences(old, new) if name in ("vq_model", "gpt_model", "gpt_type", "dataset")]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path} holds a run with --{name.replace('_', '-')} {old[name]}, this command has {new[name]}; "
            f"give another --run-dir"
        )

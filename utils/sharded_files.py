"""Checkpoints of sharded models: a folder into which each process writes its own part, by torch.distributed.checkpoint.

    {step:07d}/
        .metadata  __{rank}_0.distcp      all tensors, by their path: model/layers.0.attention.wqkv.weight
        state.json                        everything else: steps, arguments, the loss scale
        consolidated.pth resume_step.txt  the whole weights in the established form, when asked for

A folder of that name is whole: it is written under a hidden name, in the background, and renamed at the end. Any number
of processes can read it, one that trains without sharding too. Reading unpickles nothing but the list of tensors, and
that through an allow-list of the classes it is made of.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from utils.distributed import barrier, broadcast_object, is_main
from utils.files import is_full_disk, read_json, write_json
from utils.sharded import whole

METADATA, PLAIN = ".metadata", "state.json"
Like = Callable[[tuple[str, ...], torch.Size, torch.dtype], Tensor]


def is_sharded(path: str | Path) -> bool:
    """Whether `path` is the folder of a sharded checkpoint."""
    return (Path(path) / METADATA).is_file()


class ShardedWriter:
    """Writes checkpoints in the background, one at a time. All processes must call its methods together."""

    def __init__(self, logger: logging.Logger, after: Callable[[], None] = lambda: None) -> None:
        self.logger, self.after = logger, after
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # apart from the training's
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._folder = Path()

    def start(self, content: Mapping[str, Any], folder: Path, consolidated: bool) -> None:
        """Copy the tensors of `content` to the CPU and begin to write them; returns before they are written.

        Raises:
            ValueError: when the disk was full for the checkpoint before this one.
        """
        self.wait()
        self._folder, temporary = folder, folder.with_name(f".{folder.name}.tmp")
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        tensors, plain = split(content)
        weights = _whole_weights(content["model"]) if consolidated else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a single process: that there is a single process
            written = dcp.async_save(
                tensors, storage_writer=FileSystemWriter(str(temporary)), process_group=self._group
            )
        self._pending = self._thread.submit(self._finish, written, temporary, folder, plain, weights)

    def _finish(
        self, written: Any, temporary: Path, folder: Path, plain: Any, weights: dict[str, Tensor] | None
    ) -> None:
        getattr(written, "upload_completion", written).result()
        if not is_main():
            return
        if weights is not None:
            torch.save(weights, temporary / "consolidated.pth")
            (temporary / "resume_step.txt").write_text(f"{plain['steps']}\n")
        write_json(temporary / PLAIN, plain)
        remove(folder)
        os.rename(temporary, folder)
        self.logger.info(f"Saved checkpoint to {folder}")
        self.after()

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk.

        Raises:
            ValueError: when the disk was full; the checkpoints before it are untouched.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        failure: BaseException | None = pending.exception()
        full = failure is not None and _is_full(failure, self._folder.parent)
        if broadcast_object(full):
            if is_main():
                shutil.rmtree(self._folder.with_name(f".{self._folder.name}.tmp"), ignore_errors=True)
            raise ValueError(f"no space left on the disk while writing {self._folder}; nothing there was changed")
        if failure is not None:
            raise RuntimeError(f"writing {self._folder} failed") from failure


def _whole_weights(shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on the CPU of rank 0 alone; all processes have to help."""
    weights = {}
    for name, value in shards.items():
        gathered = whole(value)
        if is_main():
            weights[name] = gathered.to("cpu", copy=True)
    return weights


def _is_full(failure: BaseException, folder: Path) -> bool:
    return any(is_full_disk(error, folder) for error in _causes(failure))


def _causes(failure: BaseException) -> list[BaseException]:
    """What happened in each process that failed."""
    return [error for error, _ in getattr(failure, "failures", {}).values()] or [failure]


def split(content: Any, path: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], Any]:
    """The tensors in nested dicts by their path, and the same nesting without them.

    Lists stay as they are, but with tensors inside they turn into dicts from "0", "1", ...
    """
    if isinstance(content, list):
        tensors, plain = split(dict(enumerate(content)), path)
        return (tensors, plain) if tensors else ({}, content)
    if not isinstance(content, Mapping):
        return {}, content
    tensors, plain = {}, {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors["/".join((*path, str(key)))] = value.detach()
        else:
            inner, plain[str(key)] = split(value, (*path, str(key)))
            tensors |= inner
    return tensors, plain


def read(folder: str | Path, like: Like | None = None, parts: Collection[str] | None = None) -> dict[str, Any]:
    """The content that was written, nested as it was (but for the lists of `split`), on the CPU and whole.

    `like` gives the tensor to read into, from a path, its whole shape and dtype: a sharded one is filled with its
    shard. `parts` are the outermost names to read.

    Raises:
        ValueError: when the folder is damaged or holds something other than lists of tensors.
    """
    reader = _Reader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        path = tuple(name.split("/"))
        if isinstance(entry, TensorStorageMetadata) and (parts is None or path[0] in parts):
            shape, dtype = entry.size, entry.properties.dtype
            tensors[name] = like(path, shape, dtype) if like else torch.empty(shape, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that each process reads for itself
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter wraps whatever was met, and is no Exception
        reason = next(iter(_causes(error)))
        raise ValueError(f"{folder} is not a readable checkpoint (damaged or incomplete): {reason!r}") from error
    content = read_json(Path(folder) / PLAIN) if (Path(folder) / PLAIN).is_file() else {}
    content = {key: value for key, value in content.items() if parts is None or key in {*parts, "steps", "args"}}
    for name, value in tensors.items():
        _place(content, name.split("/"), value)
    return _with_numbers(content)


def _place(content: dict[str, Any], path: list[str], value: Tensor) -> None:
    for key in path[:-1]:
        content = content.setdefault(key, {})
    content[path[-1]] = value


def _with_numbers(content: Any) -> Any:
    """Dicts whose keys are all numbers, such as an optimizer's, get numbers as keys again."""
    if not isinstance(content, dict):
        return content
    numbered = bool(content) and all(key.isdigit() for key in content)
    return {int(key) if numbered else key: _with_numbers(value) for key, value in content.items()}


class _Reader(FileSystemReader):
    """torch's reader, whose list of tensors is unpickled through an allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / METADATA
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            names = {info.relative_path for info in metadata.storage_data.values()}
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{file} is not the list of tensors of a checkpoint: {error}") from error
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{file} points outside of its folder")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        found = None
        if module == "torch.distributed.checkpoint.metadata" or (module, name) in _ALLOWED:
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if found is None or ((module, name) not in _ALLOWED and getattr(found, "__module__", None) != module):
            raise pickle.UnpicklingError(f"{module}.{name} has no place there")
        return found


def _member(kind: Any, name: str) -> Enum:
    """All that `getattr` is for in there: Python 3.11.0 to 3.11.3 write the members of an enum with it."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[name]
    raise pickle.UnpicklingError(f"getattr of {kind!r} has no place there")


_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its place in Python 3.13
}


def remove(folder: Path) -> None:
    """Remove a checkpoint's folder; no half of it is ever seen under its name."""
    if folder.is_dir():
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Remove what killed processes left in a folder of checkpoints."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

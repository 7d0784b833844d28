"""A GPT as a folder that vLLM reads: ``config.json`` beside ``model.safetensors``.

The weights keep their names, so every command here reads the folder as a checkpoint too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autoregressive.build import load_gpt
from autoregressive.models.config import ModelArgs
from autoregressive.models.gpt import Transformer
from autoregressive.serve.vllm_plugin import ARCHITECTURE, MODEL_TYPE
from utils import checkpoint
from utils.files import cache_folder, is_full_disk, read_json, write_json
from utils.precision import DTYPES

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # that vLLM's attention on a CPU has; a GPU has them too
_CONFIG = "config.json"


def padded_head_dim(head_dim: int) -> int:
    """The width of a head in vLLM: the next one that its attention has.

    Raises:
        ValueError: wider than any.
    """
    found = next((size for size in HEAD_SIZES if size >= head_dim), None)
    if found is None:
        raise ValueError(f"vLLM has attention heads up to {HEAD_SIZES[-1]} wide; this GPT's are {head_dim} wide")
    return found


def stream_fields(config: ModelArgs, streams: int) -> dict[str, int]:
    """The fields of ``config.json`` that follow from the rows a token carries: 2 with guidance, 1 without."""
    heads = {"num_attention_heads": config.n_head, "num_key_value_heads": config.kv_heads}
    return {"streams": streams, **{name: count * streams for name, count in heads.items()}}


def vllm_config(model: Transformer) -> dict[str, Any]:
    """``config.json``: what vLLM plans with, and under ``gpt`` the model's own configuration."""
    config = model.config
    fields = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "gpt": asdict(config),
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.n_layer,
        "head_dim": padded_head_dim(config.head_dim),
        "vocab_size": config.vocab_size,  # of the head; class c enters as token vocab_size + c
        "max_position_embeddings": config.cls_token_num + config.block_size,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "dtype": str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
        "cfg_scale": 4.0,  # of requests that name none
        "cfg_interval": -1,
        **stream_fields(config, 2 if has_null_condition(model) else 1),
    }
    if config.model_type == "t2i":
        # a prompt of n embeddings stands at the last n condition positions: vLLM shifts positions for M-RoPE models
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
    return fields


def has_null_condition(model: Transformer) -> bool:
    """Whether the model can be guided."""
    return model.model_type == "t2i" or model.cls_embedding.dropout_prob > 0


def export_model(model: Transformer, folder: str | Path, source: Mapping[str, Any] | None = None) -> Path:
    """Write `model` as the new folder `folder`, which appears whole or not at all; one that exists is replaced.

    `source` is kept in ``config.json``: what the weights are from.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        checkpoint.save_weights(model.state_dict(), temporary / "model.safetensors", {"format": "pt"})
        write_json(temporary / _CONFIG, {**vllm_config(model), "source": dict(source or {})})
        _put(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_full_disk(error, folder.parent):
            raise ValueError(f"no space left on the disk while writing {folder}") from error
        raise
    return folder


def _put(temporary: Path, folder: Path) -> None:
    """Rename; a folder that is in the way (another process may have put it there just now) goes first."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def export_checkpoint(args: argparse.Namespace, vocab_size: int, folder: str | Path | None = None) -> Path:
    """The exported folder of --gpt-ckpt, made unless it is there and of the checkpoint as it is now.

    `folder` is where exports are kept; default: beside the checkpoint, or in the user's cache where that cannot be
    written. `args` are those of `build.load_gpt` and --precision.

    Raises:
        CheckpointError: no checkpoint given, or one for another model.
    """
    if not args.gpt_ckpt:
        raise checkpoint.CheckpointError("--gpt-ckpt is missing: give the GPT's checkpoint")
    source = {"settings": _settings(args, vocab_size), "checkpoint": _identity(Path(args.gpt_ckpt))}
    target = _exports_folder(Path(args.gpt_ckpt), folder) / _name(args, source["settings"])
    if _source_of(target) == source:
        return target
    model = load_gpt(args, vocab_size, torch.device("cpu"), DTYPES[args.precision])
    return export_model(model, target, source)


def _settings(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    names = ("gpt_model", "gpt_type", "cls_token_num", "caption_dim", "num_classes", "image_size", "downsample_size")
    chosen = {name: getattr(args, name) for name in names}
    return {**chosen, "precision": args.precision, "use_ema": getattr(args, "use_ema", False), "vocab_size": vocab_size}


def _identity(path: Path) -> dict[str, Any]:
    """What changes when a checkpoint changes: its place, size and time; of a folder those of all its files."""
    if not path.exists():
        raise checkpoint.CheckpointError(f"there is no checkpoint at {path}")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    known = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"path": str(path.resolve()), "files": known}


def _name(args: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """The folder's name: the checkpoint's, and a few letters that stand for the settings."""
    place = str(Path(args.gpt_ckpt).resolve())
    digest = hashlib.sha256(json.dumps([place, settings], sort_keys=True).encode()).hexdigest()[:8]
    return f"{Path(args.gpt_ckpt).name}.vllm-{digest}"


def _exports_folder(path: Path, folder: str | Path | None) -> Path:
    if folder is not None:
        return Path(folder)
    beside = path.resolve().parent
    return beside if os.access(beside, os.W_OK) else cache_folder() / "vllm"


def _source_of(folder: Path) -> Any:
    try:
        return read_json(folder / _CONFIG).get("source")
    except (OSError, ValueError):
        return None

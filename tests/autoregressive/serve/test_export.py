"""Exported folders: what they hold, when they are made anew, that they are whole or not there."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import safetensors.torch
import torch

from autoregressive.build import add_gpt_args
from autoregressive.models.gpt import GPT_models
from autoregressive.serve import export
from autoregressive.serve.export import export_checkpoint, export_model, padded_head_dim, vllm_config
from autoregressive.serve.exported import ExportedModel
from tests.autoregressive.models.tiny import random_model
from utils import checkpoint
from utils.args import make_parser

FLAGS = ["--gpt-model", "GPT-XS", "--num-classes", "3", "--image-size", "16", "--downsample-size", "4"]


@pytest.fixture
def args(tmp_path):
    """Flags of a checkpoint with plain and averaged weights."""
    gpt = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3)
    averaged = {name: value + 1 for name, value in gpt.state_dict().items()}
    checkpoint.save({"model": gpt.state_dict(), "ema": averaged, "args": {}}, tmp_path / "gpt.pt")
    flags = make_parser(None)
    add_gpt_args(flags)
    parsed = flags.parse_args([*FLAGS, "--gpt-ckpt", str(tmp_path / "gpt.pt")])
    parsed.precision = "none"
    return parsed


def test_the_folder_is_a_checkpoint_with_the_same_weights(args):
    folder = export_checkpoint(args, 64)
    want = checkpoint.read(args.gpt_ckpt)["model"]
    got = checkpoint.state_dict_of(checkpoint.read(folder), folder)
    assert {name: value.tolist() for name, value in got.items()} == {k: v.tolist() for k, v in want.items()}
    assert folder.parent == folder.parent.parent / args.gpt_ckpt.split("/")[-2]
    assert ExportedModel(folder).args == GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3).config


def test_it_is_kept_and_made_anew_when_the_checkpoint_changes(args, monkeypatch):
    folder = export_checkpoint(args, 64)
    written = (folder / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(export, "load_gpt", None)  # would fail if it were called
    assert export_checkpoint(args, 64) == folder
    monkeypatch.undo()
    assert (folder / "config.json").stat().st_mtime_ns == written

    gpt = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3)
    checkpoint.save({"model": gpt.state_dict()}, args.gpt_ckpt)
    assert export_checkpoint(args, 64) == folder
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(weights["tok_embeddings.weight"], gpt.tok_embeddings.weight)


def test_other_settings_have_other_folders(args, tmp_path):
    plain = export_checkpoint(args, 64)
    args.use_ema = True
    averaged = export_checkpoint(args, 64)
    args.precision = "bf16"
    half = export_checkpoint(args, 64, tmp_path / "elsewhere")
    assert len({plain, averaged, half}) == 3
    assert half.parent == tmp_path / "elsewhere"
    first, second, third = (safetensors.torch.load_file(f / "model.safetensors") for f in (plain, averaged, half))
    assert torch.equal(second["norm.weight"], first["norm.weight"] + 1)
    assert third["norm.weight"].dtype == torch.bfloat16
    assert ExportedModel(half).dtype == torch.bfloat16


def test_a_damaged_folder_is_made_anew(args):
    folder = export_checkpoint(args, 64)
    (folder / "config.json").write_text("{")
    assert export_checkpoint(args, 64) == folder
    assert ExportedModel(folder).args.num_classes == 3


def test_a_folder_that_cannot_be_finished_is_not_there(args, monkeypatch, tmp_path):
    def broken(*_: object, **__: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match="went away"):
        export_checkpoint(args, 64)
    assert os.listdir(tmp_path) == ["gpt.pt"]


def test_where_the_checkpoints_folder_cannot_be_written_the_cache_takes_it(args, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert export_checkpoint(args, 64).parent == tmp_path / "cache" / "vllm"


def test_checkpoints_that_do_not_fit_name_the_flags(args):
    with pytest.raises(checkpoint.CheckpointError, match="--codebook-size\\) 64"):
        export_checkpoint(args, 65)
    args.gpt_ckpt = "missing.pt"
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint at missing\.pt"):
        export_checkpoint(args, 64)
    args.gpt_ckpt = None
    with pytest.raises(checkpoint.CheckpointError, match="--gpt-ckpt is missing"):
        export_checkpoint(args, 64)


def test_sharded_checkpoints(args, tmp_path):
    folder = tmp_path / "0000100"
    folder.mkdir()
    torch.save(checkpoint.read(args.gpt_ckpt)["model"], folder / "consolidated.pth")
    args.gpt_ckpt = str(folder)
    exported = export_checkpoint(args, 64)
    assert exported.name.startswith("0000100.vllm-")
    shutil.rmtree(folder)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        export_checkpoint(args, 64)


def test_what_vllm_plans_with():
    with torch.device("meta"):
        big = vllm_config(GPT_models["GPT-3B"]())
        text = vllm_config(GPT_models["GPT-B"](model_type="t2i", cls_token_num=120))
        unguided = vllm_config(GPT_models["GPT-B"](class_dropout_prob=0.0))
    assert (big["num_attention_heads"], big["num_key_value_heads"], big["head_dim"]) == (64, 64, 112)  # heads of 100
    assert (big["hidden_size"], big["num_hidden_layers"], big["max_position_embeddings"]) == (3200, 24, 257)
    assert "rope_parameters" not in big
    assert text["rope_parameters"]["mrope_section"] == [1, 1, 1]
    assert (unguided["num_attention_heads"], unguided["streams"]) == (12, 1)


def test_heads_that_vllm_does_not_have():
    assert [padded_head_dim(width) for width in (16, 64, 100, 256)] == [32, 64, 112, 256]
    with pytest.raises(ValueError, match="up to 256 wide; this GPT's are 260 wide"):
        padded_head_dim(260)


def test_memory_is_planned_for_the_images_at_once(tmp_path):
    model = random_model(dim=64, n_layer=3, n_head=2, block_size=256)
    exported = ExportedModel(export_model(model, tmp_path / "gpt"))
    assert exported.bytes_per_token(2) == 2 * 3 * 4 * 32 * 4  # keys and values, layers, heads, width, bytes
    planned = exported.engine_args(max_images=10)["kv_cache_memory_bytes"]
    assert planned == (1 + 10 * 3) * 128 * exported.bytes_per_token(2)  # 257 positions are 3 blocks of 128
    assert "kv_cache_memory_bytes" not in exported.engine_args(gpu_memory_utilization=0.5)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="holds a llama model"):
        ExportedModel(tmp_path)
    with pytest.raises(FileNotFoundError):
        ExportedModel(tmp_path / "nothing")

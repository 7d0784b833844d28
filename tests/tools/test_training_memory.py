"""The counted activations against those of a real forward and backward pass, and the table of the docs."""

import re

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from autoregressive.models.config import ModelArgs, sized_args
from autoregressive.models.gpt import Transformer
from tests.commands.shell import ROOT
from tools.training_memory import activation_bytes, parser, saved_bytes, table, weights_of
from utils.memory import state_bytes

SMALL = {"dim": 32, "n_layer": 3, "n_head": 2, "multiple_of": 16, "vocab_size": 64, "block_size": 16}


def really_saved(config, images):
    model, kept = Transformer(config).train(), {}
    own = {p.data_ptr() for p in model.parameters()}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    condition = torch.zeros(images, dtype=torch.long)
    if config.model_type == "t2i":
        condition = torch.zeros(images, config.cls_token_num, config.caption_dim)
    codes = torch.zeros(images, config.block_size, dtype=torch.long)
    with saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        _, loss = model(codes[:, :-1], condition, targets=codes, loss_only=True)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("fields", [{}, {"model_type": "t2i", "cls_token_num": 5, "caption_dim": 8}])
def test_counting_without_data_gives_what_autograd_keeps(fields):
    config = ModelArgs(**SMALL, **fields)
    for images in (1, 3):
        assert saved_bytes(config, images, sharded=False) == really_saved(config, images)


def test_blocks_are_alike_so_depth_is_a_straight_line():
    config = ModelArgs(**SMALL)
    direct = saved_bytes(config, 2, False) - saved_bytes(config, 1, False)
    assert activation_bytes(config, sharded=False, compiled=False) == direct
    deep = ModelArgs(**{**SMALL, "n_layer": 24})
    for compiled in (False, True):
        none, full = (activation_bytes(deep, False, mode, compiled) for mode in ("none", "full"))
        assert full < none / 3
        assert activation_bytes(deep, True, "none", compiled) < none  # the stream between blocks is half as wide
    with pytest.raises(ValueError, match="compiled blocks alone"):
        activation_bytes(deep, False, "selective")


MEASURED = [  # peaks of torch.cuda.max_memory_allocated on an H200, in gigabytes, at 384 px
    ("GPT-L", 32, "none", True, 24.38),
    ("GPT-XL", 24, "none", True, 37.95),
    ("GPT-3B", 8, "selective", True, 59.48),
    ("GPT-XXL", 16, "selective", True, 40.36),
    ("GPT-L", 32, "none", False, 32.28),
    ("GPT-XL", 24, "none", False, 49.23),
]


@pytest.mark.parametrize(("size", "images", "checkpointing", "compiled", "peak_gb"), MEASURED)
def test_estimates_are_upper_ones_and_no_tenth_above_what_a_gpu_took(size, images, checkpointing, compiled, peak_gb):
    config = sized_args(size, block_size=24 * 24)
    state = state_bytes(weights_of(config))
    estimate = state + images * activation_bytes(config, False, checkpointing, compiled)
    assert peak_gb < estimate / 1e9 < 1.1 * peak_gb


def test_published_parameter_counts():
    assert [round(weights_of(sized_args(size)).total / 1e6) for size in ("GPT-B", "GPT-3B")] == [111, 3097]


def test_the_table_of_the_docs_is_what_the_tool_prints():
    documented = (ROOT / "docs/training.md").read_text()
    assert "python3 tools/training_memory.py" in documented
    printed = table(["GPT-B", "GPT-XL", "GPT-3B"], parser().parse_args([]))
    assert len(printed) == 5 and all(line in documented for line in printed), "\n".join(printed)


def test_compiled_blocks_leave_room_for_more_images():
    eager, compiled = (table(["GPT-XL"], parser().parse_args(flags))[-1] for flags in ([], ["--compile"]))
    assert [re.findall(r", (\d+)", line.split("|")[3]) for line in (eager, compiled)] == [["83"], ["117"]]


def test_more_gpus_and_a_larger_card_fit_more():
    def images(*flags):
        line = table(["GPT-3B"], parser().parse_args(list(flags)))[-1]
        return int(re.findall(r", (\d+) \|", line)[1])

    assert images("--gpus", "8") < images("--gpus", "64") < images("--gpus", "64", "--gpu-memory", "141")
    assert "does not fit" in table(["GPT-7B"], parser().parse_args([]))[-1]

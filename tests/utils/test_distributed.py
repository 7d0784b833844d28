"""Who this process is under each launcher, and helpers in a world of one."""

import argparse
import builtins

import pytest
import torch

from utils import distributed
from utils.distributed import Launch, process_group, read_launch


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Launch(5, 8, 1, 4, "torchrun"),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, 0, 1, "torchrun")),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            Launch(3, 8, 3, 4, "slurm"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch()),  # an interactive job: one process on its own
    ],
)
def test_launch(environ, expected):
    assert read_launch(environ) == expected


def test_a_process_on_its_own_needs_no_group():
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main()) == (0, 1, True)
        distributed.barrier()
        assert distributed.any_rank(True, device) and not distributed.any_rank(False, device)
        assert distributed.broadcast_object({"a": 1}) == {"a": 1}
        model = torch.nn.Linear(2, 2)
        assert distributed.data_parallel(model, device) is model


@pytest.mark.parametrize(
    ("backend", "device"),
    [("nccl", "cuda:3"), ("cpu:gloo,cuda:nccl", "cuda:3"), ("gloo", "cpu"), ("cpu:gloo,cuda:gloo", "cpu")],
)
def test_tensors_are_exchanged_on_the_gpu_where_the_group_has_nccl(backend, device, monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert distributed.group_device() == torch.device(device)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_groups_that_are_started_are_read_alike(kind):
    assert distributed.has_nccl(distributed._backend(torch.device(kind))) == (kind == "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_clear_error():
    with pytest.raises(ValueError, match="no GPU"), distributed.process_group("cuda"):
        pass


def test_the_established_entry_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(builtins, "print", builtins.print)
    args = argparse.Namespace()
    distributed.init_distributed_mode(args)
    assert (args.rank, args.world_size, args.gpu, args.distributed) == (0, 1, 0, False)
    assert args.dist_url == "env://"


def test_print_is_silent_on_other_ranks_unless_forced(monkeypatch, capsys):
    monkeypatch.setattr(builtins, "print", builtins.print)
    distributed.setup_for_distributed(is_master=False)
    print("hidden")
    print("shown", force=True)
    distributed.setup_for_distributed(is_master=True)
    print("again")
    assert capsys.readouterr().out == "shown\nagain\n"


def test_a_group_inside_a_group_is_the_same_one(monkeypatch, tmp_path):
    """The inner block neither starts a second group nor closes the outer one."""
    monkeypatch.setattr(distributed, "read_launch", lambda: Launch(0, 2))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with distributed.process_group("cpu") as device:
            assert device == torch.device("cpu")
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with process_group("cuda:1") as device:
        assert device == torch.device("cuda", 1) and current == [device]
    with process_group("cuda") as device:
        assert device == torch.device("cuda") and len(current) == 1

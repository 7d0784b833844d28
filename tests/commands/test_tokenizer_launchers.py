"""The launchers of scripts/tokenizer, with a torchrun that only says how it was called."""

from __future__ import annotations

import pytest

from tests.commands.shell import ROOT, launcher_output, stand_ins

PORTS = {
    "reconstruction_vq": ("tokenizer/tokenizer_image/reconstruction_vq_ddp.py", 12344),
    "reconstruction_vqgan": ("tokenizer/vqgan/reconstruction_vqgan_ddp.py", 12344),
    "reconstruction_vae": ("tokenizer/vae/reconstruction_vae_ddp.py", 12344),
    "reconstruction_consistency_decoder": ("tokenizer/consistencydecoder/reconstruction_cd_ddp.py", 12344),
    "val": ("tokenizer/validation/val_ddp.py", 12343),
    "train_vq": ("tokenizer/tokenizer_image/vq_train.py", 29500),
}


@pytest.fixture
def machine(tmp_path):
    """Commands in front of the path: torchrun prints where it is and its words, nvidia-smi shows three GPUs."""
    gpus = 'for i in 0 1 2; do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done'
    return stand_ins(tmp_path, {"torchrun": 'pwd\nprintf "%s\\n" "$@"', "nvidia-smi": gpus})


def words(machine, name: str, *flags: str, **variables: str) -> list[str]:
    folder, *rest = launcher_output(machine, f"tokenizer/{name}.sh", *flags, **variables)
    assert folder == str(ROOT)
    return rest


@pytest.mark.parametrize("name", PORTS)
def test_defaults_work_and_flags_come_last(machine, name):
    script, port = PORTS[name]
    processes = 1 if name == "train_vq" else 3
    assert words(machine, name, "--data-path", "a b", "--image-size", "512") == [
        "--nnodes=1", f"--nproc_per_node={processes}", "--node_rank=0", "--master_addr=127.0.0.1",
        f"--master_port={port}", script, "--data-path", "a b", "--image-size", "512",
    ]  # fmt: skip
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("name", PORTS)
def test_the_machine_is_described_by_variables(machine, name):
    variables = {"nnodes": "2", "nproc_per_node": "5", "node_rank": "1", "master_addr": "host", "master_port": "7"}
    assert words(machine, name, **variables)[:5] == [f"--{key}={value}" for key, value in variables.items()]


def test_without_a_gpu_there_is_one_process(machine):
    (machine / "nvidia-smi").unlink()
    assert "--nproc_per_node=1" in words(machine, "val")


def test_fine_tuning_keeps_its_flags_before_those_of_the_user(machine):
    flags = words(machine, "train_vq_finetune", "--data-path", "mine")
    assert flags[flags.index("--vq-ckpt") + 1] == "./pretrained_models/vq_ds16_c2i.pt"
    assert "--finetune" in flags and flags[-2:] == ["--data-path", "mine"]
    again = words(machine, "train_vq_finetune_continue", "--vq-ckpt", "x")
    assert "--finetune" not in again and again[-2:] == ["--vq-ckpt", "x"]
    for line in (flags, again):
        assert line[line.index("--disc-start") + 1] == "0" and line[line.index("--dataset") + 1] == "t2i_image"

"""The launchers of training and the Slurm script, with a torchrun and a Slurm that only say how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from autoregressive.train import train_c2i_fsdp, train_t2i
from tests.commands.shell import ROOT, environment, launcher_output, stand_ins

STAGES = {"train_t2i_stage1": "256", "train_t2i_stage2": "512"}
VARIABLES = {"nnodes": "2", "nproc_per_node": "5", "node_rank": "1", "master_addr": "host", "master_port": "7"}


@pytest.fixture
def machine(tmp_path):
    """Commands in front of the path."""
    scripts = {
        "torchrun": 'printf "%s\\n" "$@"',
        "srun": 'echo "srun $*" >> calls; shift; exec "$@"',
        "scontrol": 'echo "scontrol $*" >> calls; echo first-host',
    }
    return stand_ins(tmp_path, scripts)


def words(machine, name, *flags, **variables):
    return launcher_output(machine, f"autoregressive/{name}.sh", *flags, **variables)


@pytest.mark.parametrize("name", ["train_c2i", "train_c2i_fsdp", *STAGES])
def test_the_machine_is_described_by_variables_and_flags_are_passed_on(machine, name):
    found = words(machine, name, "--results-dir", "a b", **VARIABLES)
    assert found[:5] == [f"--{key}={value}" for key, value in VARIABLES.items()] and found[-1] == "a b"
    assert words(machine, name)[:3] == ["--nnodes=1", "--nproc_per_node=1", "--node_rank=0"]
    assert (ROOT / found[5]).is_file()


@pytest.mark.parametrize("name", STAGES)
def test_the_stages_are_the_published_ones_and_flags_override(machine, name):
    args = train_t2i.parser().parse_args(words(machine, name, "--data-path", "mine")[6:])
    assert args.image_size == int(STAGES[name]) and args.vq_ckpt == "./pretrained_models/vq_ds16_t2i.pt"
    assert args.data_path == "mine" and bool(args.short_t5_feat_path) == (name == "train_t2i_stage2")


def test_the_command_in_the_slurm_script_is_valid():
    text = (ROOT / "scripts/slurm/train.sbatch").read_text()
    line = text.split("train_c2i_fsdp.py ")[1].split("\n#\n")[0].replace("\\\n#", "")
    assert train_c2i_fsdp.parser().parse_args(line.split()).data_parallel == "hsdp"


def start_job(machine, content):
    """The Slurm script over a training of this content."""
    (machine / "train.py").write_text(content)
    env = {**environment(), "PATH": f"{machine}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(machine),
           "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]"}  # fmt: skip
    line = ["bash", str(ROOT / "scripts/slurm/train.sbatch"), "train.py", "--run-dir", "run"]
    return subprocess.Popen(line, cwd=machine, env=env, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(("code", "queued"), [(0, False), (2, False), (75, True), (137, False)])
def test_only_a_saved_state_queues_again(machine, code, queued):
    content = f"import os, sys; assert os.environ['MASTER_ADDR'] == 'first-host'; sys.exit({code})"
    assert start_job(machine, content).wait(30) == code
    calls = (machine / "calls").read_text()
    assert ("scontrol requeue 42" in calls) == queued and "srun --kill-on-bad-exit=1 python3 train.py" in calls


def test_the_script_outlives_the_signal_and_waits_for_the_training_to_save(machine):
    content = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), pathlib.Path('saved').touch(), sys.exit(75)))\n"
        "pathlib.Path('ready').write_text(str(__import__('os').getpid()))\n"
        "time.sleep(60)\n"
    )
    job = start_job(machine, content)
    deadline = time.monotonic() + 30
    while not (machine / "ready").is_file() or not (machine / "ready").read_text():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    os.kill(int((machine / "ready").read_text()), signal.SIGTERM)
    assert job.wait(30) == 75 and (machine / "saved").is_file()
    assert "scontrol requeue 42" in (machine / "calls").read_text()


def test_without_a_run_folder_nothing_starts(machine):
    line = ["bash", str(ROOT / "scripts/slurm/train.sbatch"), "train.py"]
    done = subprocess.run(line, cwd=machine, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "--run-dir" in done.stderr and not (machine / "calls").exists()

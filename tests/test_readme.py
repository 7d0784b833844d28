"""Every command and every piece of code in the README runs, on tiny data and with tiny models."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

from autoregressive.models.gpt import GPT_models
from language import extract_t5_feature
from language.extraction import extract
from tests.commands.shell import (
    EXTRACT,
    GPT_FLAGS,
    GPT_SIZE,
    ROOT,
    TRAIN,
    VQ_FLAGS,
    VQ_SIZE,
    VQ_TRAIN,
    environment,
    make_images,
    run,
)
from tests.processes import free_port
from tests.tiny_t5 import make_tiny_t5
from utils import checkpoint

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
STAGES = [text.strip() for kind, text in BLOCKS if kind == "bash" and "--" in text]
# What these do is tested by tests/commands/test_quickstart.py and by this very run.
SETUP = {"bash scripts/quickstart.sh", "bash scripts/test.sh", "pip install -r requirements.txt"}
# These run until they are stopped: with a path at which they name their models.
SERVERS = {"python app.py": "/config", "python -m autoregressive.serve.server": "/v1/models"}
TEXT_SIZE = ["--gpt-model", "GPT-XS", "--downsample-size", "4", "--cls-token-num", "8", "--caption-dim", "16"]
SMALLER = {  # flags that come last win: the same command on tiny data
    "train_vq": [*VQ_FLAGS, "--max-steps", "2"],
    "extract_codes": [*VQ_SIZE, "--num-workers", "0"],
    "train_c2i": [*GPT_FLAGS, "--max-steps", "2"],
    "dataset/own.py": ["--size", "16"],
    "dataset/tars.py": ["--samples-per-shard", "5"],
    "sample_c2i.sh": [*VQ_SIZE, *GPT_FLAGS[:8], "--num-fid-samples", "5", "--precision", "none"],
    "extract_flan": ["--t5-model-type", "tiny", "--precision", "none", "--num-workers", "0"],
    "train_t2i": [*VQ_SIZE, *TEXT_SIZE, *GPT_FLAGS[len(GPT_SIZE) :], "--max-steps", "2"],
    "sample_t2i": [*VQ_SIZE, *TEXT_SIZE, "--t5-model-type", "tiny", "--precision", "none"],
    "sample_c2i": [*VQ_SIZE, *GPT_FLAGS[:8], "--class-labels", "0", "2", "--precision", "none"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the README's paths stand for."""
    work = tmp_path_factory.mktemp("readme")
    for split in ("train", "val"):
        make_images(work / "data/imagenet" / split)
    make_images(work / "photos")
    images, codes = work / "data/imagenet/train", work / "data/codes"
    run(VQ_TRAIN, *VQ_FLAGS, "--data-path", images, "--max-steps", 1, "--run-dir", work / "vq")
    vq_ckpt = checkpoint.latest(work / "vq/checkpoints")
    run(EXTRACT, *VQ_SIZE, "--vq-ckpt", vq_ckpt, "--data-path", images, "--code-path", codes, "--num-workers", 0)
    run(TRAIN, *GPT_FLAGS, "--code-path", codes, "--max-steps", 1, "--run-dir", work / "gpt")
    (work / "pretrained_models").mkdir()
    vq_ckpt.rename(work / "pretrained_models/vq_ds16_c2i.pt")
    checkpoint.latest(work / "gpt/checkpoints").rename(work / "pretrained_models/c2i_L_384.pt")
    codes.rename(work / "data/codes_flip_ten_crop")
    _text(work, images)
    return work


def _text(work, images):
    """Captions of the images with features, a tiny T5, and a GPT for them."""
    models, captions = work / "pretrained_models", work / "data/captions"
    make_tiny_t5(models / "t5-ckpt")
    shutil.copy(models / "vq_ds16_c2i.pt", models / "vq_ds16_t2i.pt")
    fields = {"vocab_size": 64, "block_size": 16, "model_type": "t2i", "cls_token_num": 8, "caption_dim": 16}
    checkpoint.save({"model": GPT_models["GPT-XS"](**fields).state_dict()}, models / "t2i_XL_stage2_512.pt")
    captions.mkdir()
    lines = [json.dumps({"image_path": str(path), "text": ["a red cat"]}) for path in sorted(images.rglob("*.png"))]
    (captions / "a.jsonl").write_text("\n".join(lines))
    flags = ["--data-path", captions, "--t5-path", work / "data/features", "--t5-model-path", models / "t5-ckpt"]
    flags += SMALLER["extract_flan"]
    extract(extract_t5_feature.parser().parse_args([str(flag) for flag in flags]))


def test_readme_has_the_commands_that_this_test_knows():
    assert len(STAGES) == 11
    assert {text.strip() for kind, text in BLOCKS if kind == "bash"} == SETUP | set(SERVERS) | set(STAGES)


@pytest.mark.parametrize("command", STAGES, ids=lambda text: re.search(r"(\w+)\.(sh|py)", text)[1])
def test_stage(command, data, tmp_path):
    smaller = next(flags for name, flags in SMALLER.items() if name in command)
    words = [_placed(word, data, tmp_path) for word in shlex.split(command)]
    line = (
        shlex.join([*words, *smaller])
        .replace("'nproc_per_node=8'", "nproc_per_node=2")
        .replace("nproc_per_node=8", "nproc_per_node=2")
    )
    if "extract" in command:
        line = line.replace("codes_flip_ten_crop", "new_codes")
    env = {**environment(), "PATH": f"{sys.prefix}/bin:{environment()['PATH']}", "master_port": str(free_port())}
    done = subprocess.run(line, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, line + done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.parametrize("command", SERVERS)
def test_servers_start_with_the_models_that_come_along_and_stop(command):
    port = free_port()
    env = {**environment(), "PATH": f"{sys.prefix}/bin:{environment()['PATH']}"}
    line = [*shlex.split(command), "--port", str(port)]
    process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address, said = f"http://127.0.0.1:{port}", ""
    try:
        while address not in said:  # it says where it is when it is ready
            printed = process.stdout.readline()
            assert printed, said
            said += printed
        answer = httpx.get(address + SERVERS[command], trust_env=False, timeout=60).text
        assert "emoji-class" in answer and "emoji-text" in answer
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in said + rest, said + rest


def _placed(word, data, tmp_path):
    """The word of a command; a path of the README stands for one in the test's folders."""
    results = ("data/photos", "data/shards")
    if word in results or word.startswith("results/") or word.endswith(".png"):
        return str(tmp_path / word)
    return str(data / word) if word.startswith(("data/", "pretrained_models/")) or word == "photos" else word


def test_python_examples():
    examples = [text for kind, text in BLOCKS if kind == "python"]
    assert examples
    for text in examples:
        subprocess.run(
            [sys.executable, "-c", text + "\nassert images.shape == (2, 3, 32, 32)"],
            cwd=ROOT,
            env=environment(),
            check=True,
        )


def test_every_path_in_the_layout_exists():
    layout = README.split("## How the repository is laid out")[1].split("```")[1]
    folder = ROOT
    for line in filter(None, layout.splitlines()):
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / names[0]
        for name in names:
            place = folder if not line.startswith(" ") else folder / name
            assert place.exists(), place

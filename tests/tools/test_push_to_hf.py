"""The push tools: what they write is what was trained, and what the hub gets is what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file

from autoregressive.models.gpt import GPT_models
from autoregressive.models.gpt_hf import TransformerHF
from tests.commands.shell import ROOT, run
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.tokenizer_image.vq_model_hf import VQModelHF
from tools import push_gpt_to_hf, push_vae_to_hf
from utils import checkpoint

VQ = ["--vq-model", "VQ-4-S", "--codebook-size", "64", "--vq-ckpt", "vq.pt"]
GPT = ["--gpt-model", "GPT-XS", "--codebook-size", "64", "--num-classes", "3", "--image-size", "16",
       "--downsample-size", "4"]  # fmt: skip


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """vq.pt, with other averaged weights, and gpt.pt in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    states = [VQ_models["VQ-4-S"](codebook_size=64).state_dict() for _ in range(2)]
    checkpoint.save({"model": states[0], "ema": states[1]}, "vq.pt")
    gpt = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3)
    checkpoint.save({"model": gpt.state_dict()}, "gpt.pt")
    return tmp_path


def push(tool, *flags: str) -> Path:
    return tool.push(tool.parser().parse_args(list(flags)))


class Hub:
    """Stands for the hub: keeps what is pushed in a folder, where `from_pretrained` finds it under its name."""

    def __init__(self, root: Path, harm: bool = False) -> None:
        self.root, self.harm, self.pushed = root, harm, []

    def push_to_hub(self, model, repo_id: str) -> None:
        model.save_pretrained(self.root / repo_id)
        self.pushed.append(repo_id)
        if self.harm:
            file = self.root / repo_id / "model.safetensors"
            weights = load_file(file)
            save_file({**weights, "decoder.conv_out.bias": weights["decoder.conv_out.bias"] + 1}, file)


@pytest.fixture
def hub(work, monkeypatch) -> Hub:
    hub = Hub(work)  # a relative name of a folder in the working directory is a place to load from
    monkeypatch.setattr(PyTorchModelHubMixin, "push_to_hub", lambda model, repo_id: hub.push_to_hub(model, repo_id))
    return hub


@pytest.mark.parametrize("ema", [False, True])
def test_a_tokenizer_comes_back_as_it_was(ema):
    folder = push(push_vae_to_hf, *VQ, "--no-push", *(["--ema"] if ema else []))
    assert folder == Path("hf_models/vq-ds16-c2i")
    stored = checkpoint.read("vq.pt")["ema" if ema else "model"]
    loaded = VQModelHF.from_pretrained(folder)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in stored.items())
    assert json.loads((folder / "config.json").read_text())["codebook_size"] == 64
    images = torch.rand(1, 3, 16, 16)
    plain = VQ_models["VQ-4-S"](codebook_size=64)
    plain.load_state_dict(stored)
    assert torch.equal(loaded(images)[0], plain.eval()(images)[0])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("none", torch.float32)])
def test_a_gpt_comes_back_as_it_was(precision, dtype):
    folder = push(push_gpt_to_hf, *GPT, "--gpt-ckpt", "gpt.pt", "--precision", precision, "--no-push")
    assert folder == Path("hf_models/GPT-XS-16")
    stored = load_file(folder / "model.safetensors")
    weights = checkpoint.read("gpt.pt")["model"]
    assert stored.keys() == weights.keys()
    assert all(value.dtype == dtype and torch.equal(value, weights[key].to(dtype)) for key, value in stored.items())
    assert TransformerHF.from_pretrained(folder).config.num_classes == 3


def test_pushing_goes_to_the_repository_and_is_checked(hub, capsys):
    push(push_vae_to_hf, *VQ, "--repo-id", "me/mine")
    push(push_gpt_to_hf, *GPT, "--gpt-ckpt", "gpt.pt")
    assert hub.pushed == ["me/mine", "FoundationVision/GPT-XS-16"]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out
    hub.harm = True
    with pytest.raises(ValueError, match=r"me/bad does not hold .* decoder\.conv_out\.bias"):
        push(push_vae_to_hf, *VQ, "--repo-id", "me/bad")


def test_a_refusing_hub_costs_nothing(hub, monkeypatch):
    def refuse(model, repo_id: str) -> None:
        raise OSError("401 Unauthorized\nmore lines")

    monkeypatch.setattr(PyTorchModelHubMixin, "push_to_hub", refuse)
    with pytest.raises(ValueError, match=r"could not push to me/mine \(401 Unauthorized\); .* hf_models/mine") as error:
        push(push_vae_to_hf, *VQ, "--repo-id", "me/mine")
    assert "--repo-id" in str(error.value)
    assert VQModelHF.from_pretrained("hf_models/mine").config.codebook_size == 64


def test_released_weights_are_downloaded_where_none_are_given(monkeypatch):
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        raise OSError("no connection")

    monkeypatch.setattr("tools.hub.hf_hub_download", download)
    for model, file in (("VQ-16", "vq_ds16_c2i.pt"), ("VQ-8", "vq_ds8_c2i.pt")):
        with pytest.raises(ValueError, match=rf"could not download {file} .*no connection.* give the path"):
            push(push_vae_to_hf, "--vq-model", model, "--no-push")
        assert asked.pop() == ("FoundationVision/LlamaGen", file)  # and no GPT, which the tool never uses
    with pytest.raises(ValueError, match="no released VQ-4-S"):
        push(push_vae_to_hf, "--vq-model", "VQ-4-S", "--no-push")
    assert not asked


def test_weights_of_another_model_are_refused():
    with pytest.raises(checkpoint.CheckpointError, match="--num-classes 3"):
        push(push_gpt_to_hf, *GPT, "--num-classes", "5", "--gpt-ckpt", "gpt.pt", "--no-push")
    with pytest.raises(checkpoint.CheckpointError, match="--gpt-ckpt is missing"):
        push(push_gpt_to_hf, *GPT, "--no-push")
    with pytest.raises(checkpoint.CheckpointError, match="not of a tokenizer"):
        push(push_vae_to_hf, *VQ[:4], "--vq-ckpt", "gpt.pt", "--no-push")
    assert not Path("hf_models").exists()


def test_established_flags():
    push_vae_to_hf.parser().parse_args(
        ["--gpt-model", "GPT-B", "--vq-model", "VQ-16", "--codebook-size", "16384", "--codebook-embed-dim", "8"]
    )
    line = (
        "--gpt-model GPT-B --gpt-ckpt x --gpt-type c2i --from-fsdp --cls-token-num 1 --precision bf16 --compile "
        "--vq-model VQ-16 --vq-ckpt x --codebook-size 16384 --codebook-embed-dim 8 --image-size 384 "
        "--image-size-eval 256 --downsample-size 16 --num-classes 1000"
    )
    push_gpt_to_hf.parser().parse_args(line.split())


@pytest.mark.slow
def test_the_tools_start_by_path(work):
    line = [*GPT, "--gpt-ckpt", work / "gpt.pt", "--no-push"]
    assert "checked by loading it again" in run(str(ROOT / "tools/push_gpt_to_hf.py"), *line, cwd=work)

"""The command that measures likelihoods: numbers, files, both kinds of conditions, two processes."""

import json

import pytest
import torch
from PIL import Image

from autoregressive.build import build_gpt
from evaluations.nll import evaluate, parser
from tests.autoregressive.train.stores import C2I, T2I, caption_codes, class_codes
from tests.commands.shell import run
from tools.convert_codes import convert
from utils import checkpoint


def trained(path, flags, seed=0, ema=False):
    """A checkpoint of a random GPT whose head is not zero."""
    args = parser().parse_args([*flags, "--code-path", "none"])
    states = []
    for number in range(2):
        torch.manual_seed(seed + number)
        model = build_gpt(args, args.vocab_size)
        torch.nn.init.normal_(model.output.weight, std=0.5)
        states.append(model.state_dict())
    checkpoint.save({"model": states[0]} | ({"ema": states[1]} if ema else {}), path)
    return path


def measure(tmp_path, *flags):
    args = parser().parse_args([*map(str, flags), "--output", str(tmp_path / "nll.json")])
    return evaluate(args)


def test_one_and_two_processes_write_the_same(tmp_path):
    ckpt, codes = trained(tmp_path / "gpt.pt", C2I), class_codes(tmp_path / "codes")
    flags = [*C2I, "--gpt-ckpt", ckpt, "--code-path", codes]
    alone = measure(tmp_path, *flags)
    assert alone["images"] == 7 and alone["bits_per_image"] == pytest.approx(16 * alone["bits_per_token"])
    assert json.loads((tmp_path / "nll.json").read_text()) == alone
    assert Image.open(tmp_path / "nll.png").size == (1100, 400)
    printed = run("evaluations/nll.py", *flags, "--output", tmp_path / "two.json", processes=2)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["bits_by_position"] == pytest.approx(alone["bits_by_position"], rel=1e-6) and two["images"] == 7
    assert json.dumps(two["bits_per_token"]) in printed


def test_packed_codes_and_averaged_weights(tmp_path):
    ckpt, codes = trained(tmp_path / "gpt.pt", C2I, ema=True), class_codes(tmp_path / "codes")
    convert(codes, tmp_path / "packed", "packed", 64, 5)
    flags = [*C2I, "--gpt-ckpt", ckpt, "--code-path"]
    files, packed = (measure(tmp_path, *flags, path) for path in (codes, tmp_path / "packed"))
    assert packed["bits_by_position"] == files["bits_by_position"]
    averaged = measure(tmp_path, *flags, codes, "--use-ema")
    assert averaged["weights"] == "ema" and averaged["nats_per_token"] != files["nats_per_token"]


def test_captions(tmp_path):
    codes, features = caption_codes(tmp_path, count=200)  # one of 200 without features
    ckpt = trained(tmp_path / "gpt.pt", T2I)
    found = measure(tmp_path, *T2I, "--gpt-ckpt", ckpt, "--code-path", codes, "--t5-feat-path", features, "--images", 9)
    assert found["images"] == 8 and found["tokens_per_image"] == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (T2I, "--t5-feat-path is missing"),
        ([*C2I, "--use-ema"], "holds no averaged weights"),
        ([*C2I[:-1], "32"], r"it would fit .*--vocab-size .* 64"),
        ([*C2I, "--image-size", "32"], "no folder"),
    ],
)
def test_mistakes_are_one_sentence(flags, message, tmp_path):
    ckpt, codes = trained(tmp_path / "gpt.pt", C2I), class_codes(tmp_path / "codes")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measure(tmp_path, *flags, "--gpt-ckpt", ckpt, "--code-path", codes)

"""autoregressive/serve/sample_c2i.py where vLLM is not installed; tests/vllm/test_command.py runs it where it is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample import sample_c2i
from autoregressive.serve.sample_c2i import main, parser
from tests.autoregressive.sample.tiny import tiny_models

LABELS = ["--class-labels", 0, 1, 2, 2, 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[object]:
    return tiny_models(tmp_path_factory.mktemp("tiny"))


def draw(*flags: object) -> None:
    main(parser().parse_args([str(flag) for flag in flags]))


def test_without_vllm_the_own_engine_draws_and_says_so(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(*tiny, *LABELS, "--seed", 5)
    printed = capsys.readouterr().out
    assert "vLLM is not installed in this environment (bash scripts/setup_vllm.sh makes one)" in printed
    assert "gpt sampling takes about" in printed
    assert "decoder takes about" in printed
    assert "image is saved to sample_c2i_vllm.png" in printed
    flags = [*tiny, *LABELS, "--seed", 5, "--output", "other.png"]
    sample_c2i.main(sample_c2i.parser().parse_args([str(flag) for flag in flags]))
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("sample_c2i_vllm.png", "other.png")]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "class 207 is out of range: the model has classes 0 .. 2"),
        ([*LABELS, "--gpt-type", "t2i"], "this command draws classes"),
        ([*LABELS, "--temperature", -1], "a temperature is 0"),
        ([*LABELS, "--top-p", 2], "top_p is 0 to 1"),
        ([*LABELS, "--gpt-ckpt", "missing.pt"], "there is no checkpoint at missing.pt"),
        ([*LABELS, "--image-size", 18], "not a multiple"),
    ],
)
def test_mistakes(tiny, flags, words):
    with pytest.raises(ValueError, match=words):
        draw(*tiny, *flags)

"""What the page says of models is so, and its command lines draw the same pictures."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.sample import edit_c2i, sample_c2i, sample_t2i
from autoregressive.serve.cards import Card
from autoregressive.serve.parameters import fields_of_json, wanted_of
from autoregressive.serve.requests import Edit, Request, Sampling
from autoregressive.serve.studio import Job, Studio
from demo.about import again, command_line, in_words, model_html, parameters

ODD = Sampling(3.0, 20, 0.9, 0.8)


@pytest.mark.parametrize(
    ("which", "subject", "command"), [(0, 2, sample_c2i), (1, "it's a “red” cat", sample_t2i)], ids=["class", "text"]
)
def test_the_line_draws_the_same_pictures(cards, tmp_path, which, subject, command):
    card = cards[which]
    request = Request(card.name, subject, ODD, seed=11, n=2)
    words = shlex.split(command_line(request, card))
    assert words[:2] == ["python3", f"autoregressive/sample/{command.__name__.split('.')[-1]}.py"]
    command.main(command.parser().parse_args([*words[2:], "--output-dir", str(tmp_path)]))
    jobs = [Job(card.name, subject, ODD, 11 + i) for i in range(2)]
    expected = Studio([card], torch.device("cpu")).draw(jobs)
    drawn = [np.array(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))]
    assert np.array_equal(np.stack(drawn), expected)


def test_the_line_of_an_edit_names_its_cells(of_classes, of_texts):
    edit = Edit(np.zeros((16, 16, 3), np.uint8), np.isin(np.arange(16), [3, 5]))
    line = command_line(Request("tiny-class", 2, ODD, n=2, edit=edit), of_classes)
    args = edit_c2i.parser().parse_args(shlex.split(line)[2:])
    assert args.cells == [3, 5] and args.class_labels == ["2"] and args.images_per_class == 2
    assert command_line(Request("tiny-text", "a", ODD, edit=edit), of_texts) == ""


def test_a_model_on_a_server_is_drawn_again_by_a_request_to_it(of_classes):
    there = Card("tiny-class", type(of_classes.args)(**{**vars(of_classes.args), "gpt_ckpt": None}))
    request = Request("tiny-class", 2, ODD, seed=11, n=3)
    assert wanted_of(fields_of_json(again(request, there).encode()), {"tiny-class": there}, 10).request == request
    assert again(replace(request, edit=Edit(np.zeros((16, 16, 3), np.uint8), np.arange(16) > 8)), there) == ""


def test_the_header_says_what_runs(of_classes, cards):
    gpt = Studio(cards[:1], torch.device("cpu"))._loaded["tiny-class"].gpt.model
    assert parameters(of_classes) == sum(weight.numel() for weight in gpt.parameters())
    line = model_html(of_classes)
    assert "tiny-class" in line and "GPT-XS" in line and "3 classes" in line and "16 × 16 pixels of 4 × 4 codes" in line


def test_numbers_in_words():
    assert [in_words(count) for count in (854_000, 2_920_000, 775_000_000, 1_411_000_000)] == [
        "854K", "2.9M", "775M", "1.4B"
    ]  # fmt: skip

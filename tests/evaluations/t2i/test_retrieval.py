"""Whether pictures are nearest to drawings of their name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.t2i.retrieval import chance_of_hit, evaluate, parser, ranks, retrieve
from tokenizer.tokenizer_image.vq_model import VQ_models


def test_ranks_count_the_wrong_ones_that_are_nearer():
    gallery = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    queries = torch.tensor([[0.1], [9.0], [1.9]])
    matches = torch.tensor([[True, False, False, False], [True, True, False, False], [False, True, False, True]])
    assert ranks(queries, gallery, matches).tolist() == [0, 2, 1]


def test_chance_is_that_of_drawing_without_replacement():
    assert chance_of_hit(1, 50, 1) == pytest.approx(1 / 50)
    assert chance_of_hit(1, 50, 10) == pytest.approx(10 / 50)
    assert chance_of_hit(2, 4, 2) == pytest.approx(5 / 6)


def test_equal_pictures_are_found_and_random_ones_are_not():
    torch.manual_seed(0)
    gallery = torch.randn(200, 8)
    captions = [f"thing {i}" for i in range(200)]
    found = retrieve(gallery[:40] + 0.01, captions[:40], gallery, captions)
    assert found.hits == {1: 1.0, 10: 1.0} and found.median_rank == 1
    assert found.chance[1] == pytest.approx(1 / 200)
    lost = retrieve(torch.randn(40, 8), captions[:40], gallery, captions)
    assert lost.hits[10] < 0.3


def test_the_command_matches_pictures_by_prompt(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "samples/images").mkdir(parents=True)
    lines, results = [], []
    for i, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]):
        picture = Image.fromarray(np.full((16, 16, 3), colour, np.uint8))
        picture.save(tmp_path / f"lists/{i}.png")
        picture.save(tmp_path / f"samples/images/{i:06d}.png")
        lines.append({"image_path": f"{i}.png", "text": [f"colour {i}"]})
        results.append({"text": f"colour {i}", "image_path": f"elsewhere/images/{i:06d}.png"})
    results.append({"text": "unheard of", "image_path": "images/000004.png"})
    (tmp_path / "lists/a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "samples/result.jsonl").write_text("\n".join(map(json.dumps, results)))
    torch.manual_seed(0)
    torch.save({"model": VQ_models["VQ-4-S"](codebook_size=4096).state_dict()}, tmp_path / "vq.pt")
    flags = ["--samples", tmp_path / "samples", "--data-path", tmp_path / "lists", "--vq-ckpt", tmp_path / "vq.pt",
             "--vq-model", "VQ-4-S", "--codebook-size", 4096, "--image-size", 16, "--device", "cpu"]  # fmt: skip
    args = parser().parse_args([str(flag) for flag in flags])
    result = evaluate(args)
    assert (result.pictures, result.gallery) == (4, 4)
    assert result.hits[1] == 1.0
    (tmp_path / "samples/result.jsonl").write_text(json.dumps(results[-1]))
    with pytest.raises(ValueError, match="none of the prompts"):
        evaluate(args)

"""Captions to text features, by the command and the recipe."""

import json

import numpy as np
import pytest
import torch

from dataset.features import open_features
from language import extract_t5_feature
from language.extraction import extract
from language.t5 import T5Embedder
from tests.processes import command_in_processes

CAPTIONS = {
    "a": ["a red cat", "the dog in snow. a big lake", "hello world"],
    "b.extra": [" ".join(["a photo of the red cat"] * 30), "sun"],
}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Two lists; the first has a blank line, so that line numbers are not places."""
    folder = tmp_path_factory.mktemp("lists")
    for stem, captions in CAPTIONS.items():
        lines = [json.dumps({"image_path": f"{i}.png", "text": [c, "long " + c]}) for i, c in enumerate(captions)]
        (folder / f"{stem}.jsonl").write_text("\n\n".join(lines) if stem == "a" else "\n".join(lines))
    return folder


def flags(lists, cache_dir, output, *more):
    return [str(x) for x in (
        "--data-path", lists, "--t5-path", output, "--t5-model-path", cache_dir, "--t5-model-type", "tiny",
        "--precision", "none", "--num-workers", 0, "--device", "cpu", *more,
    )]  # fmt: skip


def run(*args):
    extract(extract_t5_feature.parser().parse_args(flags(*args)))


def contents(folder):
    features = open_features(folder)
    return {(stem, line): features.read(stem, line) for stem, line in list(features.keys())}


def test_files_hold_the_features_of_each_caption_alone(lists, cache_dir, tmp_path, capsys):
    run(lists, cache_dir, tmp_path / "t5")
    encoder = T5Embedder("cpu", "tiny", local_cache=True, cache_dir=cache_dir, torch_dtype=torch.float32)
    expected = {("a", 0): 0, ("a", 2): 1, ("a", 4): 2, ("b.extra", 0): 0, ("b.extra", 1): 1}
    assert set(contents(tmp_path / "t5")) == set(expected)
    for (stem, line), number in expected.items():
        array = np.load(tmp_path / "t5" / stem / f"{line}.npy")
        features, mask = encoder.get_text_embeddings([CAPTIONS[stem][number]])
        assert array.dtype == np.float32
        assert array.shape == (1, int(mask.sum()), 16)
        torch.testing.assert_close(torch.from_numpy(array), features[:, : array.shape[1]], rtol=1e-5, atol=1e-5)
    lost = len(encoder.tokenizer(CAPTIONS["b.extra"][0])["input_ids"]) - 120
    assert f"1 captions have more than 120 tokens; {lost} tokens" in capsys.readouterr().out


def test_packed_holds_the_same_in_bfloat16(lists, cache_dir, tmp_path):
    run(lists, cache_dir, tmp_path / "files")
    run(lists, cache_dir, tmp_path / "packed", "--layout", "packed", "--batch-size", 1)
    files, packed = contents(tmp_path / "files"), contents(tmp_path / "packed")
    assert files.keys() == packed.keys()
    for key, features in files.items():
        torch.testing.assert_close(packed[key], features.bfloat16().float(), rtol=1e-2, atol=1e-3)


def test_another_caption_and_the_first_sentence(lists, cache_dir, tmp_path):
    run(lists, cache_dir, tmp_path / "long", "--caption-key", "llava")
    run(lists, cache_dir, tmp_path / "short", "--trunc-caption")
    run(lists, cache_dir, tmp_path / "plain")
    plain, long, short = (contents(tmp_path / name) for name in ("plain", "long", "short"))
    assert len(long["a", 0]) > len(plain["a", 0])
    assert len(short["a", 2]) == len(["the", "dog", "in", "snow"]) + 1  # and the end token
    assert len(plain["a", 2]) == len(short["a", 2]) + 4  # the full stop, "a", "big", "lake"


def test_what_is_there_is_kept_and_settings_do_not_mix(lists, cache_dir, tmp_path):
    output = tmp_path / "t5"
    run(lists, cache_dir, output)
    whole = contents(output)
    kept, gone = output / "a/0.npy", output / "b.extra/1.npy"
    gone.unlink()
    before = kept.stat().st_mtime_ns
    run(lists, cache_dir, output)
    assert kept.stat().st_mtime_ns == before
    again = contents(output)
    assert all(torch.allclose(again[key], whole[key], atol=1e-5) for key in whole)
    with pytest.raises(ValueError, match="text features made with another truncated_at_full_stop"):
        run(lists, cache_dir, output, "--trunc-caption")


def test_a_line_without_the_caption_is_left_out_and_counted(cache_dir, tmp_path, capsys):
    (tmp_path / "lists").mkdir()
    lines = [{"image_path": "0.png", "text": ["a cat"]}, {"image_path": "1.png"}, {"image_path": "2.png", "text": [""]}]
    (tmp_path / "lists/c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="line 1"):
        run(tmp_path / "lists", cache_dir, tmp_path / "strict")
    run(tmp_path / "lists", cache_dir, tmp_path / "t5", "--max-bad-share", 0.5)
    assert set(contents(tmp_path / "t5")) == {("c", 0), ("c", 2)}
    assert contents(tmp_path / "t5")["c", 2].shape == (1, 16)  # an empty caption is its end token
    assert "1 lines have no caption 'blip'" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_what_one_writes(lists, cache_dir, tmp_path):
    for layout in ("files", "packed"):
        arguments = flags(lists, cache_dir, tmp_path / f"two-{layout}", "--layout", layout)
        command_in_processes(2, extract_t5_feature, extract, *arguments)
        run(lists, cache_dir, tmp_path / f"one-{layout}", "--layout", layout)
        one, two = contents(tmp_path / f"one-{layout}"), contents(tmp_path / f"two-{layout}")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)

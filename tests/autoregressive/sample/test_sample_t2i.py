"""Pictures of prompts: one at a time to look at, and whole lists for evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.sample import sample_t2i, sample_t2i_ddp
from autoregressive.sample.prompt_set import sample_prompt_set
from tests.autoregressive.sample.tiny import tiny_text_models
from tests.commands import shell
from utils import checkpoint

PROMPTS = ["a red cat", "the dog in snow", "a red cat", "hello world"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    return tiny_text_models(tmp_path_factory.mktemp("t2i"))


def draw(models, folder: Path, *flags: object) -> dict[str, np.ndarray]:
    """The single files of sample_t2i, by name."""
    line = [*models, "--output-dir", folder, "--prompts", *PROMPTS, *flags]
    sample_t2i.main(sample_t2i.parser().parse_args([str(flag) for flag in line]))
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_a_grid_with_prompts_and_settings_in_it(models, tmp_path, capsys):
    line = [*models, "--output", tmp_path / "grid.png", "--prompts", "a cat", "the dog", "--images-per-prompt", 2]
    sample_t2i.main(sample_t2i.parser().parse_args([str(flag) for flag in line]))
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 + 4 * 18, 2 + 18)
        assert json.loads(grid.text["prompts"]) == ["a cat", "a cat", "the dog", "the dog"]
        assert json.loads(grid.text["settings"])["cfg_scale"] == 7.5
    said = capsys.readouterr().out
    assert "prompt 0 token len: 3\nprompt 1 token len: 3\n" in said and "Full sampling takes about" in said


def test_a_picture_does_not_depend_on_its_batch_and_has_its_own_seed(models, tmp_path):
    alone = draw(models, tmp_path / "alone", "--batch-size", 1)
    together = draw(models, tmp_path / "together", "--batch-size", 4)
    assert list(alone) == ["000000-a-red-cat.png", "000001-the-dog-in-snow.png", "000002-a-red-cat.png",
                           "000003-hello-world.png"]  # fmt: skip
    for name, picture in alone.items():
        assert np.abs(picture.astype(int) - together[name]).max() <= 1
    assert not np.array_equal(alone["000000-a-red-cat.png"], alone["000002-a-red-cat.png"])
    later = draw(models, tmp_path / "later", "--seed", 2)
    assert np.abs(later["000000-a-red-cat.png"].astype(int) - together["000002-a-red-cat.png"]).max() <= 1


def test_negative_prompts_and_padding_change_the_pictures(models, tmp_path):
    plain = draw(models, tmp_path / "plain")
    for name, flags in {"negative": ["--negative-prompt", "the horse"], "right": ["--no-left-padding"]}.items():
        other = draw(models, tmp_path / name, *flags)
        assert any(not np.array_equal(plain[file], other[file]) for file in plain), name
    unguided = draw(models, tmp_path / "unguided", "--cfg-scale", 1)
    same = draw(models, tmp_path / "same", "--cfg-scale", 1, "--negative-prompt", "the horse")
    assert all(np.array_equal(unguided[file], same[file]) for file in unguided)


def test_long_and_empty_prompts_are_drawn_with_a_warning(models, tmp_path, capsys):
    line = [*models, "--output", str(tmp_path / "grid.png"), "--prompts", "a cat " * 10, " "]
    sample_t2i.main(sample_t2i.parser().parse_args(line))
    warned = capsys.readouterr().err
    assert "prompt 0 has 13 tokens more than 8" in warned and "prompt 1 is empty" in warned


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--t5-feature-dim", "2048"], "a token of tiny has 16 numbers"),
        (["--t5-feature-max-len", "9"], "more than --cls-token-num 8"),
        (["--t5-model-type", "flan-t5-xl"], "no T5 encoder at"),
        (["--gpt-type", "c2i"], "this command draws prompts"),
        (["--prompt-file", "nowhere.txt"], "no file of prompts nowhere.txt"),
        (["--images-per-prompt", "0"], "at least 1"),
    ],
)
def test_mistakes_are_named(models, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample_t2i.main(sample_t2i.parser().parse_args([*models, *flags]))


def test_a_gpt_for_another_encoder_is_named(models, tmp_path):
    other = GPT_models["GPT-XS"](vocab_size=64, block_size=16, model_type="t2i", cls_token_num=8, caption_dim=12)
    checkpoint.save({"model": other.state_dict()}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match="--caption-dim 12"):
        sample_t2i.main(sample_t2i.parser().parse_args([*models, "--gpt-ckpt", str(tmp_path / "gpt.pt")]))


def set_flags(models, work: Path, prompts=PROMPTS) -> list[str]:
    (work / "My.Prompts.tsv").write_text("Prompt\tCategory\n" + "".join(f"{prompt}\tx\n" for prompt in prompts))
    return [*models, "--prompt-csv", str(work / "My.Prompts.tsv"), "--sample-dir", str(work / "samples"),
            "--per-proc-batch-size", "3"]  # fmt: skip


def sample_set(flags: list[str]) -> Path:
    parser = sample_t2i_ddp.parser()
    return sample_prompt_set(parser.parse_args(flags), vars(parser.parse_args([])))


def test_a_list_gives_exactly_its_pictures_and_a_manifest(models, tmp_path):
    folder = sample_set(set_flags(models, tmp_path))
    assert folder.name == ("GPT-XS-gpt-my-size-16-size-16-VQ-4-S-topk-1000-topp-1.0-temperature-1.0-cfg-7.5-seed-0"
                           "-precision-none")  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["captions.txt", "images", "images.json", "result.jsonl"]
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"{i:06d}.png" for i in range(4)]
    rows = [json.loads(line) for line in (folder / "result.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == PROMPTS and [row["seed"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["image_path"] == str(folder / "images/000001.png")
    assert (folder / "captions.txt").read_text().splitlines() == PROMPTS
    with Image.open(folder / "images/000001.png") as picture:
        assert picture.text["prompt"] == "the dog in snow"


def test_a_stopped_list_goes_on_and_other_prompts_are_refused(models, tmp_path):
    flags = set_flags(models, tmp_path)
    folder = sample_set([*flags, "--num-fid-samples", "2"])
    assert len(list((folder / "images").iterdir())) == 2
    first = (folder / "images/000000.png").stat().st_mtime_ns
    flags = set_flags(models, tmp_path, ["another", *PROMPTS[1:]])
    with pytest.raises(ValueError, match="prompts_sha256"):
        sample_set(flags)
    flags = set_flags(models, tmp_path)
    assert sample_set(flags) == folder
    assert len(list((folder / "images").iterdir())) == len((folder / "result.jsonl").read_text().splitlines()) == 4
    assert (folder / "images/000000.png").stat().st_mtime_ns == first


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(models, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = sample_set(set_flags(models, tmp_path / "one"))
    shell.run("autoregressive/sample/sample_t2i_ddp.py", *set_flags(models, tmp_path / "two"), processes=2)
    two = tmp_path / "two/samples" / one.name
    for path in (one / "images").iterdir():
        a, b = (np.asarray(Image.open(p), int) for p in (path, two / "images" / path.name))
        assert np.abs(a - b).max() <= 1
    assert (one / "captions.txt").read_text() == (two / "captions.txt").read_text()

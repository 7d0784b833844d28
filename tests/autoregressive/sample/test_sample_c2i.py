"""Drawing: which images depend on what."""

import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from autoregressive.sample.classes import ClassNames
from autoregressive.sample.painter import class_ids
from autoregressive.sample.pipeline import sampling_options
from autoregressive.sample.sample_c2i import codes_of, parser

SAMPLING = {"cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=5).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


def arguments(*flags):
    return parser().parse_args(["--cfg-scale", "2", "--top-k", "0", "--num-classes", "5", *flags])


def draw(gpt, labels, args):
    """The codes of all `labels`, in the command's batches."""
    torch.manual_seed(args.seed)
    numbers = torch.arange(len(labels)).split(args.batch_size)
    return torch.cat([codes_of(part.tolist(), gpt, labels.tolist(), args) for part in numbers])


def test_an_image_depends_on_its_number_not_on_its_batch(gpt):
    labels = torch.tensor([0, 3, 3, 1, 4])
    whole = draw(gpt, labels, arguments("--seed", "7"))
    pairs = draw(gpt, labels, arguments("--seed", "7", "--batch-size", "2"))
    assert torch.equal(whole, pairs)
    assert not torch.equal(whole[1], whole[2])  # the same class twice: two pictures
    assert not torch.equal(whole, draw(gpt, labels, arguments("--seed", "8")))


def test_legacy_draws_are_those_of_the_global_generator(gpt):
    labels = torch.tensor([0, 3, 2])
    torch.manual_seed(7)
    expected = generate(gpt, labels, 16, sample_logits=True, **SAMPLING)
    assert torch.equal(draw(gpt, labels, arguments("--seed", "7", "--legacy-rng")), expected)


def test_settings_that_mean_nothing_are_refused():
    for flags, message in (
        (["--temperature", "-1"], "temperature is 0 .* or more, not -1"),
        (["--temperature", "nan"], "temperature .* not nan"),
        (["--temperature-end", "inf"], "temperature .* not inf"),
        (["--cfg-scale", "nan"], "guidance scale .* not nan"),
        (["--top-p", "1.1"], "top_p is 0 to 1, not 1.1"),
        (["--top-p", "nan"], "top_p .* not nan"),
        (["--top-k", "-3"], "top_k is 0 .* not -3"),
        (["--min-p", "2"], "min_p"),
        (["--cfg-power", "0"], "0"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling_options(arguments(*flags))
    assert sampling_options(arguments("--min-p", "0.1"))["min_p"] == 0.1


@pytest.mark.parametrize("seed", ["-1", "1.5", "x", ""])
def test_a_seed_is_a_whole_number(seed, capsys):
    with pytest.raises(SystemExit):
        arguments("--seed", seed)
    assert f"argument --seed: a seed is a whole number, 0 or more, not {seed!r}" in capsys.readouterr().err


def names_of(args):
    return ClassNames(args.num_classes, args.class_names)


def test_classes_by_number_and_name(tmp_path):
    (tmp_path / "names.json").write_text('["cat", "dog", "2"]')
    flags = ["--class-names", str(tmp_path / "names.json"), "--images-per-class", "2", "--class-labels"]
    args = arguments(*flags, "dog", "0", "2", "4")
    assert class_ids(args, names_of(args)) == [1, 1, 0, 0, 2, 2, 4, 4]
    for label, message in [("dgo", r"'dgo'; did you mean 'dog' \(1\)"), ("bird", "or a name of .*names.json"),
                           ("5", r"class 5 is out of range.* 0 \.\. 4")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            names_of(args).find(label)
    with pytest.raises(ValueError, match=r"unknown class 'dog'.*give --class-names"):
        ClassNames(5).find("dog")
    (tmp_path / "names.json").write_text('{"cat": 0}')
    with pytest.raises(ValueError, match="JSON list"):
        names_of(args)


def test_imagenet_classes_by_name():
    names = ClassNames(1000)
    assert [names.find(text) for text in ("golden retriever", "Golden Retriever", "red panda", "otter", "974")] == [
        207, 207, 387, 360, 974,
    ]  # fmt: skip
    assert names.name(88) == "macaw"
    assert names.find("crane") == 517 and names.find("crane bird") == 134
    for text, message in [
        ("panda", r"387 \(lesser panda\) or 388 \(giant panda\)"),
        ("goldn retriever", r"did you mean 'golden retriever' \(207\)"),
        ("cat", r"did you mean .*'tiger cat' \(282\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            names.find(text)

"""What is said of the data before a training begins."""

import logging
import math

import numpy as np
import pytest
import torch

from autoregressive.train.inputs import make_inputs
from autoregressive.train.sanity import check_codes, describe_codes, overlap
from autoregressive.train.train_c2i import parser
from dataset.codes import CodeFolder, write_codes
from tests.autoregressive.train.stores import C2I, T2I, TOKENS, VOCABULARY, caption_codes, class_codes
from tools.convert_codes import convert

CPU = torch.device("cpu")


def said(caplog, args, codes, held_out=None):
    logger = logging.getLogger("sanity")
    with caplog.at_level(logging.INFO):
        check_codes(args, codes, held_out, logger)
    return caplog.text


def codes_of(folder, *flags):
    args = parser().parse_args([*C2I, *flags, "--code-path", str(folder)])
    return args, make_inputs(args, CPU).codes(args.code_path)


def test_what_to_expect_of_the_loss():
    tokens = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 2]])  # shares 3/8, 2/8, 3/8
    entropy = -(3 / 8 * math.log(3 / 8) * 2 + 2 / 8 * math.log(2 / 8))
    line = describe_codes(tokens, 100, 16384)
    assert "2 of 100 images" in line and "3 of 16,384 codes" in line and "ln 16384 = 9.704" in line
    assert f"is at {entropy:.3f}" in line and "is the tokenizer trained?" in line
    assert "WARNING" not in describe_codes(tokens, 100, 4)


def test_codes_labels_and_no_overlap(tmp_path, caplog):
    args, codes = codes_of(class_codes(tmp_path / "train"))
    text = said(caplog, args, codes, codes_of(class_codes(tmp_path / "val", seed=1))[1])
    assert "looked at 7 of 7 images" in text and "ln 64 = 4.159" in text
    assert "Labels: 0 to 2, 3 different ones" in text
    assert "0 of 7 held-out images compared" in text and "WARNING" not in text


def test_images_on_both_sides_are_found_in_any_view(tmp_path, caplog):
    args, train = codes_of(class_codes(tmp_path / "train"))
    folder = CodeFolder.named(class_codes(tmp_path / "val", seed=1, count=3), "imagenet", 16)
    views = train.source.read(4)[0][0]
    write_codes(folder, 3, views[::-1].copy(), 1)  # its first view is the second one there
    _, held_out = codes_of(tmp_path / "val")
    assert overlap(train, held_out) == (1, 4)
    assert "WARNING: 1 of 4 held-out images" in said(caplog, args, train, held_out)


def test_the_same_store_on_both_sides_and_a_wrong_number_of_classes(tmp_path, caplog):
    convert(class_codes(tmp_path / "files"), tmp_path / "packed", "packed", VOCABULARY, 5)
    args, codes = codes_of(tmp_path / "packed")
    codes.source.manifest |= {"source_sha256": "abc", "classes": ["a", "b", "c", "d"]}
    text = said(caplog, args, codes, codes)
    assert "of the same images" in text and "WARNING: 7 of 7" in text
    assert "the codes are of 4 classes, --num-classes is 3" in text


def test_codes_outside_the_vocabulary_are_refused(tmp_path, caplog):
    folder = class_codes(tmp_path / "train", count=600)  # more than the data set itself looks at when it is opened
    args, codes = codes_of(folder)
    broken = np.full((2, TOKENS), VOCABULARY)
    write_codes(CodeFolder.named(folder, "imagenet", 16), 301, broken, 0)
    with pytest.raises(ValueError, match=r"must hold values of 0 to 63, found 64"):
        said(caplog, args, codes)


def test_captioned_codes(tmp_path, caplog):
    code_path, features = caption_codes(tmp_path, count=200)
    flags = ["--code-path", str(code_path)]
    args = parser().parse_args([*T2I, *flags, "--dataset", "t2i_code"])
    args.t5_feat_path = str(features)
    codes = make_inputs(args, CPU).codes(args.code_path)
    text = said(caplog, args, codes, codes)
    assert "looked at 200 of 200" in text and "WARNING: 200 of 200" in text and "Labels" not in text

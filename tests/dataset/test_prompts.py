"""Files of prompts."""

import json

import pytest

from dataset.prompts import read_prompts


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_plain_text(tmp_path):
    file = write(tmp_path, "a.txt", "a cat\n\n  two dogs \nx\u2028y\n")
    assert read_prompts(file) == ["a cat", "two dogs", "x\u2028y"]


def test_parti_layout_keeps_the_quotation_marks_of_a_leading_word(tmp_path):
    text = 'Prompt\tCategory\n"Hello" on a wall, red\tArts\na cat\tAnimals\n"a ""sign"" here"\tArts\n'
    assert read_prompts(write(tmp_path, "P.tsv", text)) == ['"Hello" on a wall, red', "a cat", 'a "sign" here']


def test_coco_layout_is_one_column_with_commas_in_it(tmp_path):
    text = "Prompt\na man, a plan\na cat\n"
    assert read_prompts(write(tmp_path, "coco_captions.csv", text)) == ["a man, a plan", "a cat"]


def test_other_tables(tmp_path):
    assert read_prompts(write(tmp_path, "a.csv", 'id,caption\n1,"a man, a plan"\n')) == ["a man, a plan"]
    lines = "\n".join(json.dumps({"text": t}) for t in ("one", ["two", "long"], []))
    assert read_prompts(write(tmp_path, "a.jsonl", lines)) == ["one", "two", ""]


def test_errors_name_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="PartiPrompts"):
        read_prompts(tmp_path / "PartiPrompts.tsv")
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\]; expected one of Prompt"):
        read_prompts(write(tmp_path, "a.csv", "a,b\n1,2\n"))
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(write(tmp_path, "b.txt", "\n\n"))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_prompts(tmp_path / "c.txt")

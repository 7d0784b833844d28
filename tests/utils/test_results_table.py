"""Tables of results: several writers, new columns, hostile values."""

import subprocess
import sys

import pytest

from tests.commands.shell import ROOT, environment
from utils.results_table import append_row, commit_of, markdown_table, read_table


def test_rows_come_one_after_another(tmp_path):
    table = tmp_path / "new/table.csv"
    append_row(table, {"model": "GPT-B", "FID": 3.14159265, "note": None}, ["model", "FID"])
    shown = append_row(table, {"model": "GPT-L", "FID": 2}, ["model", "FID"])
    assert read_table(table) == (
        ["model", "FID", "note"],
        [{"model": "GPT-B", "FID": "3.14159", "note": ""}, {"model": "GPT-L", "FID": "2", "note": ""}],
    )
    assert shown.read_text() == "| model | FID |\n| --- | --- |\n| GPT-B | 3.14159 |\n| GPT-L | 2 |\n"


def test_new_columns_are_added_and_old_ones_stay(tmp_path):
    append_row(tmp_path / "t.csv", {"FID": 3.0}, ["FID", "KD-lite0"])
    append_row(tmp_path / "t.csv", {"KD-lite0": 0.5}, ["FID", "KD-lite0"])
    columns, rows = read_table(tmp_path / "t.csv")
    assert columns == ["FID", "KD-lite0"]
    assert [list(row.values()) for row in rows] == [["3", ""], ["", "0.5"]]
    assert (tmp_path / "t.md").read_text().splitlines()[2:] == ["| 3 |  |", "|  | 0.5 |"]


def test_values_cannot_break_the_table(tmp_path):
    nasty = 'a,b "quoted" | pipe\nsecond line'
    append_row(tmp_path / "t.csv", {"note": nasty, "n": 1}, ["note", "n"])
    append_row(tmp_path / "t.csv", {"note": "plain", "n": 2}, ["note", "n"])
    assert [row["note"] for row in read_table(tmp_path / "t.csv")[1]] == [nasty, "plain"]
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert len(lines) == 4 and lines[2] == '| a,b "quoted" \\| pipe second line | 1 |'


def test_several_processes_lose_no_row(tmp_path):
    program = (
        "import sys; from utils.results_table import append_row\n"
        "for i in range(20): append_row(sys.argv[1], {'who': sys.argv[2], 'i': i}, ['who', 'i'])"
    )
    line = [sys.executable, "-c", program, str(tmp_path / "t.csv")]
    writers = [subprocess.Popen([*line, name], cwd=ROOT, env=environment()) for name in "abc"]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    rows = read_table(tmp_path / "t.csv")[1]
    assert sorted((row["who"], int(row["i"])) for row in rows) == [(w, i) for w in "abc" for i in range(20)]


@pytest.mark.parametrize("content", ["", "a,b\n1\n", "a,b\n1,2,3\n"])
def test_a_file_that_is_no_table_is_left_alone(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match="is not a table of results"):
        append_row(tmp_path / "t.csv", {"a": 1}, ["a"])
    assert (tmp_path / "t.csv").read_text() == content


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a \.csv"):
        append_row(tmp_path / "t.md", {"a": 1}, ["a"])


def test_markdown_of_no_rows():
    assert markdown_table(["a", "b"], []) == "| a | b |\n| --- | --- |\n"


def test_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    assert commit_of(tmp_path) == "unknown"
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    clean = commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{clean}+changes"

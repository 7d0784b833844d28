"""Notes of settings: what is compared, what is refused, and when a folder is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import in_processes
from utils.claim import agrees, claim, claim_folder
from utils.distributed import process_group
from utils.files import read_json, write_json

SETTINGS = {"size": 8, "seed": 0}


def test_a_setting_more_or_less_or_another_is_a_difference(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert not agrees(record, SETTINGS, "here are codes", "one")
    write_json(record, SETTINGS)
    assert agrees(record, SETTINGS, "here are codes", "one")
    for settings, said in (
        ({"size": 8, "seed": 1}, r"seed \(0, now 1\)"),
        ({"size": 8, "seed": 0, "crop": True}, r"crop \(None, now True\)"),
        ({"size": 8}, r"seed \(0, now None\)"),
        ({"size": 9, "seed": 2}, r"size \(8, now 9\) and seed \(0, now 2\)"),
    ):
        with pytest.raises(ValueError, match=rf"here are codes made with another {said}; remove .* another --to"):
            agrees(record, settings, "here are codes", "--to")
    assert agrees(record, {"size": 8, "seed": 1}, "", "", unchecked=["seed"])
    assert agrees(record, {"size": 8}, "", "", unchecked=["seed"])
    write_json(record, ["no settings"])
    with pytest.raises(ValueError, match=r"size \(None, now 8\)"):
        agrees(record, SETTINGS, "", "")


def test_long_values_are_cut(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", {"names": ["cat"] * 1000})
    with pytest.raises(ValueError, match=r"names \(\['cat'.* \.\.\., now \[\]\)") as caught:
        agrees(tmp_path / "record.json", {"names": []}, "", "")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("place", ["in", "beside"])
def test_a_folder_is_free_until_it_has_files(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "set"
    record = folder / "set.json" if place == "in" else tmp_path / "set.json"
    for size in (1, 2):  # nothing was made with the first settings
        claim_folder(folder, record, {"size": size}, "pictures")
        assert read_json(record) == {"size": size}
    folder.mkdir(exist_ok=True)
    (folder / "0.png").touch()
    claim_folder(folder, record, {"size": 2}, "pictures")
    with pytest.raises(ValueError, match=r"set holds pictures made with another size \(2, now 3\)"):
        claim_folder(folder, record, {"size": 3}, "pictures")
    assert read_json(record) == {"size": 2}
    record.unlink()
    with pytest.raises(ValueError, match=r"set\.json is missing"):
        claim_folder(folder, record, {"size": 2}, "pictures")
    assert not record.exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(ValueError, match="give another folder"):
        claim_folder(tmp_path / "set", tmp_path / "set" / "set.json", SETTINGS, "pictures")
    assert (tmp_path / "set").read_text() == "mine"


def _claim_twice(folder: Path) -> list[str]:
    said = []
    with process_group("cpu"):
        for settings in (SETTINGS, {"size": 9, "seed": 0}):
            try:
                claim(folder / "record.json", settings, "codes", "--to")
            except ValueError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_all_processes_hear_of_the_difference(tmp_path: Path, world: int) -> None:
    said = in_processes(world, _claim_twice, tmp_path)
    expected = f"{tmp_path} holds codes made with another size (8, now 9); remove the folder or give another --to"
    assert said == [[expected]] * world
    assert read_json(tmp_path / "record.json") == SETTINGS

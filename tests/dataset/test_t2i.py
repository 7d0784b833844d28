"""Caption lists and the text-to-image readers."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset.augmentation import eval_transform
from dataset.build import build_dataset
from dataset.codes import caption_codes_path, write_array
from dataset.lists import CAPTION_KEYS, CaptionLists, list_files
from dataset.t2i import ListedImages, Text2ImgDataset, left_padded, prefix_mask
from tests import golden
from tests.dataset.test_images import grey
from tools.convert_codes import pack_captions

DIM = 16


def keys(records: CaptionLists) -> list[list]:
    return [[record.image_path, record.stem, record.line] for record in records]


def write_list(path: Path, lines: list[str | dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def small_set(tmp_path: Path, save_image: Callable[..., Path]) -> Namespace:
    """Ten images in list `a`, with features of line + 1 tokens and value line, in 12 rows."""
    lines = []
    for line in range(10):
        image = save_image(tmp_path / "images" / f"{line}.png", grey=10 * line, size=(40, 33))
        lines.append({"image_path": str(image), "text": [f"caption {line}"]})
        save_features(tmp_path / "long" / "a" / f"{line}.npy", tokens=line + 1, value=line + 1)
    write_list(tmp_path / "lists" / "a.jsonl", lines)
    return Namespace(
        dataset="t2i",
        data_path=str(tmp_path / "lists"),
        t5_feat_path=str(tmp_path / "long"),
        short_t5_feat_path=None,
        image_size=32,
        downsample_size=16,
        cls_token_num=12,
        caption_dim=DIM,
    )


def save_features(path: Path, tokens: int, value: float, dim: int = DIM) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full((1, tokens, dim), value, np.float32))


def valid(dataset: Text2ImgDataset) -> list[int]:
    return [int(dataset[index][3]) for index in range(len(dataset))]


# ---- lists


@golden.cases("data.t2i_lists")
def test_lists(case: golden.Case, golden_folder: Path) -> None:
    params, captions = case.params, {}
    piece = CaptionLists(list_files(params["data_path"], params["start"], params["end"]))
    for key in CAPTION_KEYS:
        for truncated in (False, True):
            name = f"{key}/trunc" if truncated else key
            captions[name] = [[r.caption(key, truncated), r.stem, r.line] for r in piece]
    args = Namespace(dataset="t2i_image", data_path=params["data_path"], data_face_path=params["face_path"])
    images = ListedImages(piece, eval_transform(40))
    case.check(
        {
            "captions": captions,
            "extract_codes": keys(piece),
            "extract_codes_item0": {
                "code_dir": piece[0].stem,
                "code_name": images[0][1],
                "image_shape": [3, *ListedImages(piece)[0][0].size[::-1]],
            },
            "t2i_image": keys(build_dataset(args, transform=eval_transform(32)).records),
        }
    )


def test_blank_lines_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    write_list(tmp_path / "a.jsonl", ["", {"image_path": "x"}, "   ", {"image_path": "Ü"}, ""])
    assert keys(CaptionLists(list_files(tmp_path))) == [["x", "a", 1], ["Ü", "a", 3]]


def test_a_last_line_without_an_end_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"image_path": "x"}\r\n\r\n{"image_path": "y"}')
    assert keys(CaptionLists(list_files(tmp_path))) == [["x", "a", 0], ["y", "a", 2]]


def test_lists_that_differ_after_the_first_dot_are_kept_apart(tmp_path: Path) -> None:
    write_list(tmp_path / "part.0002.jsonl", [{"image_path": "y"}])
    write_list(tmp_path / "part.0001.jsonl", [{"image_path": "x"}])
    assert keys(CaptionLists(list_files(tmp_path))) == [["x", "part.0001", 0], ["y", "part.0002", 0]]


def test_lists_of_the_same_name_are_refused(tmp_path: Path) -> None:
    for folder in ("main", "faces"):
        write_list(tmp_path / folder / "a_face.jsonl", [{"image_path": "x"}])
    args = Namespace(dataset="t2i_image", data_path=tmp_path / "main", data_face_path=tmp_path / "faces")
    with pytest.raises(ValueError, match="would share the features and codes of 'a_face'"):
        build_dataset(args, transform=None)


@pytest.mark.parametrize("line", ["{", "[1]", '"x"', '{"text": []}', "1"])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    records = CaptionLists([write_list(tmp_path / "a.jsonl", [{"image_path": "x"}, line])])
    assert records[0].image_path == "x"
    with pytest.raises(ValueError, match=r"a\.jsonl line 1: expected a JSON object"):
        records[1]


def test_missing_captions_are_named(tmp_path: Path) -> None:
    records = CaptionLists(
        [write_list(tmp_path / "a.jsonl", [{"image_path": "x", "text": ["one"]}, {"image_path": "x"}])]
    )
    assert records[0].caption("blip") == "one"
    with pytest.raises(ValueError, match=r"line 0: 'text' has no entry 1 \(caption key llava\)"):
        records[0].caption("llava")
    with pytest.raises(ValueError, match="line 1: 'text' has no entry 0"):
        records[1].caption("blip")


def test_missing_lists(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \.jsonl lists in"):
        list_files(tmp_path)
    path = write_list(tmp_path / "a.jsonl", [""])
    with pytest.raises(ValueError, match="at places 1 to 2"):
        list_files(tmp_path, 1, 2)
    with pytest.raises(ValueError, match="no records"):
        CaptionLists([path])


def test_images_beside_their_list_are_found(
    tmp_path: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_image(tmp_path / "data" / "x.png", grey=7)
    records = CaptionLists([write_list(tmp_path / "data" / "a.jsonl", [{"image_path": "x.png"}])])
    assert grey(ListedImages(records)[0][0]) == 7
    save_image(tmp_path / "x.png", grey=9)
    monkeypatch.chdir(tmp_path)
    assert grey(ListedImages(records)[0][0]) == 9  # the path as it stands comes first


def test_listed_images_need_no_face_path(small_set: Namespace) -> None:
    dataset = build_dataset(Namespace(dataset="t2i_image", data_path=small_set.data_path), transform=eval_transform(8))
    image, line = dataset[3]
    assert (grey(image), line, type(line)) == (30, 3, int)


# ---- features and masks


@golden.cases("data.t2i_dataset")
def test_reader(case: golden.Case, golden_folder: Path) -> None:
    params = case.params
    args = Namespace(
        data_path=params["data_path"],
        t5_feat_path=params["t5_feat_path"],
        short_t5_feat_path=params["short_t5_feat_path"],
        image_size=params["image_size"],
        downsample_size=params["downsample_size"],
    )
    dataset = Text2ImgDataset(args, eval_transform(params["image_size"]), max_bad_share=0.5)
    torch.manual_seed(params["seed"])
    outputs, items = {"list": keys(dataset.records)}, []
    for place, index in enumerate(params["order"]):
        image, features, mask, is_valid = dataset[index]
        outputs |= {f"item{place}.image": image, f"item{place}.attn_mask": mask}
        outputs[f"item{place}.feat_last8rows_first16"] = features[:, -8:, :16]
        items.append(
            {
                "index": index,
                "valid": int(is_valid),
                "valid_dtype": str(is_valid.dtype),
                "feat_shape": list(features.shape),
                "feat_dtype": str(features.dtype),
                "nonzero_rows": int((features[0] != 0).any(dim=1).sum()),
                "feat_sha256": hashlib.sha256(features.numpy().tobytes()).hexdigest(),
                "mask_shape": list(mask.shape),
                "mask_dtype": str(mask.dtype),
            }
        )
    case.check(outputs | {"items": items})


def test_mask_of_a_short_caption() -> None:
    mask = prefix_mask(376, num_padding=115)
    assert mask.shape == (1, 376, 376) and mask.dtype == torch.bool
    assert [int(mask[0, row].sum()) for row in (119, 120, 375, 3)] == [5, 6, 261, 1]


@given(st.integers(1, 12), st.data())
def test_mask_is_causal_and_hides_padding(num_tokens: int, data: st.DataObject) -> None:
    padding = data.draw(st.integers(0, num_tokens))
    mask = prefix_mask(num_tokens, padding)[0]
    for row in range(num_tokens):
        for column in range(num_tokens):
            assert mask[row, column] == (row == column or padding <= column <= row)


@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
def test_left_padding_keeps_the_first_tokens(tokens: int) -> None:
    features = torch.arange(1.0, tokens + 1)[:, None]
    padded = left_padded(features, 5)
    kept = list(range(1, min(tokens, 5) + 1))
    assert padded.dtype == torch.float32
    assert padded.flatten().tolist() == [0.0] * (5 - len(kept)) + kept


def test_items_of_another_text_encoder(small_set: Namespace) -> None:
    image, features, mask, is_valid = build_dataset(small_set, transform=eval_transform(32))[4]
    assert features.shape == (1, 12, DIM) and mask.shape == (1, 16, 16) and int(is_valid) == 1
    assert features[0, :, 0].tolist() == [0.0] * 7 + [5.0] * 5
    assert grey(image) == 40


@pytest.mark.parametrize("ending", ["", "/"])
def test_short_features_may_lie_anywhere(small_set: Namespace, tmp_path: Path, ending: str) -> None:
    """The name of the long tree occurs twice in its path, the short tree has another parent."""
    for line in range(10):
        save_features(tmp_path / "long_x" / "long" / "a" / f"{line}.npy", tokens=2, value=1)
        save_features(tmp_path / "elsewhere" / "deep" / "short" / "a" / f"{line}.npy", tokens=1, value=2)
    small_set.t5_feat_path = str(tmp_path / "long_x" / "long") + ending
    small_set.short_t5_feat_path = str(tmp_path / "elsewhere" / "deep" / "short") + ending
    dataset = build_dataset(small_set, transform=eval_transform(32))
    torch.manual_seed(0)
    items = [dataset[number % 10] for number in range(300)]
    assert all(int(item[3]) == 1 for item in items)
    assert 65 < sum(float(item[1][0, -1, 0]) == 2 for item in items) < 115  # 30 % of 300


def test_a_wrong_feature_path_is_found_at_once(small_set: Namespace, tmp_path: Path) -> None:
    small_set.t5_feat_path = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no text features of the list 'a'.*nowhere"):
        build_dataset(small_set, transform=eval_transform(32))
    small_set.t5_feat_path, small_set.short_t5_feat_path = str(tmp_path / "long"), str(tmp_path / "short")
    with pytest.raises(FileNotFoundError, match="short"):
        build_dataset(small_set, transform=eval_transform(32))


def test_missing_features_are_counted_and_stop_the_run(small_set: Namespace, tmp_path: Path) -> None:
    for line in (2, 7):
        (tmp_path / "long" / "a" / f"{line}.npy").unlink()
    dataset = Text2ImgDataset(small_set, eval_transform(32), max_bad_share=0.2)
    assert valid(dataset) == valid(dataset) == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    assert dataset.bad.indices() == [2, 7]
    with pytest.raises(ValueError, match=r"1 of 10 items cannot be read.*2\.npy"):
        valid(build_dataset(small_set, transform=eval_transform(32)))


def test_invalid_items_are_zeros_with_a_causal_mask(small_set: Namespace, tmp_path: Path) -> None:
    (tmp_path / "images" / "0.png").write_bytes(b"broken")
    image, features, mask, is_valid = Text2ImgDataset(small_set, eval_transform(32), max_bad_share=0.1)[0]
    assert image.shape == (3, 32, 32) and not image.any()
    assert features.shape == (1, 12, DIM) and not features.any()
    assert torch.equal(mask[0], torch.ones(16, 16).tril().bool())
    assert is_valid.dtype == torch.int64 and is_valid.shape == () and int(is_valid) == 0


def test_small_images_are_left_out_without_being_counted(
    small_set: Namespace, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    for line in range(5):
        save_image(tmp_path / "images" / f"{line}.png", size=(31, 80))
    dataset = build_dataset(small_set, transform=eval_transform(32))
    assert valid(dataset) == [0] * 5 + [1] * 5
    assert dataset.bad.indices() == []


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 0, DIM), np.float32),
        np.zeros((1, 3, DIM + 1), np.float32),
        np.zeros((3, DIM), np.float32),
        np.zeros((2, 3, DIM), np.float32),
        np.zeros((1, 3, DIM), np.int64),
        np.full((1, 3, DIM), np.nan, np.float32),
        np.array([None], dtype=object),
    ],
    ids=["no tokens", "other width", "two axes", "two captions", "integers", "nan", "pickled"],
)
def test_bad_features_make_the_item_invalid(small_set: Namespace, tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "long" / "a" / "5.npy", array, allow_pickle=True)
    dataset = Text2ImgDataset(small_set, eval_transform(32), max_bad_share=0.1)
    assert int(dataset[5][3]) == 0 and dataset.bad.indices() == [5]
    with pytest.raises(ValueError, match=r"5\.npy"):
        build_dataset(small_set, transform=eval_transform(32))[5]


# ---- codes


@pytest.fixture
def code_set(small_set: Namespace, tmp_path: Path) -> Namespace:
    """Codes for six lines of list `a`; each token of line n is n."""
    for line in (0, 1, 2, 3, 9, 10):
        write_array(caption_codes_path(tmp_path / "codes", "a", line), np.full((1, 4), line))
    save_features(tmp_path / "long" / "a" / "10.npy", tokens=1, value=11)
    small_set.dataset, small_set.code_path = "t2i_code", str(tmp_path / "codes")
    return small_set


def test_codes_with_features(code_set: Namespace) -> None:
    dataset = build_dataset(code_set)
    assert len(dataset) == 6
    for index, line in enumerate((0, 1, 2, 3, 9, 10)):  # in the order of the numbers, not of their texts
        codes, features, mask, is_valid = dataset[index]
        assert codes.dtype == torch.int64 and codes.tolist() == [[line] * 4]
        assert float(features[0, -1, 0]) == line + 1
        assert mask.shape == (1, 16, 16) and int(is_valid) == 1


def test_packed_codes_give_the_same_items(code_set: Namespace, tmp_path: Path) -> None:
    pack_captions([tmp_path / "codes" / "a"], tmp_path / "packed", codebook_size=64, shard_size=4)
    files = build_dataset(code_set)
    code_set.code_path = str(tmp_path / "packed")
    packed = build_dataset(code_set)
    assert packed.keys == files.keys and len(packed) == 6
    for index in range(6):
        assert all(torch.equal(a, b) for a, b in zip(files[index], packed[index]))
    code_set.image_size = 48
    with pytest.raises(ValueError, match="4 codes an image, expected 9"):
        build_dataset(code_set)


def test_one_of_several_views_is_drawn_by_the_seed(code_set: Namespace) -> None:
    dataset = build_dataset(code_set)
    dataset.codes = SimpleNamespace(views=3, read=lambda stem, line, size, view: np.full((1, 4), view))
    views = []
    for seed in range(30):
        torch.manual_seed(seed)
        views.append(int(dataset[0][0][0, 0]))
    assert set(views) == {0, 1, 2}
    torch.manual_seed(7)
    assert int(dataset[0][0][0, 0]) == views[7]


def test_bad_codes_are_counted(code_set: Namespace, tmp_path: Path) -> None:
    code_set.vocab_size = 10
    dataset = build_dataset(code_set)
    assert int(dataset[4][3]) == 1
    with pytest.raises(ValueError, match=r"10\.npy must hold values of 0 to 9"):
        dataset[5]
    write_array(tmp_path / "codes" / "a" / "0.npy", np.zeros((1, 9)))
    with pytest.raises(ValueError, match=r"0\.npy must have the shape \(1, 4\), found \(1, 9\)"):
        build_dataset(code_set)[0]


def test_missing_codes(code_set: Namespace, tmp_path: Path) -> None:
    for empty in ("nowhere", "images"):
        code_set.code_path = str(tmp_path / empty)
        with pytest.raises(FileNotFoundError, match=r"no code files .*extract_codes_t2i\.py"):
            build_dataset(code_set)
    write_array(tmp_path / "more" / "b" / "0.npy", np.zeros((1, 4)))
    code_set.code_path = str(tmp_path / "more")
    with pytest.raises(FileNotFoundError, match="no text features of the list 'b'"):
        build_dataset(code_set)

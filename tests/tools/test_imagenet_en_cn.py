"""ImageNet's classes in English and Chinese."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.imagenet_names import imagenet_names, imagenet_synonyms
from tools import imagenet_en_cn

ROOT = Path(__file__).resolve().parents[2]

# From the English name that torchvision gives to what must stand in the brackets; from all parts of the list.
KNOWN = {
    "great white shark": "大白鲨",
    "robin": "旅鸫",
    "bulbul": "鹎",
    "toucan": "巨嘴鸟",
    "koala": "考拉",
    "king penguin": "王企鹅",
    "Pekinese": "北京犬",
    "golden retriever": "金毛寻回犬",
    "Tibetan mastiff": "藏獒",
    "cheetah": "猎豹",
    "dung beetle": "蜣螂",
    "lesser panda": "小熊猫",
    "giant panda": "大熊猫",
    "abacus": "算盘",
    "cello": "大提琴",
    "gong": "锣",
    "iPod": "iPod音乐播放器",
    "oboe": "双簧管",
    "jinrikisha": "人力车",
    "sports car": "跑车",
    "sundial": "日晷",
    "yurt": "蒙古包",
    "hot pot": "火锅",
    "pomegranate": "石榴",
    "volcano": "火山",
    "toilet tissue": "卫生纸",
}


def split(value: str) -> tuple[str, str]:
    """The English and the Chinese part of a value."""
    match = re.fullmatch(r"(.+) \[([^\[\]]+)\]", value)
    assert match, value
    return match[1], match[2]


def test_every_class_has_a_value_of_its_own() -> None:
    from tools.imagenet_en_cn import IMAGENET_1K_CLASSES

    assert type(IMAGENET_1K_CLASSES) is dict
    assert list(IMAGENET_1K_CLASSES) == list(range(1000))
    assert len(set(IMAGENET_1K_CLASSES.values())) == 1000
    assert IMAGENET_1K_CLASSES[0] == "tench, Tinca tinca [丁鱥]"


def test_english_is_wordnets() -> None:
    for class_id, value in imagenet_en_cn.IMAGENET_1K_CLASSES.items():
        assert split(value)[0].split(", ") == imagenet_synonyms()[class_id]


def test_chinese_names_are_chinese_and_distinct() -> None:
    chinese = [split(value)[1] for value in imagenet_en_cn.IMAGENET_1K_CLASSES.values()]
    assert len(set(chinese)) == 1000
    for name in chinese:
        assert re.search(r"[\u4e00-\u9fff\u4d00-\u4dbf]", name), name
        assert name == "".join(name.split()), name


def test_the_files_ids_are_its_line_numbers() -> None:
    lines = (ROOT / "dataset" / "imagenet_chinese.txt").read_text(encoding="utf-8").splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1000))


@pytest.mark.parametrize("english", KNOWN)
def test_known_translations(english: str) -> None:
    """Looked up by name in another package's list, so that a line out of place shows."""
    class_id = imagenet_names().index(english)
    assert split(imagenet_en_cn.IMAGENET_1K_CLASSES[class_id])[1] == KNOWN[english]


@pytest.mark.parametrize(
    ("class_id", "english", "chinese"),
    [(134, "crane", "鹤"), (517, "crane", "起重机"), (638, "maillot", "紧身连体衣"), (639, "maillot", "连体泳衣")],
)
def test_classes_of_one_english_name(class_id: int, english: str, chinese: str) -> None:
    found = split(imagenet_en_cn.IMAGENET_1K_CLASSES[class_id])
    assert (found[0].split(", ")[0], found[1]) == (english, chinese)


def test_importing_the_module_is_cheap_and_other_names_are_unknown() -> None:
    """It leaves timm and torch alone until the dictionary is asked for."""
    lazy = "import sys, tools.imagenet_en_cn; print({'timm', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", lazy], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "set()\n"
    with pytest.raises(AttributeError, match="IMAGENET_2K_CLASSES"):
        _ = imagenet_en_cn.IMAGENET_2K_CLASSES

"""Caption cleaning for the T5 encoder, after the DeepFloyd-IF recipe.

The released text-to-image weights saw captions cleaned exactly like this, oddities included ("pngs" becomes
"s", "3.5x4 meters" becomes "3. meters"), so every rule and the order of the rules are part of the model.
"""

from __future__ import annotations

import html
import re
import urllib.parse
import warnings

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_ADDRESS = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
_LINK = r"\b(?:%s:(?:/{1,3}|[a-zA-Z0-9%%])|" + _ADDRESS + ")"
_EXTENSION = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"

_LINKS = _rules(
    (r"<person>", "person"),
    (_LINK % "https?", ""),
    (_LINK % "www", ""),
)

_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # user names
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed and compatibility letters, hexagrams, ideographs
    (
        r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
        r"\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # the time that ends an article number
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"\S+\." + _EXTENSION, ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

_CATALOGUE = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b" + _EXTENSION + r"(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # 1920x1080
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)

_ENDS = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

_JOINERS = re.compile(r"[-_]")
_MOST_JOINERS = 3  # a caption with more hyphens and underscores is a file name


def clean_caption(text: object) -> str:
    """The caption as the text encoder of the released models saw it: the whole pipeline, applied twice.

    Takes any object and uses its `str`; returns lower-case text that may be empty.
    """
    return _clean_once(_clean_once(str(text)))


def _clean_once(text: str) -> str:
    import ftfy  # here, so that everything that cleans no captions does without the package

    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _apply(_LINKS, text)
    text = _text_of_html(text)
    text = _apply(_CHARACTERS, text)
    if len(_JOINERS.findall(text)) > _MOST_JOINERS:
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_ENDS, _apply(_CATALOGUE, text)).strip()


def _text_of_html(text: str) -> str:
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning  # here, as ftfy is

    # A caption that is only a link or a file name is still a caption.
    warnings.filterwarnings("ignore", category=MarkupResemblesLocatorWarning)
    return BeautifulSoup(text, features="html.parser").text


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text

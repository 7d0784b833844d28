"""Caption cleaning, to the letter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from language.text_cleaning import clean_caption
from tests import golden

ROOT = Path(__file__).parents[2]

# what the established system makes of each caption
PAIRS = [
    ("A photo of a <person> riding a horse", "a photo of a person riding a horse"),
    ("Visit https://example.com/a?b=c now!", "visit ?b=c now!"),
    ("visit www.foo.com today", "visit today"),
    ("<b>bold</b> cat &amp; dog &quot;hi&quot;", 'bold cat dog "hi"'),
    ("@nick hello @bob", "hello"),
    ("你好 cat 猫", "cat"),
    ("dash — em – en ‐ hyphen", "dash - em - en - hyphen"),
    ("“quoted” text", '"quoted" text'),
    ("'single quoted'", "single quoted"),
    ('"double quoted"', "double quoted"),
    ("192.168.0.1 server", "server"),
    ("time 3:45 ", "time 3:45"),
    ("line\\nbreak", "line break"),
    ("#123 #12345 1234567 and 12345", "and 12345"),
    ("photo.jpg file", "file"),
    ("a...b", "a b"),
    ("wow!!! (paren) [br] {x} | \\ / * ", "wow!!! paren br x"),
    ("this-is-my-cute-cat-photo", "this is my cute cat photo"),
    ("a_b_c_d_e f", "a b c d e f"),
    ("jc6640 cat", "cat"),
    ("jc6640vc cat", "cat"),
    ("6640vc231 x", "x"),
    ("free shipping worldwide free shipping", ""),
    ("free download free", ""),
    ("click for more click on me", ""),
    ("png image of cat", "of cat"),
    ("page 3 of", "of"),
    ("j2d1a2a thing", "thing"),
    ("1920x1080 wallpaper", "wallpaper"),
    ("a : b", "a: b"),
    ("hello,world.foo", "hello, world. foo"),
    ("A dog. A cat.", "a dog. a cat."),
    (".hidden", ""),
    ("100% cotton + more -", "100% cotton more"),
    ("A+B%20C", "a b c"),
    ("  spaces   here  ", "spaces here"),
    (" ends with colon:", "ends with colon"),
    ("A 3D render in 4k", "a 3d render in 4k"),
    ("rock&roll; x", "rock roll x"),
    ("shippingcontainer yard", "container yard"),
    ("a downloader app", "a er app"),
    ("pngs of cats", "s of cats"),
    ("3.5x2cm frame", "3.5x2cm frame"),
    ("5 х 7 and 5х7", "5 х 7 and"),
    ("10×15 print", "print"),
    ("cat_dog", "cat_dog"),
    ("well-known, up-to-date, state-of-the-art", "well known, up to date, state of the art"),
    ("-leading dash", "leading dash"),
    ("; semicolon first", "semicolon first"),
    ("text with emoji 😀 ok", "text with emoji 😀 ok"),
    ("naïve café", "naïve café"),
    ("1/2 cup", "1 2 cup"),
    ("a/b test", "a b test"),
    ("dr.smith", "dr. smith"),
    ("e.g. this", "e. g. this"),
    ("it's 5 o'clock", "it's 5 o'clock"),
    ("<3 love", "<3 love"),
    ("50% off & more", "50% off more"),
    ("user@example.com mail", "user mail"),
    ("xxx123456", ""),
    ("HTTP://A.ORG/path-1/ z", "z"),
    ("ftp://host.net/file", "ftp"),
    ("a  .  b", "a b"),
    ("''quoted''", "quoted"),
    ("U.S. map made out of sushi", "u. s. map made out of sushi"),
]


@golden.cases("text.clean")
def test_established_captions(case):
    texts = case.params["texts"]
    plain = [text.lower().strip() for text in texts]
    case.check({"cleaned": [clean_caption(text) for text in texts], "plain": plain})


@pytest.mark.parametrize(("caption", "cleaned"), PAIRS)
def test_pair(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_every_pair_is_there():
    assert len(PAIRS) == 65


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("caf&eacute; au lait", "café au lait"),
        ("%2B", ""),  # decoded to a plus, which the second application takes for a space
        ("ａ ｗｉｄｅ cat", "a wide cat"),  # ftfy narrows full-width letters
        ("x \u2018a\u2019 \u2015 \uff0d b", "x 'a' - - b"),  # each run of dashes becomes one hyphen
        ("a_b-c_d", "a_b-c_d"),  # three joiners stay
        ("a_b-c_d-e", "a b c d e"),  # four do not
        ("㐀䷀一 x", "x"),
        ("a #1234 b", "a 1234 b"),  # only 1-3 and 5 or more digits go with their sign
        ("name@site.com", "name"),
        (42, "42"),  # anything with a str()
    ],
)
def test_rule(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_captions_that_look_like_files_do_not_warn():
    program = "from language.text_cleaning import clean_caption as c; print(c('photo.html') + '|' + c('http://a.org/'))"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "photo. html|\n", "")


def test_samplers_start_without_the_packages_that_clean_captions():
    code = "import sys; sys.modules['ftfy'] = sys.modules['bs4'] = None; import autoregressive.serve.cards"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

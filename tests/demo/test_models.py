"""app.py's flags: every established one is accepted and means something."""

import subprocess
import sys

import pytest

import app
from autoregressive.serve import cards as cards_module
from autoregressive.serve.cards import Card, given_flags
from demo.asking import start_of
from demo.models import cards_of_server, page_cards
from tests.commands.shell import ROOT, environment

ESTABLISHED = (
    "--gpt-model GPT-B --gpt-type c2i --from-fsdp --cls-token-num 1 --precision bf16 --compile --vq-model VQ-8 "
    "--codebook-size 16384 --codebook-embed-dim 8 --downsample-size 8 --num-classes 1000 --cfg-scale 3.5 "
    "--cfg-interval 10 --seed 7 --top-k 500 --temperature 0.9 --top-p 0.8"
)
FILES = ["--gpt-ckpt", "c2i.pt", "--vq-ckpt", "vq.pt"]


def given(*flags):
    return given_flags(app.parser(), list(flags))


def test_every_established_flag_is_accepted_and_reaches_the_model():
    values = given(*ESTABLISHED.split(), *FILES)
    (card,) = page_cards({name: value for name, value in values.items() if name != "seed"})
    args, start = card.args, start_of(card, values["seed"])
    assert (args.gpt_model, args.vq_model, args.downsample_size, args.precision) == ("GPT-B", "VQ-8", 8, "bf16")
    assert args.compile and args.from_fsdp and args.cfg_interval == 10
    assert (start.cfg_scale, start.top_k, start.top_p, start.temperature, start.seed) == (3.5, 500, 0.8, 0.9, 7)


def test_established_defaults():
    (card,) = page_cards(given(*FILES))
    args = card.args
    assert (args.gpt_model, args.vq_model, args.image_size, args.num_classes) == ("GPT-XL", "VQ-16", 384, 1000)
    assert (args.cls_token_num, args.downsample_size, args.codebook_embed_dim) == (1, 16, 8)
    assert card.sampling == {"cfg_scale": 4.0, "top_k": 4000, "top_p": 1.0, "temperature": 1.0}
    assert page_cards(given(*FILES, "--gpt-model", "GPT-B"))[0].edge == 256
    assert page_cards(given(*FILES, "--gpt-model", "GPT-B", "--image-size", "384"))[0].edge == 384
    (of_texts,) = page_cards(given(*FILES, "--gpt-type", "t2i"))
    assert of_texts.kind == "t2i" and of_texts.args.cls_token_num == 120


def test_only_typed_flags_are_given():
    assert given() == {}
    assert given("--top-k", "4000") == {"top_k": 4000}


def test_the_bundled_models_take_flags_of_any_model(cards, monkeypatch):
    monkeypatch.setattr(cards_module, "bundled_cards", lambda: cards)
    drawn_with = page_cards(given("--top-k", "3", "--device", "cpu"))
    assert [card.name for card in drawn_with] == ["tiny-class", "tiny-text"]
    assert all(isinstance(card, Card) and card.sampling["top_k"] == 3 for card in drawn_with)
    assert drawn_with[0].sampling["cfg_scale"] == 2.0 and cards[0].sampling["top_k"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpt-ckpt", "x"], "--vq-ckpt is missing"),
        (["--vq-ckpt", "x"], "--gpt-ckpt is missing"),
        (["--gpt-model", "GPT-B"], "--gpt-model describes a model"),
        ([*FILES, "--card", "x.json"], "not both"),
    ],
)
def test_half_a_model(flags, message):
    with pytest.raises(ValueError, match=message):
        page_cards(given(*flags))


def test_a_server_has_its_own_models(of_classes):
    there = {"tiny-class": of_classes}
    assert cards_of_server(there, given("--top-k", "9"))["tiny-class"].sampling["top_k"] == 9
    with pytest.raises(ValueError, match="--gpt-ckpt is for models in this process"):
        cards_of_server(there, given("--gpt-ckpt", "x"))


def test_nothing_runs_at_import_and_help_needs_no_gradio():
    code = "import sys, app; app.parser().format_help(); sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False).returncode == 0


def test_a_mistake_is_one_sentence():
    line = [sys.executable, str(ROOT / "app.py"), "--gpt-ckpt", "nowhere.pt"]
    done = subprocess.run(line, cwd="/", env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: --vq-ckpt is missing")

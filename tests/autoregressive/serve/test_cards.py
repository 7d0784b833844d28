"""What a card says of a model, before anything is loaded."""

import pytest

from autoregressive.serve.cards import card_of_args, card_parser, cards_of, given_flags, read_card
from tests.autoregressive.serve.tiny import NAMES, tiny_card_files


def test_a_card_names_files_relative_to_itself_and_knows_its_model(tmp_path):
    of_classes, of_texts = (read_card(path) for path in tiny_card_files(tmp_path))
    assert of_classes.args.gpt_ckpt == str(tmp_path / "tiny-class" / "gpt.pt")
    assert (of_classes.name, of_classes.kind, of_classes.edge, of_classes.grid) == ("tiny-class", "c2i", 16, 4)
    assert of_classes.classes.names == NAMES and of_classes.sampling["cfg_scale"] == 2.0
    assert (of_texts.kind, of_texts.classes, of_texts.args.cls_token_num) == ("t2i", None, 8)
    assert of_texts.sampling["cfg_scale"] == 7.5  # the default of the sampler of texts


def test_a_card_of_flags_is_named_by_its_checkpoint():
    args = card_parser().parse_args(["--gpt-model", "GPT-XL", "--gpt-ckpt", "weights/c2i_XL_384.pt"])
    card = card_of_args(args)
    assert card.name == "gpt-xl-c2i_xl_384" and card.classes.name(207) == "golden retriever"


@pytest.mark.parametrize("content", ["[]", '{"name": "x"}', "no json"])
def test_other_files_are_no_cards(tmp_path, content):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(ValueError, match=r"card\.json"):
        read_card(tmp_path / "card.json")


def test_flags_of_drawing_go_for_the_models_of_files_and_others_do_not(tmp_path):
    files = tiny_card_files(tmp_path)
    typed = given_flags(card_parser(), ["--cfg-interval", "3", "--top-k", "9", "--decode-precision", "bf16"])
    assert typed == {"cfg_interval": 3.0, "top_k": 9, "decode_precision": "bf16"}
    drawn_with = cards_of(typed, files)
    assert [(card.args.cfg_interval, card.sampling["top_k"]) for card in drawn_with] == [(3.0, 9)] * 2
    assert {card.args.decode_precision for card in drawn_with} == {"bf16"}
    assert drawn_with[0].sampling["cfg_scale"] == 2.0  # as its file says
    for flags in (["--image-size", "384"], ["--gpt-model", "GPT-L"]):
        with pytest.raises(ValueError, match=f"{flags[0]} describes a model, but there is none"):
            cards_of(given_flags(card_parser(), flags), files)


def test_a_model_of_flags_has_the_defaults_of_its_kind():
    files = ["--gpt-ckpt", "t2i_XL.pt", "--vq-ckpt", "vq_ds16_t2i.pt"]
    (of_texts,) = cards_of(given_flags(card_parser("t2i"), [*files, "--gpt-type", "t2i", "--top-k", "7"]))
    assert (of_texts.kind, of_texts.edge, of_texts.args.cls_token_num) == ("t2i", 512, 120)
    assert of_texts.sampling == {"cfg_scale": 7.5, "top_k": 7, "top_p": 1.0, "temperature": 1.0}
    (of_classes,) = cards_of(given_flags(card_parser(), files), defaults={"top_k": 4000})
    assert (of_classes.kind, of_classes.edge, of_classes.sampling["top_k"]) == ("c2i", 384, 4000)

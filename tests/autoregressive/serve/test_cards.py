"""What a card says of a model, before anything is loaded."""

import pytest

from autoregressive.serve.cards import card_of_args, card_parser, read_card
from tests.autoregressive.serve.tiny import NAMES, tiny_card_files


def test_a_card_names_files_relative_to_itself_and_knows_its_model(tmp_path):
    of_classes, of_texts = (read_card(path, ["--device", "cpu"]) for path in tiny_card_files(tmp_path))
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

"""Pictures of a batch are those that each job gives alone, and that the samplers give."""

import numpy as np
import pytest
import torch

from autoregressive.sample.pipeline import load_models, sample_codes
from autoregressive.serve import studio as studio_module
from autoregressive.serve.cards import with_values
from autoregressive.serve.requests import Edit, Sampling
from autoregressive.serve.studio import Job, Studio, partial_pictures
from tests.autoregressive.serve.tiny import tiny_cards
from tokenizer.coding import ImageDecoder, decode_codes
from utils.image import to_uint8

CPU = torch.device("cpu")
PLAIN = Sampling(cfg_scale=3.0, top_k=20, top_p=1.0, temperature=0.8)
GREY = int(127.5 * 0.85 + 128)
PICTURE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return tiny_cards(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def studio(cards):
    return Studio(cards, CPU)


def edit(*cells):
    return Edit(PICTURE, np.isin(np.arange(16), cells))


def test_a_job_is_the_samplers_picture_of_that_seed(cards, studio):
    card = cards[0]
    gpt, tokenizer = load_models(card.args, CPU)
    codes = sample_codes(gpt, torch.tensor([2]), card.args, [7], **vars(PLAIN))
    expected = to_uint8(decode_codes(tokenizer, codes)).numpy()
    assert np.array_equal(studio.draw([Job("tiny-class", 2, PLAIN, 7)]), expected)


def test_pictures_and_previews_are_decoded_in_the_cards_format(cards, studio, monkeypatch):
    monkeypatch.setattr(studio_module, "_SECONDS_BETWEEN_REPORTS", 0)
    monkeypatch.setattr(studio_module, "_PREVIEW_SHARE", 1e9)
    card = with_values(cards[0], {"decode_precision": "bf16"})
    gpt, tokenizer = load_models(card.args, CPU)
    codes = sample_codes(gpt, torch.tensor([2]), card.args, [7], **vars(PLAIN))
    job, seen = Job("tiny-class", 2, PLAIN, 7, previews=True), []
    drawn = Studio([card], CPU).draw([job], lambda *report: seen.append(report))
    assert np.array_equal(drawn, to_uint8(ImageDecoder(tokenizer, "bf16")(codes)).numpy())
    assert np.array_equal(seen[-1][2], drawn) and not np.array_equal(drawn, studio.draw([job]))


@pytest.mark.parametrize(
    "jobs",
    [
        [Job("tiny-class", label, PLAIN, seed) for label, seed in ((0, 3), (2, 3), (0, 4))],
        [Job("tiny-text", text, PLAIN, seed) for text, seed in (("a red cat", 1), ("the dog", 1), ("", 2))],
        [Job("tiny-class", 1, PLAIN, 5, edit(*cells)) for cells in ((0, 1), (9,), range(16))],
        [Job("tiny-text", "the dog", PLAIN, 5, edit(*cells)) for cells in ((3,), (0, 15))],
    ],
    ids=["classes", "texts", "edits", "edits of texts"],
)
def test_a_batch_is_its_singles(studio, jobs):
    assert len({job.key for job in jobs}) == 1
    together = studio.draw(jobs)
    assert together.shape == (len(jobs), 16, 16, 3) and together.dtype == np.uint8
    assert all(np.array_equal(together[i], studio.draw([job])[0]) for i, job in enumerate(jobs))
    assert len({picture.tobytes() for picture in together}) == len(jobs)


def test_a_job_that_is_an_edit_does_not_share_a_batch_with_one_that_is_none():
    assert Job("m", 1, PLAIN, 0).key != Job("m", 1, PLAIN, 0, edit(1)).key


def test_progress_and_previews(studio, monkeypatch):
    monkeypatch.setattr(studio_module, "_SECONDS_BETWEEN_REPORTS", 0)
    monkeypatch.setattr(studio_module, "_PREVIEW_SHARE", 1e9)
    seen = []
    jobs = [Job("tiny-class", 1, PLAIN, seed, previews=True) for seed in (1, 2)]
    final = studio.draw(jobs, lambda *report: seen.append(report))
    assert [(done, total) for done, total, _ in seen] == [(i, 16) for i in range(1, 17)]
    assert np.array_equal(seen[-1][2], final)
    half = seen[7][2]
    assert (half[:, 8:] == GREY).all() and (half[:, :8] != GREY).any()
    silent = []
    studio.draw([Job("tiny-class", 1, PLAIN, 1)], lambda *report: silent.append(report))
    assert all(pictures is None for _, _, pictures in silent) and len(silent) == 16


def test_an_edit_counts_to_its_last_cell_and_shows_the_whole_picture(studio, monkeypatch):
    monkeypatch.setattr(studio_module, "_SECONDS_BETWEEN_REPORTS", 0)
    monkeypatch.setattr(studio_module, "_PREVIEW_SHARE", 1e9)
    seen = []
    job = Job("tiny-class", 1, PLAIN, 1, edit(2, 6), previews=True)
    final = studio.draw([job], lambda *report: seen.append(report))
    assert [(done, total) for done, total, _ in seen] == [(i, 7) for i in range(1, 8)]
    assert np.array_equal(seen[-1][2], final) and not (seen[0][2] == GREY).all(axis=-1).any()


def test_a_watcher_can_stop_a_batch_and_the_next_one_is_as_ever(studio):
    def stop(*_):
        raise InterruptedError

    jobs = [Job("tiny-class", 1, PLAIN, 1)]
    before = studio.draw(jobs)
    with pytest.raises(InterruptedError):
        studio.draw(jobs, stop)
    assert np.array_equal(studio.draw(jobs), before)


def test_partial_pictures_end_within_a_row(cards):
    _, tokenizer = load_models(cards[0].args, CPU)
    picture = partial_pictures(ImageDecoder(tokenizer), torch.full((1, 16), 5, dtype=torch.int32), 6)[0]
    assert (picture[4:8, 8:] == GREY).all() and (picture[8:] == GREY).all()
    assert (picture[4:8, :8] != GREY).any() and (picture[:4] != GREY).any()

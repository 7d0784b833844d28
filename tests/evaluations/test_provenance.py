"""What the files beside a set tell of it, and the mistakes that this uncovers."""

from __future__ import annotations

import pytest
import torch

from evaluations.measuring import Facts
from evaluations.provenance import Provenance, provenance, warnings
from evaluations.render import Drawn, render

SAMPLED = {"gpt_model": "GPT-L", "cfg_scale": 2.0, "image_size": 384, "image_size_eval": 256}


def drawn(folder, settings, labels=None):
    def draw(indices):
        notes = [{"class_id": labels[i]} if labels else {} for i in indices]
        return Drawn(torch.full((len(indices), 4, 4, 3), 9, dtype=torch.uint8), notes)

    return render(draw, len(labels or range(6)), folder, batch_size=4, settings=settings)


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_a_sampled_set_says_how_it_was_made(tmp_path, suffix):
    folder = drawn(tmp_path / "cfg-1.5", SAMPLED, labels=[0, 1, 2, 0, 1, 2])
    found = provenance(f"{folder}{suffix}")
    assert found.kind == "generated" and found.settings == SAMPLED
    assert found.labels == "balanced: 3 classes, 2 pictures each"
    assert found.resized == "from 384 to 256, bicubic without antialiasing"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 0], "balanced: 2 classes, 1 or 2 pictures each"),
        ([0, 0, 0, 1], "random: 2 classes, 1 to 3 pictures each"),
        (None, "unknown"),
    ],
)
def test_how_labels_are_spread(tmp_path, labels, said):
    assert provenance(drawn(tmp_path / "s", SAMPLED, labels)).labels == said


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"data_path": "val", "dataset": "imagenet", "vq_sha256": "1"}, "reconstructed"),
        ({"data_path": "val", "dataset": "imagenet", "image_size": 256}, "originals"),
    ],
)
def test_reconstructions_and_originals(tmp_path, settings, kind):
    found = provenance(drawn(tmp_path / "s", settings))
    assert found.kind == kind and found.resized == "unknown"


def test_a_file_on_its_own_is_unknown(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    assert provenance(tmp_path / "broken.npz") == Provenance("unknown", {}, "unknown", "unknown")


def facts(path="VIRTUAL_imagenet256_labeled.npz", pictures=50_000, size=256, stored=False) -> Facts:
    return Facts(path, None, pictures, (size, size), stored)


def origin(kind: str = "unknown") -> Provenance:
    return Provenance(kind, {}, "unknown", "unknown")


@pytest.mark.parametrize("sampled", ["generated", "reconstructed", "unknown"])
def test_nothing_to_say_of_a_sound_comparison(sampled):
    right = facts(stored=sampled != "reconstructed")
    assert warnings(right, facts("s.npz"), origin(), origin(sampled)) == []


@pytest.mark.parametrize(
    ("reference", "samples", "kinds", "said"),
    [
        (facts("val_imagenet.npz"), facts(), ("unknown", "generated"), "samples are generated, but the reference"),
        (facts("copy.npz"), facts(), ("originals", "generated"), "samples are generated, but the reference"),
        (facts("val_imagenet.npz"), facts(), ("originals", "unknown"), "right for the rFID of a tokenizer, wrong for"),
        (facts(stored=True), facts(), ("unknown", "reconstructed"), "published rFIDs compare with the originals"),
        (facts(stored=True), facts(pictures=10_000), ("unknown", "generated"), "10,000 samples; published numbers use"),
        (facts(stored=True), facts(size=384), ("unknown", "generated"), "384x384 pixels, the reference 256x256"),
    ],
)
def test_each_known_mistake_is_named(reference, samples, kinds, said):
    (found,) = warnings(reference, samples, origin(kinds[0]), origin(kinds[1]))
    assert said in found

"""The picture of a run."""

import json

from PIL import Image

from utils.summary import NAME, _panels, draw_summary

ENTRIES = [
    {"step": 1, "loss": 5.0, "lr": 0.1, "grad_norm": 2.0, "steps_per_second": 2.0, "tokens_per_second": 512.0},
    {"step": 2, "val/loss": 4.0, "val/bits_per_token": 6.0, "val/ema_loss": 4.5, "val/ema_bits_per_token": 6.5},
    {"step": 2, "loss": 4.0, "lr": 0.1, "steps_per_second": 2.0, "tokens_per_second": 512.0},
]


def test_what_is_drawn():
    assert dict(_panels(ENTRIES)) == {
        "loss": ["loss", "val/loss", "val/ema_loss"],
        "validation": ["val/bits_per_token", "val/ema_bits_per_token"],
        "learning rate": ["lr"],
        "throughput": ["tokens_per_second"],
    }
    tokenizer = [{"step": 1, "loss": 1.0, "steps_per_second": 1.0}, {"step": 1, "val/psnr": 20.0, "val/usage": 0.9}]
    assert dict(_panels(tokenizer)) == {
        "loss": ["loss"], "validation": ["val/psnr"], "learning rate": [], "throughput": ["steps_per_second"],
    }  # fmt: skip


def test_the_picture_is_written_beside_the_numbers(tmp_path):
    assert draw_summary(tmp_path) is None and not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    assert Image.open(draw_summary(tmp_path)).size == (990, 585)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", NAME]

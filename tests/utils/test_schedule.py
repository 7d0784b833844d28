"""Learning-rate schedules by hand-computed values."""

import math

import pytest

from utils.schedule import lr_factor


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 1, 0.1), ("constant", 5, 0.5), ("constant", 10, 1.0), ("constant", 110, 1.0),
        ("linear", 10, 1.0), ("linear", 60, 0.55), ("linear", 110, 0.1),
        ("cosine", 10, 1.0), ("cosine", 60, 0.55), ("cosine", 110, 0.1),
        ("cosine", 35, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("wsd", 30, 1.0), ("wsd", 60, 1.0), ("wsd", 85, 0.55), ("wsd", 110, 0.1),
    ],
)  # fmt: skip
def test_values(schedule, step, expected):
    assert lr_factor(step, 110, schedule, warmup=10, floor=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_end_and_beyond(schedule):
    assert [lr_factor(step, 10, schedule) for step in (10, 11, 99)] == pytest.approx([0, 0, 0])
    assert lr_factor(0, 10, schedule) == 1  # no warm-up unless it is asked for
    assert [lr_factor(step, 4, schedule, warmup=4) for step in (2, 4, 5)] == pytest.approx([0.5, 1, 0])  # all warm-up


def test_unknown_schedule():
    with pytest.raises(ValueError, match="cosine"):
        lr_factor(1, 2, "steps")

"""Shares and values that a setting takes over an image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoregressive.models.schedules import SCHEDULES, share, values


def test_values_by_hand():
    assert values(5, 1.0, 3.0, "constant") == [3.0] * 5
    assert values(5, 1.0, 3.0, "linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert values(3, 1.0, 3.0, "cosine") == pytest.approx([1.0, 2.0, 3.0])
    # (1 - cos(pi 0.5^2)) / 2 = 0.14645
    assert values(3, 1.0, 3.0, "power-cosine", 2.0) == pytest.approx([1.0, 1.2928932, 3.0])
    assert values(3, 2.0, 0.5, "linear") == [2.0, 1.25, 0.5]
    assert values(1, 1.0, 3.0, "linear") == [1.0]


@given(
    schedule=st.sampled_from(SCHEDULES),
    power=st.floats(0.1, 8),
    count=st.integers(2, 40),
)
def test_every_schedule_rises_to_its_full_value(schedule, power, count):
    got = values(count, 1.0, 4.0, schedule, power)
    assert got == sorted(got) and got[-1] == 4.0
    assert got[0] == (4.0 if schedule == "constant" else 1.0)


def test_cosine_is_power_cosine_of_power_one():
    assert [share("cosine", i / 9) for i in range(10)] == [share("power-cosine", i / 9, 1.0) for i in range(10)]


def test_unknown_names_and_powers_are_refused():
    with pytest.raises(ValueError, match="known are constant, linear"):
        share("quadratic", 0.5)
    with pytest.raises(ValueError, match="above 0"):
        share("power-cosine", 0.5, 0.0)

"""Broken losses and spikes: what counts as one, what happens then, and that a resumed run judges alike."""

import logging
import math

import pytest
import torch

from utils import checkpoint
from utils.guard import DeviceGuard, LossGuard

BATCH = [(torch.arange(3), torch.tensor([1]))]


def guard(tmp_path, action="skip", threshold=6.0, losses=()):
    made = LossGuard(action, threshold, tmp_path / "bad", logging.getLogger("test"))
    for number, loss in enumerate(losses):
        assert made.admits(loss, 1.0, number, BATCH)
    return made


def steady(count=40):
    return [3.0 + 0.1 * math.sin(i) for i in range(count)]  # median 3, median absolute deviation about 0.07


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (3.0, float("nan"))])
def test_what_is_not_finite_is_refused_and_the_batch_is_kept(loss, norm, tmp_path):
    assert not guard(tmp_path, threshold=0.0).admits(loss, norm, 7, BATCH)
    kept = checkpoint.read(tmp_path / "bad/0000007-rank0.pt")
    assert torch.equal(kept["batches"][0][0], BATCH[0][0]) and kept["step"] == 7


def test_a_spike_is_far_above_the_recent_losses(tmp_path):
    made = guard(tmp_path, losses=steady())
    assert 3.4 < made.limit() < 3.9
    assert made.admits(made.limit() - 0.01, 1.0, 50, BATCH) and not made.admits(made.limit() + 0.01, 1.0, 51, BATCH)
    assert made.admits(0.1, 1.0, 52, BATCH)  # a fall is no spike


def test_outliers_hardly_move_the_limit_and_refused_losses_not_at_all(tmp_path):
    made = guard(tmp_path, losses=steady())
    before = made.limit()
    assert not made.admits(100.0, 1.0, 50, BATCH)
    assert made.limit() == before


def test_few_losses_or_no_threshold_call_nothing_a_spike(tmp_path):
    assert guard(tmp_path, losses=steady(19)).limit() == math.inf > guard(tmp_path, losses=steady(20)).limit()
    assert guard(tmp_path, threshold=0.0, losses=steady()).limit() == math.inf


def test_a_loss_that_does_not_move_has_room_for_a_percent_of_itself(tmp_path):
    assert guard(tmp_path, threshold=5.0, losses=[2.0] * 30).limit() == pytest.approx(2.1)


def test_only_the_last_two_hundred_losses_count(tmp_path):
    old, new = [9.0] * 101, [2.0] * 100
    made = guard(tmp_path, threshold=5.0, losses=[*old, *new[:-1]])
    assert made.limit() > 9  # 101 of the last 200 are high
    for number in (1, 2):
        made.admits(2.0, 1.0, number, BATCH)
    assert made.limit() == pytest.approx(2.1)


def test_stop_says_what_and_where(tmp_path):
    with pytest.raises(ValueError, match=r"not a finite number \(nan\) at step 9; .* in .*0000009-rank0"):
        guard(tmp_path, action="stop").admits(float("nan"), 1.0, 9, BATCH)


def test_skipping_ends_after_twenty_in_a_row(tmp_path):
    made = guard(tmp_path)
    for number in range(19):
        assert not made.admits(float("nan"), 1.0, number, BATCH)
    with pytest.raises(ValueError, match="20 steps in a row"):
        made.admits(float("nan"), 1.0, 19, BATCH)


def test_a_good_step_between_starts_the_count_anew(tmp_path):
    made = guard(tmp_path)
    for number in range(60):
        assert made.admits(3.0 if number % 20 == 19 else float("nan"), 1.0, number, BATCH) == (number % 20 == 19)


def test_a_restored_guard_judges_alike(tmp_path):
    made, other = guard(tmp_path, losses=steady()), guard(tmp_path)
    other.load_state_dict(made.state_dict())
    assert other.limit() == made.limit() < math.inf


def judged(made, loss, number, norm=1.0):
    return made.refused(torch.tensor(loss), torch.tensor(norm), number, BATCH).item()


@pytest.mark.parametrize(
    ("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (3.0, float("nan")), (3.0, -math.inf)]
)
def test_the_device_refuses_what_is_not_finite_and_the_guard_reports_it_later(loss, norm, tmp_path):
    made = DeviceGuard(guard(tmp_path, threshold=0.0))
    assert judged(made, 3.0, 6) == 0 and judged(made, loss, 7, norm) == 1
    assert not (tmp_path / "bad").exists()
    assert judged(made, 3.0, 8) == 0
    kept = checkpoint.read(tmp_path / "bad/0000007-rank0.pt")
    assert torch.equal(kept["batches"][0][0], BATCH[0][0]) and kept["step"] == 7
    assert len(list((tmp_path / "bad").iterdir())) == 1


def test_device_and_host_call_the_same_losses_a_spike(tmp_path):
    """Among them the two float32 next to the limit, which is a float64."""
    losses = [3.0 + 0.1 * math.sin(i) for i in range(60)]
    edge = torch.tensor(guard(tmp_path / "host", losses=torch.tensor(losses[:30]).tolist()).limit())
    above, below = torch.nextafter(edge, torch.tensor(math.inf)), torch.nextafter(edge, torch.tensor(0.0))
    losses[30:30] = [above.item()]
    losses[31:31] = [below.item(), edge.item(), 50.0]
    host, device = guard(tmp_path / "host"), guard(tmp_path / "device")
    on_device = DeviceGuard(device)
    verdicts = [(host.admits(loss, 1.0, i, BATCH), judged(on_device, loss, i)) for i, loss in
                enumerate(torch.tensor(losses).tolist())]  # fmt: skip
    assert [admitted for admitted, _ in verdicts] == [refused == 0 for _, refused in verdicts]
    assert [i for i, (admitted, _) in enumerate(verdicts) if not admitted][-1] == 33  # the 50
    assert not verdicts[30][0] and verdicts[31][0]
    on_device.settle()
    assert device.state_dict() == host.state_dict()


def test_a_training_that_stops_does_so_before_the_next_decision_or_when_it_is_settled(tmp_path):
    for later in (lambda made: judged(made, 3.0, 10), lambda made: made.settle()):
        made = DeviceGuard(guard(tmp_path, action="stop"))
        assert judged(made, float("nan"), 9) == 1
        with pytest.raises(ValueError, match=r"not a finite number \(nan\) at step 9"):
            later(made)
        made.settle()  # said once

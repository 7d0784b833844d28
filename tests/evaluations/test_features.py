"""Statistics of pictures: in batches as at once, on two processes as on one."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from evaluations.features import PictureStatistics, feature_statistics, frechet, rank_share
from evaluations.metrics import frechet_distance_of_features, inception_score
from tests.processes import free_port
from utils.distributed import process_group

COUNT = 23


class ColourNetwork:
    """Eight colour averages of a picture as features, a softmax over four of them as classes."""

    label, comparable = "colours", False

    def __call__(self, pictures):
        blocks = pictures.float().unflatten(1, (2, -1)).mean(dim=(2, 3)).flatten(1)  # (N, 6)
        pool = torch.cat([blocks, blocks[:, :2] * blocks[:, 2:4] / 100], dim=1)
        return {"pool": pool, "spatial": pool[:, ::2] - 1, "probabilities": (pool[:, :4] / 20).softmax(1)}


def pictures(count: int = COUNT, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randint(0, 200, (count, 1, 1, 3), generator=generator)
    return (bases + torch.randint(0, 56, (count, 4, 4, 3), generator=generator)).byte()


def same(got: PictureStatistics, want: PictureStatistics) -> None:
    assert got.count == want.count
    for name in ("pool", "spatial"):
        torch.testing.assert_close(getattr(got, name).mean, getattr(want, name).mean, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(getattr(got, name).covariance, getattr(want, name).covariance, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(got.score.scores(), want.score.scores(), rtol=1e-12, atol=0)
    assert torch.equal(got.features, want.features)


def whole(split_size: int = 5) -> PictureStatistics:
    return feature_statistics(ColourNetwork(), [pictures()], keep_features=True, split_size=split_size)


def test_statistics_are_those_of_all_features_in_memory():
    seen = ColourNetwork()(pictures())
    got = whole()
    torch.testing.assert_close(got.pool.covariance, seen["pool"].double().T.cov())
    assert torch.equal(got.features, seen["pool"])
    assert got.score.scores().mean().item() == pytest.approx(inception_score(seen["probabilities"], 5), rel=1e-12)
    assert len(got.score.scores()) == 5  # 23 pictures in splits of 5: the last one is shorter


@pytest.mark.parametrize("size", [1, 4, 7])
def test_batches_change_nothing(size):
    batches = pictures().split(size)
    same(feature_statistics(ColourNetwork(), iter(batches), keep_features=True, split_size=5), whole())


def test_features_are_kept_on_request_alone():
    assert feature_statistics(ColourNetwork(), [pictures()]).features is None


def test_splits_can_be_shuffled():
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    placed = torch.empty_like(order)
    placed[order] = torch.arange(COUNT)  # picture order[j] comes at place j
    got = feature_statistics(ColourNetwork(), pictures().split(6), split_size=5, split_order=placed)
    want = feature_statistics(ColourNetwork(), [pictures()[order]], split_size=5)
    torch.testing.assert_close(got.score.scores(), want.score.scores(), rtol=1e-12, atol=0)
    assert not torch.allclose(got.score.scores(), whole().score.scores())


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="statistics need pictures, found none"):
        feature_statistics(ColourNetwork(), [])


def test_frechet_distance_of_two_sets():
    other = feature_statistics(ColourNetwork(), [pictures(30, seed=2)], keep_features=True)
    want = frechet_distance_of_features(ColourNetwork()(pictures())["pool"], other.features)
    assert frechet(whole(), other) == pytest.approx(want, rel=1e-9)
    spatial = [ColourNetwork()(p)["spatial"] for p in (pictures(), pictures(30, seed=2))]
    assert frechet(whole(), other, "spatial") == pytest.approx(frechet_distance_of_features(*spatial), rel=1e-9)


def test_few_pictures_use_the_features_themselves():
    few = feature_statistics(ColourNetwork(), [pictures(4, seed=3)], keep_features=True)
    assert frechet(whole(), few) == frechet_distance_of_features(whole().features, few.features)


def test_sets_seen_by_different_networks_are_not_compared():
    other = whole()
    other.label = "shapes"
    with pytest.raises(ValueError, match="seen by colours, the samples by shapes"):
        frechet(whole(), other)


class PoolOnly(ColourNetwork):
    def __call__(self, pictures):
        return {"pool": super().__call__(pictures)["pool"]}


def test_a_network_without_spatial_features_has_no_sfid():
    plain = feature_statistics(PoolOnly(), [pictures()])
    with pytest.raises(ValueError, match="has no spatial features"):
        frechet(plain, plain, "spatial")


# --- several processes


def _rank(rank: int, world: int, port: int, count: int, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group("cpu"):
        share = rank_share(count)
        batches = pictures(count)[share.start : share.stop].split(4) if share else []
        got = feature_statistics(ColourNetwork(), batches, first=share.start, keep_features=True, split_size=5)
        tensors = (*got.pool.moments()[1:], *got.spatial.moments()[1:], got.score.table, got.features)
        # arrays: a tensor would travel as a handle that dies with this process
        results.put((got.count, got.pool.count, [tensor.numpy() for tensor in tensors]))


def on_processes(world: int, count: int) -> list[tuple]:
    """What each of `world` processes gets; forked, so that nothing is imported again."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    results = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, world, port, count, results)) for rank in range(world)]
    for process in ranks:
        process.start()
    try:
        return [results.get() for _ in ranks]
    finally:
        for process in ranks:
            process.join(60)


@pytest.mark.parametrize(("world", "count"), [(2, COUNT), (3, 2)])
def test_several_processes_equal_one(world, count):
    want = feature_statistics(ColourNetwork(), [pictures(count)], keep_features=True, split_size=5)
    tensors = (*want.pool.moments()[1:], *want.spatial.moments()[1:], want.score.table, want.features)
    for seen, rows, arrays in on_processes(world, count):
        assert seen == rows == count
        for got, single in zip(arrays, tensors, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), single, rtol=1e-12, atol=1e-9)

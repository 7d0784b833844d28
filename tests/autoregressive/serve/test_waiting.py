"""Batches are of one line; lines and owners take turns; nothing is lost."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from autoregressive.serve.waiting import FairQueue


def filled(*items):
    queue = FairQueue()
    for key, owner, count in items:
        for number in range(count):
            queue.put(key, owner, (key, owner, number))
    return queue


def test_lines_take_turns():
    queue = filled(("warm", "a", 5), ("cold", "b", 2))
    taken = [queue.take(2) for _ in range(4)]
    assert [batch[0][0] for batch in taken] == ["warm", "cold", "warm", "warm"]
    assert [len(batch) for batch in taken] == [2, 2, 2, 1] and queue.take(2) == []


def test_owners_of_a_line_take_turns_and_each_keeps_its_order():
    queue = filled(("warm", "greedy", 6), ("warm", "late", 2))
    assert queue.take(3) == [("warm", "greedy", 0), ("warm", "late", 0), ("warm", "greedy", 1)]
    assert queue.take(3) == [("warm", "late", 1), ("warm", "greedy", 2), ("warm", "greedy", 3)]


def test_takers_share_a_line():
    queue = filled(("warm", "a", 5))
    assert [len(queue.take(8, sharers)) for sharers in (2, 1)] == [3, 2]


def test_first_goes_before_all_others():
    queue = filled(("warm", "a", 1), ("cold", "b", 1))
    queue.put("again", "c", "lost", first=True)
    assert queue.take(8) == ["lost"] and queue.take(8)[0][0] == "warm"


def test_dropped_owners_are_gone():
    queue = filled(("warm", "a", 2), ("warm", "b", 1), ("cold", "a", 1))
    queue.drop("a")
    queue.drop("never there")
    assert len(queue) == 1 and queue.owners() == {"b"} and queue.take(8) == [("warm", "b", 0)] and not queue


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 5)), max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_everything_comes_out_once_in_batches_of_one_key(items, limit, sharers):
    queue = FairQueue()
    put = Counter()
    for key, owner, count in items:
        for _ in range(count):
            queue.put(key, owner, (key, owner, put[key, owner]))
            put[key, owner] += 1
    assert len(queue) == put.total()
    seen = []
    while batch := queue.take(limit, sharers):
        assert len(batch) <= limit and len({key for key, _, _ in batch}) == 1
        seen += batch
        assert len(queue) == put.total() - len(seen)
    assert len(set(seen)) == put.total()
    for key, owner in put:
        assert [n for k, o, n in seen if (k, o) == (key, owner)] == list(range(put[key, owner]))

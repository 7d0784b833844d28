"""Batches that shrink when the memory does not suffice."""

import pytest
import torch

from utils.batches import in_batches, is_out_of_memory


class Machine:
    """Works on up to `limit` items at once, and fails as torch's allocator on CPUs does beyond that."""

    def __init__(self, limit: int) -> None:
        self.limit, self.asked = limit, []

    def __call__(self, items: list[int]) -> int:
        self.asked.append(len(items))
        if len(items) > self.limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you")
        return sum(items)


def test_halves_from_the_first_failure_on(capsys):
    machine = Machine(limit=3)
    done = list(in_batches(machine, [range(8), range(8, 12), [12]]))
    assert [part for part, _ in done] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12]]
    assert [result for _, result in done] == [1, 5, 9, 13, 17, 21, 12]
    assert machine.asked == [8, 4, 2, 2, 2, 2, 2, 2, 1]
    printed = capsys.readouterr().out
    assert "out of memory at a batch of 8, goes on with 4" in printed and "a batch of 4, goes on with 2" in printed


def test_one_item_that_does_not_fit_is_an_error_of_the_user():
    with pytest.raises(ValueError, match=r"a batch of one: .*can't allocate memory"):
        list(in_batches(Machine(limit=0), [range(3)]))


def test_other_errors_go_through():
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(lambda items: (_ for _ in ()).throw(RuntimeError("shapes do not match")), [[1, 2]]))


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)

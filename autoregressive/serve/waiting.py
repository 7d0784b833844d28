"""Who waits, and who is next: in turn between settings, and in turn between users of the same settings."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of owners, in lines of one key each. Not locked: callers from several threads hold a lock of their own.

    A batch is of one line. Lines take turns, and within a line its owners do, the longest waiting first; so many items
    of one owner delay others by one batch, and nobody waits for ever.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, OrderedDict[Hashable, deque[Item]]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, key: Hashable, owner: Hashable, item: Item, first: bool = False) -> None:
        """Add an item at the end of its owner's; `first` puts its line before all others."""
        self._lines.setdefault(key, OrderedDict()).setdefault(owner, deque()).append(item)
        self._length += 1
        if first:
            self._lines.move_to_end(key, last=False)

    def take(self, limit: int, sharers: int = 1) -> list[Item]:
        """The next batch: at most `limit` items, and at most a fair part of the line for each of `sharers` takers."""
        if not self._lines:
            return []
        key, owners = self._lines.popitem(last=False)
        share = -(-sum(map(len, owners.values())) // sharers)
        batch: list[Item] = []
        while owners and len(batch) < min(limit, share):
            owner, items = owners.popitem(last=False)
            batch.append(items.popleft())
            if items:
                owners[owner] = items
        if owners:
            self._lines[key] = owners
        self._length -= len(batch)
        return batch

    def drop(self, owner: Hashable) -> None:
        """Forget everything of an owner."""
        for key, owners in list(self._lines.items()):
            self._length -= len(owners.pop(owner, ()))
            if not owners:
                del self._lines[key]

    def owners(self) -> set[Hashable]:
        """Everybody who waits."""
        return {owner for owners in self._lines.values() for owner in owners}

"""Boxes of hub tensors as arrays: read, compared, cut into buckets and intersected without a Python loop a box.

A tensor of one dimension counts as a column, with a second dimension of size 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dppo.weights.layout import Box, Piece

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Boxes:
    """n boxes: `tensor` [n], `start` and `stop` [n, 2], and `owner` [n], the rank or worker that each belongs to."""

    tensor: Ints
    start: Ints
    stop: Ints
    owner: Ints

    def take(self, index: Ints) -> Boxes:
        """The boxes of these numbers."""
        return Boxes(self.tensor[index], self.start[index], self.stop[index], self.owner[index])

    @property
    def rows(self) -> Ints:
        """Rows of each box."""
        return self.stop[:, 0] - self.start[:, 0]

    @property
    def columns(self) -> Ints:
        """Columns of each box."""
        return self.stop[:, 1] - self.start[:, 1]

    @property
    def volume(self) -> Ints:
        """Elements of each box."""
        return self.rows * self.columns


@dataclass(frozen=True, eq=False)
class Sources:
    """The distinct boxes that the trainer holds, by tensor, and who holds each.

    Box i is held by the copies `first[i]` up to `first[i] + count[i]`, in the order of their ranks; a copy is in
    parameter `param` (a number of `params`) of `rank`, from `offset` on.
    """

    boxes: Boxes
    first: Ints
    count: Ints
    rank: Ints
    param: Ints
    offset: Ints
    params: tuple[str, ...]


def read_boxes(owners: Sequence[Iterable[Box]], index: Mapping[str, int]) -> Boxes:
    """The boxes of every worker that are not empty, sorted by worker and tensor (its number in `index`).

    Raises ValueError for a tensor that is not in `index` and where boxes of one worker overlap.
    """
    table, owner = _stack([np.fromiter(_numbers(boxes, index), np.int64).reshape(-1, 5) for boxes in owners], 5)
    boxes = _boxes(table, owner)
    boxes = boxes.take(np.flatnonzero(boxes.volume))
    boxes = boxes.take(np.lexsort((boxes.start[:, 1], boxes.start[:, 0], boxes.tensor, boxes.owner)))
    _check_disjoint(boxes, boxes.owner * len(index) + boxes.tensor, tuple(index), "worker")
    return boxes


def read_sources(ranks: Sequence[Iterable[Piece]], index: Mapping[str, int]) -> Sources:
    """What every rank can send: its pieces of replica 0 and above.

    Raises ValueError for a tensor that is not in `index` and where boxes overlap that are not the same.
    """
    params: dict[str, int] = {}
    tables: list[Ints] = []
    for pieces in ranks:
        held = [piece for piece in pieces if piece.replica >= 0]
        places = [(params.setdefault(piece.param, len(params)), *_pair(piece.offset, 0)) for piece in held]
        box = np.fromiter(_numbers(held, index), np.int64).reshape(-1, 5)
        tables.append(np.hstack([box, np.array(places, np.int64).reshape(-1, 3)]))
    table, rank = _stack(tables, 8)
    order = np.lexsort((rank, *table[:, 4::-1].T))
    table, rank = table[order], rank[order]
    new_box = np.any(np.diff(table[:, :5], axis=0, prepend=-1) != 0, axis=1)
    # A rank that holds a box twice sends it from the first place.
    kept = (_boxes(table, rank).volume > 0) & (new_box | (np.diff(rank, prepend=-1) != 0))
    table, rank, new_box = table[kept], rank[kept], new_box[kept]
    first = np.flatnonzero(new_box)
    boxes = _boxes(table, rank).take(first)
    _check_disjoint(boxes, boxes.tensor, tuple(index), "rank")
    count = np.diff(first, append=len(table))
    return Sources(boxes, first, count, rank, table[:, 5], table[:, 6:], tuple(params))


def cut_rows(boxes: Boxes, position: Ints, row_bytes: Ints, window: int) -> tuple[Ints, Boxes, Ints]:
    """Cuts boxes by rows where windows of `window` bytes begin; a row is in the window where its first byte is.

    `position` [n]: place of a box's first byte; `row_bytes` [n]: bytes of one of its rows, less than `window`.
    Returns for each cut box the number of the box it is of, itself, and the number of its window.
    """
    last = position + (boxes.rows - 1) * row_bytes
    of, number = _ranges(position // window, last // window + 1)
    bounds = [-((position[of] - edge * window) // row_bytes[of]) for edge in (number, number + 1)]
    first, end = (np.clip(bound, 0, boxes.rows[of]) for bound in bounds)
    cut = boxes.take(of)
    start, stop = cut.start.copy(), cut.stop.copy()
    start[:, 0], stop[:, 0] = cut.start[:, 0] + first, cut.start[:, 0] + end
    return of, replace(cut, start=start, stop=stop), number


def intersect(left: Boxes, right: Boxes) -> tuple[Ints, Ints, Boxes]:
    """Every pair of boxes that meet: numbers on the left, numbers on the right, and where they meet (owners: left).

    `right` is sorted by tensor; pairs are in the order of `left`.
    """
    low, high = (np.searchsorted(right.tensor, left.tensor, side) for side in ("left", "right"))
    i, j = _ranges(low, high)
    start = np.maximum(left.start[i], right.start[j])
    stop = np.minimum(left.stop[i], right.stop[j])
    meet = np.flatnonzero((start < stop).all(axis=1))
    i, j = i[meet], j[meet]
    return i, j, Boxes(left.tensor[i], start[meet], stop[meet], left.owner[i])


def _numbers(boxes: Iterable[Box], index: Mapping[str, int]) -> Iterator[int]:
    for box in boxes:
        if box.tensor not in index:
            raise ValueError(f"sync plan: got {box.tensor}, expected a tensor of the model")
        yield index[box.tensor]
        yield from _pair(box.start, 0)
        yield from _pair(box.stop, 1)


def _stack(tables: list[Ints], columns: int) -> tuple[Ints, Ints]:
    """All rows of the tables, and for each the number of its table."""
    none = np.empty((0, columns), np.int64)
    return np.concatenate([none, *tables]), np.repeat(np.arange(len(tables)), [len(table) for table in tables])


def _pair(numbers: tuple[int, ...], second: int) -> tuple[int, ...]:
    return numbers if len(numbers) == 2 else (numbers[0], second)


def _boxes(table: Ints, owner: Ints) -> Boxes:
    return Boxes(table[:, 0], table[:, 1:3], table[:, 3:5], owner)


def _ranges(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Every (i, j) with start[i] <= j < stop[i]."""
    count = stop - start
    i = np.repeat(np.arange(len(start)), count)
    return i, np.arange(len(i)) + np.repeat(start - np.cumsum(count) + count, count)


def _check_disjoint(boxes: Boxes, key: Ints, names: tuple[str, ...], owner: str) -> None:
    """No two boxes of the same key (they are sorted by it) may meet."""
    i, j = _ranges(np.arange(len(key)) + 1, np.searchsorted(key, key, "right"))
    meet = np.maximum(boxes.start[i], boxes.start[j]) < np.minimum(boxes.stop[i], boxes.stop[j])
    for pair in np.flatnonzero(meet.all(axis=1)):
        one, other = (describe(boxes, number, names, owner) for number in (i[pair], j[pair]))
        raise ValueError(f"sync plan: got {one} and {other}, which overlap, expected the same box or disjoint ones")


def describe(boxes: Boxes, number: int, names: tuple[str, ...], owner: str) -> str:
    """A box in words, for a message: `model.norm.weight[0:8, 0:1] of worker 3`."""
    (a, b), (c, d) = boxes.start[number], boxes.stop[number]
    return f"{names[boxes.tensor[number]]}[{a}:{c}, {b}:{d}] of {owner} {boxes.owner[number]}"

"""Who sends what several ranks hold: fair shares in bytes, and parts cut by rows between the sharers.

Integers only, so that every process computes the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megatron_dppo.weights.box_tables import Ints

ROUNDS = 20  # of `fair_quotas`; one is enough where sets of holders are nested, as Megatron's mostly are


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows `start` up to `stop` of part number `part` are sent by its holder number `holder`."""

    part: Ints
    start: Ints
    stop: Ints
    holder: Ints


def fair_quotas(
    sets: Sequence[tuple[int, ...]], nbytes: Sequence[int], num_ranks: int
) -> tuple[list[list[int]], list[int]]:
    """Divides what each set of ranks holds in common so that the busiest rank sends as little as can be.

    `sets[s]` are the ranks that hold the same `nbytes[s]` bytes. Returns each member's bytes of each set, and all of
    each rank. Sets are filled up like vessels, small ones first, and again while one or another could do better.
    """
    loads = [0] * num_ranks
    quotas = [[0] * len(members) for members in sets]
    order = sorted(range(len(sets)), key=lambda s: (len(sets[s]), sets[s]))
    for _ in range(ROUNDS):
        changed = False
        for s in order:
            others = [loads[rank] - quota for rank, quota in zip(sets[s], quotas[s], strict=True)]
            filled = _fill(others, nbytes[s])
            changed |= filled != quotas[s]
            for rank, load, quota in zip(sets[s], others, filled, strict=True):
                loads[rank] = load + quota
            quotas[s] = filled
        if not changed:
            break
    return quotas, loads


def _fill(loads: Sequence[int], amount: int) -> list[int]:
    """What each vessel gets when `amount` is poured over vessels that hold `loads`, up to one level."""
    order = sorted(range(len(loads)), key=lambda i: loads[i])
    total, used = amount, 0
    for used, i in enumerate(order):
        if used and total <= used * loads[i]:
            break
        total += loads[i]
    else:
        used = len(order)
    level, rest = divmod(total, used)
    quotas = [0] * len(loads)
    for place, i in enumerate(order[:used]):
        quotas[i] = level - loads[i] + (place < rest)
    return quotas


def share_parts(
    row_bytes: Ints, rows: Ints, bucket: Ints, holders: Ints, quotas: Sequence[Sequence[int]], min_bytes: int
) -> Segments:
    """Divides parts among their holders: every bucket in proportion to the quotas, so that all send all the time.

    `row_bytes`, `rows`, `bucket` [n] of the parts, which are sorted by `holders` (the number of their set in `quotas`)
    and then bucket; within a bucket a holder gets neighbours. A part is cut between holders only into cuts of at
    least `min_bytes`. What one bucket gave a holder too much or too little is made good in the next.
    """
    single = np.array([len(members) == 1 for members in quotas])[holders]
    alone = np.flatnonzero(single)
    found = [Segments(alone, np.zeros_like(alone), rows[alone], np.zeros_like(alone))]
    shared = np.flatnonzero(~single)
    changes = np.any(np.diff(np.stack([holders[shared], bucket[shared]]), prepend=-1) != 0, axis=0)
    sent: dict[int, list[int]] = {}
    for group in np.split(shared, np.flatnonzero(changes)[1:]) if len(shared) else []:
        quota = quotas[holders[group[0]]]
        before = sent.setdefault(int(holders[group[0]]), [0] * len(quota))
        nbytes = int((row_bytes[group] * rows[group]).sum())
        cut = _cut(row_bytes[group], rows[group], _bounds(quota, before, nbytes), min_bytes)
        given = (cut.stop - cut.start) * row_bytes[group][cut.part]
        for holder, amount in zip(cut.holder.tolist(), given.tolist(), strict=True):
            before[holder] += amount
        found.append(Segments(group[cut.part], cut.start, cut.stop, cut.holder))
    return Segments(*(np.concatenate([getattr(s, f) for s in found]) for f in ("part", "start", "stop", "holder")))


def _bounds(quota: Sequence[int], sent: Sequence[int], nbytes: int) -> Ints:
    """Where the shares of the second and later holders begin in a bucket's `nbytes`, after `sent` in earlier ones."""
    total, done = sum(quota), sum(sent) + nbytes
    want = [max(0, share * done - before * total) for share, before in zip(quota, sent, strict=True)]
    before_each = list(accumulate(want))
    return np.array([part * nbytes // before_each[-1] for part in before_each[:-1]], np.int64)


def _cut(row_bytes: Ints, rows: Ints, bounds: Ints, min_bytes: int) -> Segments:
    """Cuts parts laid end to end near the byte positions `bounds`, at whole rows."""
    nbytes = row_bytes * rows
    ends, first_row = np.cumsum(nbytes), np.cumsum(rows) - rows
    at = np.minimum(np.searchsorted(ends, bounds, "right"), len(rows) - 1)
    # A part may be cut at `steps` - 1 places, evenly; the one nearest to the bound is taken, or an end of the part.
    steps = np.maximum(1, rows // np.maximum(1, -(-min_bytes // row_bytes)))[at]
    step = (2 * (bounds - ends[at] + nbytes[at]) * steps + nbytes[at]) // (2 * nbytes[at])
    cuts = first_row[at] + step * rows[at] // steps
    starts = np.union1d(first_row, cuts[cuts < rows.sum()])
    part = np.searchsorted(first_row, starts, "right") - 1
    stops = np.append(starts[1:], rows.sum())
    return Segments(part, starts - first_row[part], stops - first_row[part], np.searchsorted(cuts, starts, "right"))

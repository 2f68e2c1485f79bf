"""What a plan of a weight sync costs: bytes, messages, memory and balance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dppo.weights.box_tables import Ints
from megatron_dppo.weights.plan import BUCKETS_IN_FLIGHT, Plan
from megatron_dppo.weights.update import UPDATE_DTYPES


@dataclass(frozen=True)
class Report:
    """What a plan costs. Bytes are of one sync.

    `sent_bytes` [trainer ranks] and `received_bytes` [workers of one instance, the same in each] of the hop from the
    trainer to an instance; the minimum of that hop is the bytes that the workers of an instance keep, and that of the
    hops between instances N - 1 times as much. `wire_over_minimum`: all bytes sent over all that must be.
    `sender_staging_bytes`, `worker_staging_bytes`: the largest two buckets in a row; a rank that sends more in them
    than a worker receives packs it in pieces. A message is what one rank sends to one worker in one bucket and
    itemsize, of one or more parts. `sender_balance`: the busiest trainer rank over the mean of all;
    `sender_balance_limit`: the least that who holds what permits.
    """

    sent_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    trainer_to_engine_bytes: int
    trainer_to_engine_minimum: int
    engine_to_engine_bytes: int
    engine_to_engine_minimum: int
    wire_over_minimum: float
    sender_staging_bytes: tuple[int, ...]
    worker_staging_bytes: tuple[int, ...]
    num_parts: int
    num_messages: int
    num_buckets: int
    sender_balance: float
    sender_balance_limit: float


def report_of(plan: Plan) -> Report:
    """Bytes, messages, memory and balance of the plan."""
    nbytes, ranks, workers = plan.nbytes, len(plan.fair_bytes), len(plan.kept_bytes)
    sent, received = _sums(nbytes, plan.src_rank, ranks), _sums(nbytes, plan.dst, workers)
    hops = plan.instances - 1
    total, minimum = int(sent.sum()), int(plan.kept_bytes.sum())
    mean = total / ranks
    itemsize = np.array([UPDATE_DTYPES[dtype] for dtype in plan.dtypes])[plan.tensor]
    message = np.stack([plan.bucket, itemsize, plan.dst, plan.src_rank])
    return Report(
        sent_bytes=tuple(sent.tolist()),
        received_bytes=tuple(received.tolist()),
        trainer_to_engine_bytes=total,
        trainer_to_engine_minimum=minimum,
        engine_to_engine_bytes=int(received.sum()) * hops,
        engine_to_engine_minimum=minimum * hops,
        wire_over_minimum=(total + int(received.sum()) * hops) / (minimum * plan.instances),
        sender_staging_bytes=tuple(
            np.minimum(_peaks(plan, plan.src_rank, ranks), BUCKETS_IN_FLIGHT * plan.bucket_bytes).tolist()
        ),
        worker_staging_bytes=tuple(_peaks(plan, plan.dst, workers).tolist()),
        num_parts=len(nbytes),
        num_messages=int(np.any(np.diff(message, prepend=-1) != 0, axis=0).sum()),
        num_buckets=plan.num_buckets,
        sender_balance=int(sent.max()) / mean,
        sender_balance_limit=int(plan.fair_bytes.max()) / mean,
    )


def _peaks(plan: Plan, owner: NDArray[np.int32], owners: int) -> Ints:
    """Bytes of the largest buckets in flight at once, of every sender or worker."""
    key = plan.bucket.astype(np.int64) * owners + owner
    each = _sums(plan.nbytes, key, plan.num_buckets * owners).reshape(-1, owners)
    windows = range(max(1, len(each) - BUCKETS_IN_FLIGHT + 1))
    return np.stack([each[first : first + BUCKETS_IN_FLIGHT].sum(axis=0) for first in windows]).max(axis=0)


def _sums(values: Ints, key: NDArray[np.integer], length: int) -> Ints:
    """Sum of the values of each key."""
    return np.bincount(key, values, length).astype(np.int64)

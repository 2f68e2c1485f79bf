"""The plan of a weight sync, made offline: which rows of which parameter every trainer rank sends to which worker.

The trainer sends every bucket once, to one of N identical engine instances; from there the instances hand it on,
worker to worker, in a ring that starts at another instance for every bucket. Plans are pure functions of two layouts:
every process can make its own and compare digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dppo.weights.box_tables import (
    Boxes,
    Ints,
    Sources,
    cut_rows,
    describe,
    intersect,
    read_boxes,
    read_sources,
)
from megatron_dppo.weights.layout import Box, Piece
from megatron_dppo.weights.sharing import fair_quotas, share_parts
from megatron_dppo.weights.update import UPDATE_DTYPES

BUCKETS_IN_FLIGHT = 2  # one is sent while the next is packed, one received while the last is unpacked
_COLUMNS = ("tensor", "src_rank", "src_param", "src_offset", "start", "stop", "dst", "bucket")
_LAYER = re.compile(r"model\.layers\.\d+\.")


@dataclass(frozen=True, eq=False)
class Plan:
    """Every part that is sent, one a row of the arrays, in the order of sending: bucket, itemsize, worker, rank.

    A part is a box of hub tensor `tensors[tensor]` (dtype `dtypes[tensor]`), `start` up to `stop`, which rank
    `src_rank` has from `src_offset` on in its parameter `params[src_param]` and worker `dst` receives in bucket
    `bucket`. A tensor of one dimension counts as one column (`reshape(n, 1)`). Larger items come first, so that in a
    message without gaps every part is aligned to its item. A worker's buckets follow the order of `tensors`, and all
    workers are in the same bucket when a layer begins.

    int32 [parts]: tensor, src_rank, src_param, dst, bucket; [parts, 2]: src_offset, start, stop.
    int64 `kept_bytes` [workers]: what the workers' boxes hold; `fair_bytes` [ranks]: the best balanced sending.
    `num_buckets` is that of the whole sync, also in a selection of its parts; no worker receives more than
    `bucket_bytes` in one.
    """

    tensors: tuple[str, ...]
    dtypes: tuple[str, ...]
    params: tuple[str, ...]
    instances: int
    num_buckets: int
    bucket_bytes: int
    tensor: NDArray[np.int32]
    src_rank: NDArray[np.int32]
    src_param: NDArray[np.int32]
    src_offset: NDArray[np.int32]
    start: NDArray[np.int32]
    stop: NDArray[np.int32]
    dst: NDArray[np.int32]
    bucket: NDArray[np.int32]
    kept_bytes: Ints
    fair_bytes: Ints

    @property
    def nbytes(self) -> Ints:
        """int64 [parts]: bytes of each part."""
        itemsize = np.array([UPDATE_DTYPES[dtype] for dtype in self.dtypes], np.int64)
        return (self.stop.astype(np.int64) - self.start).prod(axis=1) * itemsize[self.tensor]

    def rows(self, bucket: int) -> slice:
        """Where the parts of one bucket are in the arrays."""
        return slice(*np.searchsorted(self.bucket, (bucket, bucket + 1)).tolist())

    def select(self, *, src_rank: int | None = None, dst: int | None = None) -> Plan:
        """The parts that a rank sends, or a worker receives; the number of buckets stays."""
        kept = np.ones(len(self.bucket), bool)
        if src_rank is not None:
            kept &= self.src_rank == src_rank
        if dst is not None:
            kept &= self.dst == dst
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in _COLUMNS})

    def to_bytes(self) -> bytes:
        """For another process; `from_bytes` there."""
        file = io.BytesIO()
        names = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        np.savez_compressed(file, allow_pickle=False, **{n: np.asarray(v) for n, v in names.items()})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """What `to_bytes` made."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            values: dict[str, Any] = {f.name: arrays[f.name] for f in dataclasses.fields(cls)}
        for name in ("tensors", "dtypes", "params"):
            values[name] = tuple(values[name].tolist())
        for name in ("instances", "num_buckets", "bucket_bytes"):
            values[name] = int(values[name])
        return cls(**values)

    def relay(self, bucket: int) -> list[int]:
        """The instances in the order in which they get a bucket: the first from the trainer, each from the one before.

        Worker w hands on its whole buffer to worker w.
        """
        return [(bucket + step) % self.instances for step in range(self.instances)]

    def digest(self) -> str:
        """sha256, in hexadecimal, of everything in the plan; the same in every process and on every machine."""
        found = hashlib.sha256()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                found.update(f"{field.name} {value.shape}\n".encode())
                found.update(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).data)
            else:
                found.update(f"{field.name} {value!r}\n".encode())
        return found.hexdigest()


def sync_plan(
    senders: Sequence[Iterable[Piece]],
    receivers: Sequence[Iterable[Box]],
    dtypes: Mapping[str, str],
    *,
    bucket_bytes: int,
    instances: int = 1,
    min_cut_bytes: int = 1 << 20,
) -> Plan:
    """Plans the way of every box that a worker keeps from the trainer ranks that hold it.

    `senders`: the pieces of every trainer rank; those of replica -1 are not sent. `receivers`: the boxes of every
    worker of one of `instances` engine instances that are all alike. `dtypes`: of all tensors, in the order in which
    they are sent (`mapping.hub_dtypes`). A worker receives at most `bucket_bytes` in a bucket; boxes are cut by rows
    to fit. What several ranks hold they send in shares that even out all they send, within every bucket; for that a
    part is cut, by rows, only into parts of at least `min_cut_bytes`.

    A box that several workers keep is sent to each. Raises ValueError where the trainer does not hold what a worker
    keeps, where boxes overlap that must not, and for a bucket that has not room for two rows.
    """
    for dtype in set(dtypes.values()) - UPDATE_DTYPES.keys():
        raise ValueError(f"sync plan: got dtype {dtype}, expected one of {', '.join(UPDATE_DTYPES)}")
    if instances < 1:
        raise ValueError(f"sync plan: got {instances} engine instances, expected at least 1")
    names = tuple(dtypes)
    index = {name: number for number, name in enumerate(names)}
    itemsize = np.array([UPDATE_DTYPES[dtype] for dtype in dtypes.values()], np.int64)
    sources, wanted = read_sources(senders, index), read_boxes(receivers, index)
    if not len(wanted.tensor):
        raise ValueError("sync plan: got no boxes of any worker, expected those of an engine")
    of, cut, bucket = _into_buckets(wanted, wanted.columns * itemsize[wanted.tensor], _layers(names), bucket_bytes)
    which, source, parts = intersect(cut, sources.boxes)
    _check_covered(wanted, of[which], parts, names)
    sent, copy, bucket, fair = _share(sources, source, parts, itemsize, bucket[which], len(senders), min_cut_bytes)
    rank, box = sources.rank[copy], np.searchsorted(sources.first, copy, "right") - 1
    columns: dict[str, Any] = {
        "tensor": sent.tensor,
        "src_rank": rank,
        "src_param": sources.param[copy],
        "src_offset": sources.offset[copy] + sent.start - sources.boxes.start[box],
        "start": sent.start,
        "stop": sent.stop,
        "dst": sent.owner,
        "bucket": bucket,
    }
    order = np.lexsort(
        (sent.start[:, 1], sent.start[:, 0], sent.tensor, rank, sent.owner, -itemsize[sent.tensor], bucket)
    )
    return Plan(
        tensors=names,
        dtypes=tuple(dtypes.values()),
        params=sources.params,
        instances=instances,
        num_buckets=int(bucket.max()) + 1,
        bucket_bytes=bucket_bytes,
        kept_bytes=_sums(wanted.volume * itemsize[wanted.tensor], wanted.owner, len(receivers)),
        fair_bytes=fair,
        **{name: column[order].astype(np.int32) for name, column in columns.items()},
    )


def _layers(names: Sequence[str]) -> Ints:
    """Number of the layer of every tensor; each tensor outside of layers counts as one."""
    keys = [found[0] if (found := _LAYER.match(name)) else name for name in names]
    return np.cumsum([0] + [one != other for one, other in zip(keys[1:], keys, strict=False)], dtype=np.int64)


def _into_buckets(wanted: Boxes, row_bytes: Ints, layers: Ints, bucket_bytes: int) -> tuple[Ints, Boxes, Ints]:
    """Cuts what the workers keep so that none receives more than `bucket_bytes` in a bucket.

    Every layer begins where the last worker is through with the one before, so that all are in the same bucket then.
    Returns for each cut box the number of the box it is of, itself, and its bucket.
    """
    widest = int(row_bytes.max())
    if bucket_bytes < 2 * widest:
        raise ValueError(
            f"sync plan: got buckets of {bucket_bytes} bytes, expected room for two of the longest rows, {2 * widest}"
        )
    nbytes, num_layers, workers = row_bytes * wanted.rows, int(layers[-1]) + 1, int(wanted.owner[-1]) + 1
    key = wanted.owner * num_layers + layers[wanted.tensor]
    longest = _sums(nbytes, key, workers * num_layers).reshape(workers, num_layers).max(axis=0)
    position = (np.cumsum(longest) - longest)[layers[wanted.tensor]] + _before(nbytes, key)
    # A row is in the window where its first byte is, and may end beyond: windows are a row smaller than buckets.
    return cut_rows(wanted, position, row_bytes, bucket_bytes - widest + 1)


def _before(nbytes: Ints, key: Ints) -> Ints:
    """Bytes of the earlier entries of the same key, for each entry."""
    order = np.argsort(key, kind="stable")
    before = np.cumsum(nbytes[order]) - nbytes[order]
    _, first, of = np.unique(key[order], return_index=True, return_inverse=True)
    result = np.empty_like(before)
    result[order] = before - before[first][of]
    return result


def _sums(values: Ints, key: NDArray[Any], length: int) -> Ints:
    """Sum of the values of each key; exact, as all are whole numbers below 2^53."""
    return np.bincount(key, values, length).astype(np.int64)


def _check_covered(wanted: Boxes, of: Ints, parts: Boxes, names: tuple[str, ...]) -> None:
    """The parts of a box, which are disjoint and inside it, must add up to it."""
    missing = np.flatnonzero(_sums(parts.volume, of, len(wanted.tensor)) != wanted.volume)
    for number in missing:
        box = describe(wanted, number, names, "worker")
        raise ValueError(f"sync plan: got no rank that holds all of {box}, expected every element on some rank")


def _share(
    sources: Sources, source: Ints, parts: Boxes, itemsize: Ints, bucket: Ints, ranks: int, min_bytes: int
) -> tuple[Boxes, Ints, Ints, Ints]:
    """Chooses who sends. Returns the parts, cut, the copy that each is sent from, its bucket, and fair bytes of ranks.

    `source`, `bucket` [parts]: the box of `sources` that each part is in, and the bucket it goes in.
    """
    sets: dict[tuple[int, ...], int] = {}
    members = np.split(sources.rank, sources.first[1:])
    holders = np.array([sets.setdefault(tuple(ranks.tolist()), len(sets)) for ranks in members])[source]
    row_bytes = parts.columns * itemsize[parts.tensor]
    quotas, loads = fair_quotas(list(sets), _sums(row_bytes * parts.rows, holders, len(sets)).tolist(), ranks)
    # A holder gets neighbours in this order: by worker, so that it has messages to few of them in a bucket.
    order = np.lexsort((parts.start[:, 0], parts.tensor, parts.owner, bucket, holders))
    cut = share_parts(row_bytes[order], parts.rows[order], bucket[order], holders[order], quotas, min_bytes)
    part = order[cut.part]
    sent = parts.take(part)
    first_row = sent.start[:, 0].copy()
    sent.start[:, 0], sent.stop[:, 0] = first_row + cut.start, first_row + cut.stop
    return sent, sources.first[source[part]] + cut.holder, bucket[part], np.array(loads, np.int64)

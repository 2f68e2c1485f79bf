"""What a model's own weight loaders read of each hub tensor, and where they put it: recorded once, then repeated.

A recorded tensor has the shape of a whole hub tensor and no numbers. Views of it are followed on torch's meta device; a
copy into a parameter is noted instead of done. The notes say which boxes a worker of an engine keeps, and are all that
is needed to put later numbers in their places without the loaders. What a loader does beyond views and copies cannot be
noted: such tensors are named, with the operation, and have to go through the loader whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from megatron_dppo.weights.hub_files import TensorInfo
from megatron_dppo.weights.layout import Box, Index


@dataclass(frozen=True)
class Copy:
    """The box `start .. stop` of a hub tensor goes to a strided place of the storage `target`.

    Dimension i of the place (`size`, `stride`, `offset` in elements) runs along axis `axes[i]` of the hub tensor; None
    where it has extent 1.
    """

    start: Index
    stop: Index
    axes: tuple[int | None, ...]
    target: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Step:
    """A strided copy between the contiguous numbers of a part and a storage; strides and offsets in elements."""

    target: int
    size: tuple[int, ...]
    to_stride: tuple[int, ...]
    to_offset: int
    from_stride: tuple[int, ...]
    from_offset: int

    @property
    def numel(self) -> int:
        """Elements that it copies."""
        return math.prod(self.size)


@dataclass
class Recording:
    """Each tensor's copies in the order of the loaders, and why the tensors in `whole` could not be followed."""

    copies: dict[str, list[Copy]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def boxes(self) -> Iterator[Box]:
        """What is read of the tensors that could be followed; none inside another."""
        for name, copies in self.copies.items():
            if name in self.whole:
                continue
            kept: list[Box] = []
            for box in sorted({Box(name, c.start, c.stop) for c in copies}, key=lambda box: box.numel, reverse=True):
                if not any(_contains(larger, box) for larger in kept):
                    kept.append(box)
            yield from sorted(kept, key=lambda box: (box.start, box.stop))


def record(load: Callable[[Iterator[tuple[str, Tensor]]], Any], tensors: Mapping[str, TensorInfo]) -> Recording:
    """Calls `load` with a recorded tensor under every name; no parameter is written to."""
    recording = Recording()

    def recorded(name: str, info: TensorInfo) -> Tensor:
        whole = torch.empty(info.shape, dtype=info.dtype, device="meta")
        return _RecordedTensor.of(_Source(name, info.shape, recording), whole)

    load((name, recorded(name, info)) for name, info in tensors.items())
    return recording


def steps(copies: Iterable[Copy], start: Index, stop: Index) -> Iterator[Step]:
    """How the part `start .. stop` of a hub tensor, contiguous, is copied to wherever its elements go; `copies` are
    the tensor's."""
    part_stride = _contiguous_stride([b - a for a, b in zip(start, stop, strict=True)])
    for copy in copies:
        low = [max(a, b) for a, b in zip(start, copy.start, strict=True)]
        high = [min(a, b) for a, b in zip(stop, copy.stop, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        along = list(zip(copy.axes, copy.stride, strict=True))
        yield Step(
            target=copy.target,
            size=tuple(1 if axis is None else high[axis] - low[axis] for axis in copy.axes),
            to_stride=copy.stride,
            to_offset=copy.offset + sum((low[a] - copy.start[a]) * s for a, s in along if a is not None),
            from_stride=tuple(1 if axis is None else part_stride[axis] for axis in copy.axes),
            from_offset=sum((a - b) * s for a, b, s in zip(low, start, part_stride, strict=True)),
        )


class Recorded:
    """A recording as it is repeated.

    `boxes`: what is kept of the hub's tensors, each element once; all of a tensor in `whole` (name -> why). `expected`:
    by target, the elements that come to it from the others.
    """

    def __init__(self, recording: Recording, tensors: Mapping[str, TensorInfo]) -> None:
        self.whole = recording.whole
        self._copies = {name: copies for name, copies in recording.copies.items() if name not in self.whole}
        self._steps: dict[Box, list[Step]] = {}
        self.boxes = list(recording.boxes())
        self.expected: Counter[int] = Counter()
        for box in self.boxes:
            for step in steps(self._copies[box.tensor], box.start, box.stop):
                self.expected[step.target] += step.numel
        self.boxes += [Box(name, (0,) * len(tensors[name].shape), tensors[name].shape) for name in self.whole]

    def steps_of(self, part: Box) -> list[Step]:
        """Of a part of one of `boxes`, but for tensors in `whole`; worked out once."""
        if part not in self._steps:
            self._steps[part] = list(steps(self._copies[part.tensor], part.start, part.stop))
        return self._steps[part]


def apply_step(step: Step, part: Tensor, storage: Tensor) -> None:
    """Does one copy; `part` and `storage` are flat."""
    source = part.as_strided(step.size, step.from_stride, part.storage_offset() + step.from_offset)
    storage.as_strided(step.size, step.to_stride, step.to_offset).copy_(source)


@dataclass(frozen=True)
class _Source:
    """A hub tensor, and where its copies are noted."""

    name: str
    shape: tuple[int, ...]
    recording: Recording

    def give_up(self, why: str) -> None:
        self.recording.whole.setdefault(self.name, f"its loader {why}")


class _RecordedTensor(Tensor):
    """A hub tensor without numbers, or a view of it."""

    source: _Source
    on_meta: Tensor  # the same view of a tensor of that shape

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(source: _Source, view: Tensor) -> _RecordedTensor:
        wrapped = Tensor._make_wrapper_subclass(
            _RecordedTensor, view.shape, strides=view.stride(), storage_offset=view.storage_offset(), dtype=view.dtype,
            device=torch.get_default_device(),
        )  # fmt: skip
        assert isinstance(wrapped, _RecordedTensor)
        wrapped.source, wrapped.on_meta = source, view
        return wrapped

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"recorded {self.source.name} {tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0]
        if func.is_view and isinstance(first, cls):
            return tree_map(lambda view: cls.of(first.source, view), func(first.on_meta, *args[1:], **kwargs))
        if func is torch.ops.aten.copy_.default and isinstance(args[1], cls) and not isinstance(first, cls):
            args[1]._note(first)
            return first

        def zeros(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            value.source.give_up(f"computes {func}")
            return torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)

        return func(*tree_map(zeros, args), **tree_map(zeros, kwargs))

    def _note(self, place: Tensor) -> None:
        if 0 in place.shape:
            return
        where = _box(self.on_meta, self.source.shape)
        if where is None or place.shape != self.shape:
            self.source.give_up(f"copies {tuple(self.shape)}, which is no box of it")
            return
        start, stop, axes = where
        copy = Copy(
            start=start,
            stop=stop,
            axes=axes,
            target=storage_of(place),
            size=tuple(place.shape),
            stride=place.stride(),
            offset=int(place.storage_offset()),
        )
        self.source.recording.copies.setdefault(self.source.name, []).append(copy)


def storage_of(tensor: Tensor) -> int:
    """What `Copy.target` says: the same for all views of the same memory, also on the meta device."""
    return int(tensor.untyped_storage()._cdata)


def _box(view: Tensor, shape: tuple[int, ...]) -> tuple[Index, Index, tuple[int | None, ...]] | None:
    """The box that a view of a contiguous tensor covers and the axis of each of its dimensions; None: not a box."""
    whole = _contiguous_stride(shape)
    start, rest = [], int(view.storage_offset())
    for stride in whole:
        start.append(rest // stride)
        rest %= stride
    stop = [a + 1 for a in start]
    axes: list[int | None] = []
    for extent, stride in zip(view.shape, view.stride(), strict=True):
        if extent == 1:
            axes.append(None)
            continue
        found = [axis for axis, s in enumerate(whole) if s == stride and shape[axis] > 1 and axis not in axes]
        if not found or start[found[0]] + extent > shape[found[0]]:
            return None
        axes.append(found[0])
        stop[found[0]] = start[found[0]] + extent
    return tuple(start), tuple(stop), tuple(axes)


def _contiguous_stride(shape: Iterable[int]) -> list[int]:
    strides, step = [], 1
    for extent in reversed(list(shape)):
        strides.append(step)
        step *= extent
    return strides[::-1]


def _contains(outer: Box, inner: Box) -> bool:
    return all(a <= b for a, b in zip(outer.start, inner.start, strict=True)) and all(
        a >= b for a, b in zip(outer.stop, inner.stop, strict=True)
    )

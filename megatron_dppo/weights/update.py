"""What describes an update of an engine's weights: made by the trainer's side, taken by the engine's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Transport = Literal["shm", "group", "ipc", "disk"]  # ways for weights
UNUSABLE = -1  # the version of weights that a failed update left half-written
UPDATE_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # name -> bytes an element


@dataclass(frozen=True)
class FileUpdate:
    """A complete set of weights for an engine, lying in one file: in shared memory, or on a disk that it sees too.

    `tensors` holds (name, dtype, shape, offset in bytes) under the names of the hub's files, one tensor an
    expert (`model.layers.0.mlp.experts.3.gate_proj.weight`). The file must not change before `commit` or
    `abort_update`. `crc32`, in the order of `tensors`, lets the engine refuse a damaged file. Raises
    ValueError. With `fingerprints` the engine can be asked for `checksum` afterwards.
    """

    version: int
    path: str
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    nbytes: int
    crc32: tuple[int, ...] | None = None
    fingerprints: bool = False
    transport: Literal["file"] = "file"

    def __post_init__(self) -> None:
        if self.transport != "file":
            raise ValueError(f"file update: got transport {self.transport!r}, expected 'file'")
        if self.version < 0:
            raise ValueError(f"file update: got version {self.version}, expected >= 0")
        if not self.path.startswith("/"):
            raise ValueError(
                f"file update: got path {self.path!r}, expected an absolute one (another process opens it)"
            )
        if self.crc32 is not None and len(self.crc32) != len(self.tensors):
            raise ValueError(f"file update: got {len(self.crc32)} checksums for {len(self.tensors)} tensors")
        names = {name for name, *_ in self.tensors}
        if len(names) != len(self.tensors):
            raise ValueError(
                f"file update: got {len(self.tensors)} tensors with {len(names)} names, expected distinct names"
            )
        end = 0
        for name, dtype, shape, offset in sorted(self.tensors, key=lambda tensor: tensor[3]):
            if dtype not in UPDATE_DTYPES:
                raise ValueError(f"file update: got dtype {dtype} for {name}, expected one of {sorted(UPDATE_DTYPES)}")
            if offset < end:
                raise ValueError(f"file update: {name} at {offset} overlaps its predecessor, which ends at {end}")
            end = offset + math.prod(shape) * UPDATE_DTYPES[dtype]
        if end > self.nbytes:
            raise ValueError(f"file update: got {self.nbytes} bytes, expected at least {end} for its tensors")

    def as_json(self) -> dict[str, Any]:
        """The fields as plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FileUpdate:
        """What `as_json` made."""
        tensors = tuple((name, dtype, tuple(shape), offset) for name, dtype, shape, offset in fields["tensors"])
        crc32 = None if fields["crc32"] is None else tuple(fields["crc32"])
        return cls(**{**fields, "tensors": tensors, "crc32": crc32})


@dataclass(frozen=True)
class GroupUpdate:
    """A complete set of weights for an engine, sent to its workers by the trainer's ranks (`weights.transfer`).

    The ranks must be sending, or about to, when `begin_update` is called. `store`: host:port of a TCPStore, where
    the plan of `digest` was published. Channels are named by `generation`, a number that no earlier group of these
    engines has had: `{generation}/engine{i}`. Raises ValueError.
    """

    version: int
    store: str
    digest: str
    generation: int
    ranks: int  # of the trainer
    instance: int = 0  # which of the `instances` engines this one is
    instances: int = 1
    timeout_s: float = 120.0
    one_machine: bool = False  # ranks and workers share memory (`weights.ipc`), instead of a process group
    fingerprints: bool = False
    transport: Literal["group"] = "group"

    def __post_init__(self) -> None:
        if self.version < 0:
            raise ValueError(f"group update: got version {self.version}, expected >= 0")
        if not 0 <= self.instance < self.instances:
            raise ValueError(f"group update: got instance {self.instance}, expected 0..{self.instances - 1}")

    def as_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


Update = FileUpdate | GroupUpdate

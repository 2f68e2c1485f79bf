"""Megatron's torch_dist checkpoints by boxes: no process group, no model, one block in memory.

A checkpoint is a directory: `.metadata` (a pickle: which chunks make up each global tensor, and where each lies),
`*.distcp` (chunks, each a small archive of torch.save), `common.pt`, and `metadata.json`, which Megatron reads first
and which is written last. The pickle is read by an allow-list: nothing from a checkpoint is executed.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dppo.weights.hub_files import read_exactly

COMPLETE_FILE = "metadata.json"  # there is a checkpoint where this is
ALLOWED = {
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "float8_e4m3fn"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",  # Megatron keeps its plans
    },
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip

Stored = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype, tuple[int, ...], str, int, int]


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's metadata needs")
        return super().find_class(module, name)


def read_metadata(root: Path) -> Metadata:
    """The checkpoint's `.metadata`; raises ValueError where it is missing, broken or asks for what is not allowed."""
    file = root / ".metadata"
    if not file.is_file():
        raise ValueError(f"{root}: got no .metadata, expected a torch_dist checkpoint")
    try:
        metadata = _AllowList(io.BytesIO(file.read_bytes())).load()
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"{file}: cannot be read: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{file}: got a {type(metadata).__name__}, expected the metadata of a checkpoint")
    return metadata


class TorchDistFiles:
    """Boxes of the global tensors of one checkpoint, by key (without `module.` in front)."""

    def __init__(self, root: Path) -> None:
        metadata = read_metadata(root)
        self.root = root
        tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        # Megatron's own training state has optimizer tensors beside the model's, and a wrapper's prefix.
        self._names = {
            key.removeprefix("model.").removeprefix("module."): key for key in tensors if "optimizer" not in key
        }
        self._tensors = tensors
        self._storage: dict[Any, Any] = metadata.storage_data
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._streams: dict[str, io.BufferedReader] = {}
        self._known: set[Any] = set()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def find(self, keys: Iterable[str]) -> str | None:
        """The first of `keys` that is there."""
        return next((key for key in keys if key in self._names), None)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and global shape."""
        tensor = self._tensors[self._names[key]]
        return tensor.properties.dtype, tuple(tensor.size)

    def read_box(self, key: str, offset: tuple[int, ...], out: Tensor) -> None:
        """Fills `out` (contiguous, as many axes as the tensor) with the box at `offset`, from whatever chunks hold it.

        Raises ValueError where chunks are missing or a file is broken.
        """
        filled = 0
        for chunk in self._overlapping(key, offset, tuple(out.shape)):
            low = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, out.shape, chunk.offsets, chunk.sizes, strict=True)]
            into = out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))]
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            self._read_chunk(key, chunk, inside, into)
            filled += into.numel()
        if filled != out.numel():
            raise ValueError(
                f"{self.root}: {key}: got chunks for {filled} of {out.numel()} elements of the box at {offset}"
            )

    def _overlapping(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[ChunkStorageMetadata]:
        """Leading axes (layers, experts) are mostly cut to size 1: chunks are found by their place along them."""
        lead = max(len(shape) - 2, 0)
        if key not in self._chunks:
            places: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self._tensors[self._names[key]].chunks:
                single = all(size == 1 for size in chunk.sizes[:lead])
                places[tuple(chunk.offsets[:lead]) if single else ()].append(chunk)
            self._chunks[key] = places
        places = self._chunks[key]
        candidates = [*places.get(tuple(offset[:lead]), ()), *(places.get((), ()) if lead else ())]
        for chunk in candidates:
            pairs = zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)
            if all(max(a, b) < min(a + n, b + m) for a, n, b, m in pairs):
                yield chunk

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata, inside: tuple[slice, ...], into: Tensor) -> None:
        """Reads whole rows of the chunk (contiguous in its file) and copies the columns that are wanted."""
        dtype = self.describe(key)[0]
        stream, start, file = self._locate(key, chunk, dtype)
        strides = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
        rows_axis = max(len(chunk.sizes) - 2, 0)
        leading = [range(part.start, part.stop) for part in inside[:rows_axis]]
        row = inside[rows_axis]
        nbytes = (row.stop - row.start) * strides[rows_axis] * dtype.itemsize
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        for place in _indices(leading):
            at = sum(i * stride for i, stride in zip(place, strides, strict=False)) + row.start * strides[rows_axis]
            target = into[tuple(i - part.start for i, part in zip(place, inside, strict=False))]
            read_exactly(stream.fileno(), start + at * dtype.itemsize, self._scratch[:nbytes], file)
            rows = self._scratch[:nbytes].view(dtype).view(row.stop - row.start, *chunk.sizes[rows_axis + 1 :])
            target.copy_(rows[(slice(None), *inside[rows_axis + 1 :])])

    def _locate(self, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> tuple[io.BufferedReader, int, Path]:
        """The data file and where in it the chunk's raw numbers begin."""
        info = self._storage.get(MetadataIndex(self._names[key], chunk.offsets))
        if info is None:
            raise ValueError(f"{self.root / '.metadata'}: {key}: no place for the chunk at {tuple(chunk.offsets)}")
        file = self.root / info.relative_path
        if info.relative_path not in self._streams:
            if Path(info.relative_path).name != info.relative_path or not file.is_file():
                raise ValueError(f"{self.root}: {key} lies in {info.relative_path}, which is not there")
            self._streams[info.relative_path] = file.open("rb", buffering=1 << 14)
        stream = self._streams[info.relative_path]
        try:
            offset = self._check_chunk(stream, info, tuple(chunk.sizes), dtype)
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, KeyError, EOFError, OSError) as error:
            raise ValueError(f"{file}: {key}: the chunk at {tuple(chunk.offsets)} cannot be read: {error}") from None
        return stream, offset, file

    def _check_chunk(
        self, stream: io.BufferedReader, info: _StorageInfo, sizes: tuple[int, ...], dtype: torch.dtype
    ) -> int:
        """Offset of the chunk's bytes, once it is known to be a plain contiguous tensor of this shape and dtype."""
        if getattr(info, "transform_descriptors", None):
            raise RuntimeError("it is compressed, which is not supported")
        view = _Window(stream, info.offset, info.length)
        with zipfile.ZipFile(view) as archive:
            (data,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
            pickled = archive.getinfo(data.filename.removesuffix("data/0") + "data.pkl")
        nbytes = math.prod(sizes) * dtype.itemsize
        if data.compress_type != zipfile.ZIP_STORED or data.file_size != nbytes:
            raise RuntimeError(f"got {data.file_size} bytes, expected {nbytes}")
        view.seek(_data_offset(view, pickled))
        description = view.read(pickled.file_size)
        if (description, sizes, dtype) not in self._known:  # thousands of chunks have the same
            view.seek(0)
            tensor = torch.load(io.BufferedReader(view), map_location="meta", weights_only=True)
            if tuple(tensor.shape) != sizes or tensor.dtype != dtype or not tensor.is_contiguous():
                raise RuntimeError(f"got {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype} {sizes}")
            if tensor.storage_offset():
                raise RuntimeError("it is a part of a larger tensor")
            self._known.add((description, sizes, dtype))
        return info.offset + _data_offset(view, data)

    def close(self) -> None:
        """Closes the files."""
        while self._streams:
            self._streams.popitem()[1].close()


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._length - self._at), 0)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._at, 0)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        return bytes(data[: self.readinto(data)])


def _data_offset(view: _Window, entry: zipfile.ZipInfo) -> int:
    """Where a stored entry's bytes begin. ZipFile.open would check a checksum that torch need not write."""
    view.seek(entry.header_offset + 26)
    name, extra = int.from_bytes(view.read(2), "little"), int.from_bytes(view.read(2), "little")
    return entry.header_offset + 30 + name + extra


def _indices(ranges: list[range]) -> Iterator[tuple[int, ...]]:
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for rest in _indices(ranges[1:]):
            yield (first, *rest)


def metadata_of(chunks: Iterable[Stored], objects: Iterable[tuple[str, str, int, int]]) -> Metadata:
    """`.metadata` of chunks (key, global shape, offset, dtype, shape, file, position, length) and empty objects."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, global_shape, offset, dtype, shape, file, position, length in chunks:
        known = tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(global_shape), [])
        )
        storage[MetadataIndex(key, torch.Size(offset), len(known.chunks))] = _StorageInfo(file, position, length)
        known.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
    for key, tensor in tensors.items():
        held = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        assert held == math.prod(tensor.size), f"{key}: chunks hold {held} of {math.prod(tensor.size)} elements"
    for key, file, position, length in objects:
        tensors[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(file, position, length)
    return Metadata(tensors, planner_data=None, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")


def write_description(root: Path, metadata: Metadata, common: dict[str, Any]) -> None:
    """The files beside the data, the one that makes the checkpoint complete last; each flushed to the disk."""
    torch.save(common, root / "common.pt")
    with (root / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (root / COMPLETE_FILE).write_text(json.dumps(backend | {"common_backend": "torch", "common_backend_version": 1}))

"""Safetensors files of a Hugging Face directory, read and written by byte ranges: memory holds one block at a time.

The safetensors package maps whole files, and what is mapped counts as resident; here a block is read into a buffer of
the caller's. The format: 8 bytes with the header's length, a JSON header (name -> dtype, shape, data_offsets), data.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dppo.architecture import Architecture
from megatron_dppo.files import pointer_note
from megatron_dppo.weights.global_tensors import BLOCK_BYTES
from megatron_dppo.weights.mapping import hub_shapes, mtp_tensors

INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20
SCALE = "_scale_inv"  # of `X.weight` in float8, `X.weight_scale_inv`: one factor for each tile
TILE = 128
WEIGHTS = ("*.safetensors", INDEX_FILE, "*.bin", "*.pth", "*.pt", "*.gguf", "original", "onnx")  # not carried over
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """dtype and shape of a hub tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """Where it lies: `offset` bytes into `file`."""

    file: Path
    offset: int


class HubFiles:
    """All tensors of a Hugging Face directory: `tensors[name]`, and `read_rows`.

    Raises FileNotFoundError where there are no safetensors, and ValueError for a header that cannot be read, a file
    shorter or longer than its header says, a tensor in two files, and an index that does not say where tensors are.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tensors: dict[str, StoredTensor] = {}
        self._descriptors: dict[Path, int] = {}
        index = root / INDEX_FILE
        placed = _weight_map(index) if index.is_file() else None
        files = sorted(root.glob("*.safetensors")) if placed is None else sorted({root / f for f in placed.values()})
        if not files:
            raise FileNotFoundError(f"{root}: got no .safetensors files, expected a Hugging Face model directory")
        for file in files:
            for name, stored in read_header(file).items():
                if name in self.tensors:
                    raise ValueError(f"{file}: tensor {name} is in {self.tensors[name].file.name} too")
                self.tensors[name] = stored
        if placed is not None:
            self._check_index(index, placed)

    def _check_index(self, index: Path, placed: Mapping[str, str]) -> None:
        for name, file in placed.items():
            if name not in self.tensors:
                raise ValueError(f"{index}: it names tensor {name} in {file}, which has no such tensor")
            if self.tensors[name].file.name != file:
                raise ValueError(f"{index}: it names tensor {name} in {file}, it is in {self.tensors[name].file.name}")
        if unnamed := sorted(self.tensors.keys() - placed.keys()):
            raise ValueError(f"{index}: it does not name tensor {unnamed[0]} of {self.tensors[unnamed[0]].file.name}")

    def read_rows(self, name: str, row: int, rows: int, buffer: Tensor) -> Tensor:
        """Rows `row .. row + rows` in the stored dtype, in the memory of `buffer` (uint8, large enough)."""
        stored = self.tensors[name]
        out = buffer[: rows * stored.row_bytes]
        read_exactly(self._descriptor(stored.file), stored.offset + row * stored.row_bytes, out, stored.file)
        return typed(buffer, stored.dtype, (rows, *stored.shape[1:]))

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def close(self) -> None:
        """Closes the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index}: got no weight_map, expected JSON with tensor names and their files") from None
    for file in weight_map.values():
        if Path(file).name != file:
            raise ValueError(f"{index}: got the file {file!r}, expected one of the same directory")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index}: it names the file {file}, which is not there")
    return dict(weight_map)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file; raises ValueError naming the file and what is wrong with it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER_BYTES
        if length >= min(size, MAX_HEADER_BYTES):
            note = pointer_note(file) or " (its header does not fit)"
            raise ValueError(f"{file}: got {size} bytes, expected a safetensors file{note}")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{file}: its header is not JSON, expected a safetensors file") from None
    header.pop("__metadata__", None)
    tensors, start = {}, 8 + length
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name}: got dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        first, last = entry["data_offsets"]
        stored = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), file, start + first)
        if last - first != stored.nbytes:
            got, expected = last - first, stored.nbytes
            raise ValueError(f"{file}: {name}: got {got} bytes, expected {expected} for shape {stored.shape}")
        if start + last > size:
            raise ValueError(f"{file}: truncated: got {size} bytes, expected at least {start + last} ({name})")
        tensors[name] = stored
    return tensors


def read_exactly(descriptor: int, offset: int, out: Tensor, file: Path) -> None:
    """Fills `out` (contiguous uint8) with the bytes at `offset`; raises ValueError where the file ends before."""
    view = _memory(out)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count <= 0:
            raise ValueError(f"{file}: truncated: got {offset + done} bytes, expected at least {offset + len(view)}")
        done += count


def write_exactly(descriptor: int, offset: int, values: Tensor) -> None:
    """Writes the bytes of `values` (contiguous, on the CPU) at `offset`."""
    view = _memory(values.reshape(-1).view(torch.uint8))
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def typed(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The head of a uint8 buffer as a tensor with no larger storage than its own: torch.save writes whole storages."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_memory(buffer[: count * dtype.itemsize]), dtype=dtype).view(shape)


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def header_bytes(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The head of a safetensors file whose data are these tensors one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        span = [offset, offset + info.nbytes]
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def check_tensors(files: HubFiles, arch: Architecture) -> list[str]:
    """That the files hold the model's tensors; returns what is left out (MTP layers, what follows from the rest).

    Raises ValueError naming the first tensor that is missing, misshapen or unknown, and its file.
    """
    expected, stored = hub_shapes(arch), files.tensors
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{files.root}: got no tensor {name}, expected it for {arch.model_type}")
        if stored[name].shape != shape:
            raise ValueError(f"{stored[name].file}: {name}: got shape {stored[name].shape}, expected {shape}")
        if not stored[name].dtype.is_floating_point:
            raise ValueError(f"{stored[name].file}: {name}: got {stored[name].dtype}, expected floating point")
        if stored[name].dtype == torch.float8_e4m3fn:
            tiles = tuple(-(-extent // TILE) for extent in shape)
            if name + SCALE not in stored or stored[name + SCALE].shape != tiles:
                raise ValueError(f"{stored[name].file}: {name} is float8, expected {name + SCALE} of shape {tiles}")
    skipped = [name for name in mtp_tensors(arch, stored) if name not in expected]
    skipped += [name for name in stored if name not in expected and _is_derived(name, arch)]
    known = {*expected, *skipped, *(name + SCALE for name in expected)}
    for name in stored.keys() - known:
        raise ValueError(f"{stored[name].file}: got tensor {name}, which {arch.model_type} does not have")
    return skipped


def _is_derived(name: str, arch: Architecture) -> bool:
    """What some files hold beside the parameters: rope tables, a tied head written out."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and arch.tie_word_embeddings)


def row_blocks(tensor: TensorInfo) -> Iterator[tuple[int, int]]:
    """(first row, rows) of blocks of at most `BLOCK_BYTES`."""
    most = max(1, BLOCK_BYTES // max(tensor.row_bytes, 1))
    yield from ((row, min(most, tensor.shape[0] - row)) for row in range(0, tensor.shape[0], most))


def block_buffer(tensors: Mapping[str, TensorInfo]) -> Tensor:
    """uint8, for any block that `row_blocks` gives of these tensors."""
    return torch.empty(max(BLOCK_BYTES, *(info.row_bytes for info in tensors.values())), dtype=torch.uint8)


def read_values(files: HubFiles, name: str, row: int, rows: int, buffer: Tensor) -> Tensor:
    """As `HubFiles.read_rows`; float8 as fp32, each 128 x 128 tile times its factor."""
    stored = files.read_rows(name, row, rows, buffer)
    if stored.dtype != torch.float8_e4m3fn:
        return stored
    scales = files.tensors[name + SCALE]
    first, last = row // TILE, -(-(row + rows) // TILE)
    own = torch.empty((last - first) * scales.row_bytes, dtype=torch.uint8)
    scale = files.read_rows(name + SCALE, first, last - first, own).float()
    by_row = scale.repeat_interleave(TILE, 0)[row - first * TILE :][:rows]
    return stored.float() * by_row.repeat_interleave(TILE, 1)[:, : stored.shape[1]]


def carry_description(source: Path, destination: Path, dtype: torch.dtype | None) -> None:
    """Copies everything of a Hugging Face directory but its weights: config, tokenizer, whatever else is there.

    config.json then says the new dtype (None: the old one), no quantisation, and no layers of multi-token prediction:
    what is written beside it has neither.
    """
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
    config = json.loads((destination / "config.json").read_text())
    quantised = config.pop("quantization_config", None) is not None
    if dtype is not None or quantised:
        config.pop("torch_dtype", None)  # the older name
        config["dtype"] = str(dtype or torch.bfloat16).removeprefix("torch.")
    for name in {"num_nextn_predict_layers", "num_mtp_layers"} & config.keys():
        config[name] = 0
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")

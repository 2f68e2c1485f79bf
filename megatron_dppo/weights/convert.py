"""Hugging Face directory to Megatron torch_dist checkpoint and back, streamed: memory holds one block a process.

The work is cut into files before it begins. They are written in `DESTINATION.partial`, each under another name until it
is complete; the directory is renamed when all are. What a job that was killed has finished is kept: the same call goes
on where it stopped.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.weights import torch_dist
from megatron_dppo.weights.global_tensors import (
    Block,
    KeyScheme,
    content_metadata,
    default_scheme,
    extra_states,
    global_blocks,
)
from megatron_dppo.weights.hub_files import (
    INDEX_FILE,
    HubFiles,
    TensorInfo,
    block_buffer,
    carry_description,
    check_tensors,
    header_bytes,
    read_values,
    row_blocks,
)
from megatron_dppo.weights.mapping import float32_tensors
from megatron_dppo.weights.megatron_files import CARRIED, MegatronFiles, carried_config

FILE_BYTES = 2 << 30
WIDEST = 4  # bytes of an element, to size blocks before their dtypes are known
Say = Callable[[str], None]
Job = Callable[[Any], None]  # of the open source


def hf_to_megatron(
    source: Path,
    destination: Path,
    *,
    scheme: KeyScheme | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 1,
    say: Say = print,
) -> None:
    """Writes a torch_dist checkpoint that Megatron's dist_checkpointing loads at any layout.

    `scheme`: how its tensors are spelled (`global_tensors`; None: Megatron's default while that scales). `dtype`: of
    the result (None: the source's; float8 becomes bfloat16). The source's config and tokenizer go along, in `hf/`.
    Raises ValueError and OSError naming the file and the tensor; the destination is there when it is complete.
    """
    arch = load_architecture(source)
    scheme = scheme or default_scheme(arch)
    files = HubFiles(source)
    if skipped := check_tensors(files, arch):
        say(f"{len(skipped)} tensors are left out, {skipped[0]} first: this package does not compute them")
    if dtype is None and any(info.dtype == torch.float8_e4m3fn for info in files.tensors.values()):
        dtype = torch.bfloat16
    dtypes = _result_dtypes(files.tensors, arch, dtype)
    blocks = sorted(global_blocks(arch, scheme, WIDEST), key=lambda b: _place(files, b))
    _check_dtypes(blocks, files, dtypes)
    parts = _cut(blocks, [b.rows * files.tensors[b.tensor].row_bytes for b in blocks])
    with _partial(destination, _digest(files.tensors, scheme, dtype), say) as partial:
        names = [f"__0_{index}.distcp" for index in range(len(parts))]
        jobs = [
            functools.partial(_write_chunks, path=partial / name, blocks=part, dtypes=dtypes)
            for name, part in zip(names, parts, strict=True)
            if not ((partial / name).is_file() and _places_file(partial / name).is_file())
        ]
        _run(jobs, files, functools.partial(HubFiles, source), workers, say)
        chunks = [
            (key, block.global_shape, block.offset, dtypes[block.tensor], block.shape, name, *place)
            for name, part in zip(names, parts, strict=True)
            for block, place in zip(part, json.loads(_places_file(partial / name).read_text()), strict=True)
            for key in block.keys
        ]  # fmt: skip
        blob = partial / "__0_extra.distcp"
        torch.save([None], blob)
        size = blob.stat().st_size
        objects = [(key, blob.name, 0, size) for key in extra_states(arch, scheme)]
        carry_description(source, partial / CARRIED, dtype)
        for name in names:
            _places_file(partial / name).unlink()
        common = {"content_metadata": content_metadata(scheme)}
        torch_dist.write_description(partial, torch_dist.metadata_of(chunks, objects), common)
    files.close()


def megatron_to_hf(
    source: Path,
    destination: Path,
    *,
    config: Path | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 1,
    say: Say = print,
) -> None:
    """Writes safetensors files with an index that transformers and vLLM load, config and tokenizer beside them.

    `config`: the Hugging Face directory that describes the model, where the checkpoint does not carry one.
    `dtype`, errors and completeness as in `hf_to_megatron`.
    """
    described = config or carried_config(source)
    checkpoint = MegatronFiles(source, load_architecture(described))
    dtypes = _result_dtypes(checkpoint.tensors, checkpoint.arch, dtype)
    tensors = {name: TensorInfo(dtypes[name], info.shape) for name, info in checkpoint.tensors.items()}
    parts = _cut(list(tensors), [info.nbytes for info in tensors.values()])
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = ["model.safetensors"]
    signature = {name: checkpoint.tensors[name] for name in tensors}
    with _partial(destination, _digest(signature, source.resolve(), _changed(source), dtype), say) as partial:
        jobs = [
            functools.partial(_write_tensors, path=partial / name, tensors={n: tensors[n] for n in part})
            for name, part in zip(names, parts, strict=True)
            if not (partial / name).is_file()
        ]
        _run(jobs, checkpoint, functools.partial(MegatronFiles, source, checkpoint.arch), workers, say)
        carry_description(described, partial, dtype)
        if len(parts) > 1:
            weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            total = sum(info.nbytes for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    checkpoint.close()


def _write_chunks(files: HubFiles, path: Path, blocks: Sequence[Block], dtypes: Mapping[str, torch.dtype]) -> None:
    """One data file, and beside it where its chunks lie."""
    torch.serialization.set_crc32_options(False)  # torch does not read it back
    buffer = block_buffer(files.tensors)
    places = []
    with _written(path) as out:
        for block in blocks:
            rows = read_values(files, block.tensor, block.row, block.rows, buffer).to(dtypes[block.tensor])
            start = out.tell()
            torch.save(rows.view(block.shape), out)
            places.append((start, out.tell() - start))
        _places_file(path).write_text(json.dumps(places))  # before the data file gets its name


def _write_tensors(checkpoint: MegatronFiles, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """One safetensors file."""
    buffer = block_buffer(checkpoint.tensors)
    with _written(path) as out:
        out.write(header_bytes(tensors))
        for name, info in tensors.items():
            for row, rows in row_blocks(checkpoint.tensors[name]):
                block = checkpoint.read_rows(name, row, rows, buffer).to(info.dtype)
                out.write(block.reshape(-1).view(torch.uint8).numpy().data)


def _result_dtypes(
    tensors: Mapping[str, TensorInfo], arch: Architecture, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Of every tensor: `dtype` where one is asked for, but for what Megatron keeps in float32."""
    fixed = float32_tensors(arch)
    return {
        name: dtype if dtype and info.dtype.is_floating_point and name not in fixed else info.dtype
        for name, info in tensors.items()
    }


def _check_dtypes(blocks: Sequence[Block], files: HubFiles, dtypes: Mapping[str, torch.dtype]) -> None:
    """A Megatron tensor is made of several hub tensors, and has one dtype."""
    first: dict[str, tuple[str, torch.dtype]] = {}
    for block in blocks:
        own = dtypes[block.tensor]
        name, other = first.setdefault(block.keys[0], (block.tensor, own))
        if own != other:
            raise ValueError(
                f"{files.root}: {name} is {other} and {block.tensor} {own}, expected one dtype: they are one tensor in "
                "Megatron; choose one with --dtype"
            )


def _place(files: HubFiles, block: Block) -> tuple[Path, int]:
    stored = files.tensors[block.tensor]
    return stored.file, stored.offset + block.row * stored.row_bytes


def _places_file(path: Path) -> Path:
    return path.with_suffix(".places.json")


def _cut(items: Sequence[Any], nbytes: Sequence[int]) -> list[list[Any]]:
    """Consecutive items in groups of at most FILE_BYTES, or of one."""
    groups: list[list[Any]] = []
    size = 0
    for item, n in zip(items, nbytes, strict=True):
        if not groups or size + n > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += n
    return groups


def _run(jobs: Sequence[Job], source: Any, open_source: Callable[[], Any], workers: int, say: Say) -> None:
    """Calls each job with the open source; a worker process opens its own, once. The first error ends it; the jobs
    that are done stay done."""
    if workers <= 1 or len(jobs) <= 1:
        for done, job in enumerate(jobs):
            job(source)
            say(f"{done + 1} of {len(jobs)} files")
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _open_once, (open_source,)) as pool:
        try:
            for done, future in enumerate([pool.submit(_with_source, job) for job in jobs]):
                future.result()
                say(f"{done + 1} of {len(jobs)} files")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_opened: Any = None  # in a worker process: its source


def _open_once(open_source: Callable[[], Any]) -> None:
    global _opened
    _opened = open_source()


def _with_source(job: Job) -> None:
    job(_opened)


def _digest(tensors: Mapping[str, TensorInfo], *options: Any) -> str:
    """Of everything that decides what is written."""
    text = repr((sorted((name, repr(info)) for name, info in tensors.items()), options))
    files = sorted({info.file for info in tensors.values() if hasattr(info, "file")})
    text += repr([(file.resolve(), _changed(file)) for file in files])
    return hashlib.sha256(text.encode()).hexdigest()


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


@contextmanager
def _partial(destination: Path, digest: str, say: Say) -> Iterator[Path]:
    """`DESTINATION.partial`, renamed to `destination` at the end; kept, for the next try, when something fails."""
    if destination.exists():
        raise FileExistsError(f"{destination}: it is there already, expected a new directory")
    partial = destination.with_name(destination.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (destination.with_name(destination.name + ".lock")).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{partial}: another process is writing there") from None
        plan = partial / "plan"
        if not plan.is_file() or plan.read_text() != digest:
            shutil.rmtree(partial)
            partial.mkdir()
            plan.write_text(digest)
        elif finished := [f for f in partial.iterdir() if f.suffix in (".distcp", ".safetensors")]:
            say(f"going on after {len(finished)} files of an earlier try")
        yield partial
        plan.unlink()
        os.replace(partial, destination)
        Path(lock.name).unlink()


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once its bytes are on the disk."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb", buffering=1 << 20) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno or 0)}") from error

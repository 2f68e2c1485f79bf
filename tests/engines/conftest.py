"""One real server a session and engine, on a tiny random Qwen3-MoE in fp32, and what to compare it with."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megatron_dppo.job.engine_server import wait_ready
from megatron_dppo.job.processes import Child, free_port, start
from megatron_dppo.rollout.engine import RolloutEngine
from megatron_dppo.weights.update import FileUpdate
from tests.engines.kinds import KIND, Kind
from tests.tiny_models import hub_tensors, tiny_config, tiny_model, write_checkpoint

READY_DEADLINE_S = 300.0


@pytest.fixture(scope="session", autouse=True)
def _no_interpreter() -> Iterator[None]:
    """Engines compile what they have; Triton's interpreter is for tests/head."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    yield
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before


@dataclass(frozen=True)
class Served:
    """A running engine and the model that it was started with."""

    kind: Kind
    url: str
    child: Child
    model_dir: Path
    model: PreTrainedModel

    def connect(self, **kwargs: object) -> AbstractAsyncContextManager[RolloutEngine]:
        """A fresh client, closed when the block is left."""

        @asynccontextmanager
        async def client() -> AsyncIterator[RolloutEngine]:
            engine = self.kind.client(self.url, self.model_dir, **kwargs)
            try:
                yield engine
            finally:
                await engine.close()

        return client()


def descendants(pid: int) -> list[int]:
    """Ids of all living descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def serving(
    config: pytest.Config,
    directory: Path,
    model: PreTrainedModel,
    **options: Any,
) -> Iterator[Served]:
    """A server on `model`, in fp32, with what `options` and `extra` add to its command line; it ends with the block."""
    model_dir, port = write_checkpoint(directory / "model", model), free_port()
    argv, env = KIND.server(config, model_dir, port, **options)
    child = start(KIND.name, argv, env=env, log_path=directory / "server.log")
    family: list[int] = []
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, child, READY_DEADLINE_S)
        family = descendants(child.pid)
        yield Served(KIND, url, child, model_dir, model)
    finally:
        child.stop()
        left = [pid for pid in family if alive(pid)]
        assert not left, f"processes {left} of the engine are still running"


@pytest.fixture(scope="session", params=KIND.tensor_parallel, ids=lambda workers: f"tp{workers}")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Layer 0 dense, so that the recorded routes of layer 1 alone are right only if layers are told apart.
    model = tiny_model(tiny_config(mlp_only_layers=(0,) if KIND.dense_layers else ()), seed=0)
    directory, workers = tmp_path_factory.mktemp("engine"), request.param
    with serving(
        request.config, directory, model, routed_experts=True, tensor_parallel_size=workers
    ) as engine:  # fmt: skip
        yield engine


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, trajectory, temperature: float) -> np.ndarray:
    """transformers' fp32 log-probs of all tokens at each response position, f32[R, V]."""
    ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64)
    logits = model(torch.from_numpy(ids)[None]).logits[0, trajectory.prompt_length - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1).numpy()


@dataclass(frozen=True)
class Weights:
    """A model's weights as a file in shared memory, with what the engine should say about them."""

    update: FileUpdate
    checksums: dict[str, int]


def share(directory: Path, tensors: dict[str, torch.Tensor], version: int, *, with_crc32: bool = True) -> Weights:
    """Write `tensors` one after another, each at a multiple of 64 bytes, into a new file in `directory`."""
    path = directory / f"weights-{uuid4().hex}"
    entries, crc32, sums, offset = [], [], {}, 0
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            file.seek(offset)
            file.write(data)
            entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
            crc32.append(zlib.crc32(data))
            sums[name] = (
                sum((2 * i + 1) * bits for i, bits in enumerate(np.frombuffer(data, np.int32).tolist())) % 2**64
            )
            offset += (len(data) + 63) // 64 * 64
        file.truncate(offset)
    crcs = tuple(crc32) if with_crc32 else None
    return Weights(FileUpdate(version, str(path), tuple(entries), offset, crcs, fingerprints=with_crc32), sums)


@pytest.fixture
def shared_memory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory for weight files that is removed with them."""
    import shutil

    directory = Path("/dev/shm") / f"megatron-dppo-test-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def other(served: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of the same shape with other weights, and its tensors under their hub names."""
    model = tiny_model(served.model.config, seed=1)
    return model, hub_tensors(write_checkpoint(tmp_path_factory.mktemp("other"), model))


@pytest.fixture(scope="session")
def original(served: Served) -> dict[str, torch.Tensor]:
    """The tensors that the engine was started with."""
    return hub_tensors(served.model_dir)

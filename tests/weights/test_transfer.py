"""Plans carried out over real process groups: every rank and worker a thread with a gloo group of its own."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights import transfer
from megatron_dppo.weights.channels import GroupChannel, TransferError
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout
from megatron_dppo.weights.ipc import IpcChannel
from megatron_dppo.weights.layout import Box, Parallel, Piece, megatron_layout, parameter_shapes
from megatron_dppo.weights.mapping import hub_dtypes, hub_shapes
from megatron_dppo.weights.plan import Plan, sync_plan
from megatron_dppo.weights.transfer import (
    Receiver,
    Sender,
    check_share,
    join_as_rank,
    join_as_worker,
)
from megatron_dppo.weights.update import GroupUpdate
from tests.weights.architectures import ARCHITECTURES, SMALL

CPU = torch.device("cpu")
BUCKET_BYTES = 600
TIMEOUT_S = 20.0


def hub_numbers(arch: Architecture, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in hub_shapes(arch).items()}


def parameters_of(pieces: list[Piece], hub: dict[str, Tensor]) -> dict[str, Tensor]:
    """A rank's parameters in fp32, whatever is sent."""
    parameters = {name: torch.zeros(shape) for name, shape in parameter_shapes(pieces).items()}
    for piece in pieces:
        parameters[piece.param][piece.local_index] = hub[piece.tensor][piece.hub_index]
    return parameters


class Job:
    """A plan and everybody who takes part in it."""

    def __init__(
        self, arch: Architecture, trainer: Parallel, engine: EngineParallel, instances: int, one_machine: bool = False
    ) -> None:
        self.arch, self.instances, self.one_machine = arch, instances, one_machine
        self.pieces = [list(megatron_layout(arch, trainer, rank)) for rank in range(trainer.ranks)]
        self.boxes: list[list[Box]] = [list(engine_layout(arch, engine, w)) for w in range(engine.workers)]
        dtypes = hub_dtypes(arch, "bfloat16")
        self.plan = sync_plan(
            self.pieces, self.boxes, dtypes, bucket_bytes=BUCKET_BYTES, instances=instances, min_cut_bytes=64
        )
        self.dtypes = {name: getattr(torch, dtype) for name, dtype in dtypes.items()}

    def run(self, *hubs: dict[str, Tensor]) -> list[list[Any]]:
        """One update a set of numbers; what each worker has after each, by instance and worker."""
        store = dist.HashStore()
        ranks, workers = len(self.pieces), len(self.boxes)

        def meeting(instance: int) -> GroupUpdate:
            return GroupUpdate(1, "", "", 7, ranks, instance, self.instances, TIMEOUT_S, self.one_machine)

        def rank(number: int) -> None:
            sender = Sender(self.plan, number, join_as_rank(store, meeting(0), number, workers, CPU), ranks)
            assert sender.staging_bytes <= 2 * (BUCKET_BYTES + 16 * ranks)
            for hub in hubs:
                sender.send(parameters_of(self.pieces[number], hub))

        def worker(instance: int, number: int) -> list[dict[str, Tensor]]:
            plan = Plan.from_bytes(self.plan.select(dst=number).to_bytes())
            check_share(plan, self.boxes[number])
            channels = join_as_worker(store, meeting(instance), number, workers, CPU)
            receiver = Receiver(plan, number, instance, *channels)
            assert receiver.staging_bytes <= 2 * (BUCKET_BYTES + 16 * ranks)
            return [self._receive(receiver) for _ in hubs]

        jobs: list[Callable[[], Any]] = [lambda r=r: rank(r) for r in range(ranks)]  # type: ignore[misc]
        jobs += [lambda i=i, w=w: worker(i, w) for i in range(self.instances) for w in range(workers)]  # type: ignore[misc]
        with ThreadPoolExecutor(len(jobs)) as pool:
            futures = [pool.submit(job) for job in jobs]
            return [future.result() for future in futures[ranks:]]

    def _receive(self, receiver: Receiver) -> dict[str, Tensor]:
        found = {n: torch.full(s, torch.nan).to(self.dtypes[n]) for n, s in hub_shapes(self.arch).items()}

        def place(tensor: str, start: Any, stop: Any, part: Tensor) -> None:
            target = found[tensor] if found[tensor].dim() == 2 else found[tensor][:, None]
            target = target[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
            assert target.isnan().all()  # once only
            target.copy_(part)

        receiver.receive(place)
        return found

    def check(self, answers: list[list[dict[str, Tensor]]], hubs: list[dict[str, Tensor]]) -> None:
        for number, answer in enumerate(answers):
            boxes = self.boxes[number % len(self.boxes)]
            for hub, found in zip(hubs, answer, strict=True):
                for box in boxes:
                    expected = hub[box.tensor][box.hub_index].to(self.dtypes[box.tensor])
                    assert torch.equal(found[box.tensor][box.hub_index], expected), box
                kept = sum(math.prod(b - a for a, b in zip(x.start, x.stop, strict=True)) for x in boxes)
                assert sum(int((~t.isnan()).sum()) for t in found.values()) == kept


@pytest.mark.parametrize("one_machine", [False, True], ids=["group", "ipc"])
@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize(
    ("family", "trainer", "engine"),
    [
        ("qwen3_moe", Parallel(), EngineParallel()),
        ("qwen3_moe", Parallel(tensor=2, expert=2, ranks=2), EngineParallel(tensor=2)),
        ("tied", Parallel(pipeline=2, virtual=2, ranks=4), EngineParallel(tensor=2, expert_parallel=True)),
        ("deepseek_v3", Parallel(tensor=2, expert_tensor=2, ranks=4), EngineParallel(tensor=2)),
    ],
)
def test_every_worker_gets_its_boxes(
    family: str, trainer: Parallel, engine: EngineParallel, instances: int, one_machine: bool
) -> None:
    """Three updates over the same channels; fp32 parameters, bfloat16 on the wire but for the routers' biases."""
    job = Job(ARCHITECTURES[family], trainer, engine, instances, one_machine)
    assert job.plan.num_buckets > 4
    hubs = [hub_numbers(job.arch, seed) for seed in range(3)]
    job.check(job.run(*hubs), hubs)


@pytest.mark.parametrize("place", [3, -9], ids=["begin", "end"])
def test_a_damaged_message_is_named(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Wherever the damage is: behind the last number is only the checksum, of 8 bytes."""
    pack = transfer._pack

    def damage(message: transfer.Message, buffer: Tensor, parameters: Any) -> None:
        pack(message, buffer, parameters)
        if any(part.tensor == "model.layers.2.input_layernorm.weight" for part in message.parts):
            buffer[place] ^= 1

    monkeypatch.setattr(transfer, "_pack", damage)
    monkeypatch.setattr("tests.weights.test_transfer.TIMEOUT_S", 2.0)
    job = Job(SMALL, Parallel(), EngineParallel(), 1)
    with pytest.raises(TransferError, match=r"bucket \d+ from trainer rank 0 \(model.*\): got checksum"):
        job.run(hub_numbers(SMALL, 0))


@pytest.mark.parametrize("kind", [GroupChannel, IpcChannel])
def test_who_stays_silent_is_named(kind: type[GroupChannel] | type[IpcChannel]) -> None:
    store = dist.HashStore()
    plan = Job(SMALL, Parallel(), EngineParallel(), 1).plan
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda number: kind(store, "one", number, 2, CPU, 1.0), range(2)))
    with pytest.raises(TransferError, match="channel one: receiving bucket 0, at most 1 s"):
        Receiver(plan, 0, 0, ends[1]).receive(lambda *_: None)


@pytest.mark.parametrize("kind", [GroupChannel, IpcChannel])
def test_who_does_not_come_is_named(kind: type[GroupChannel] | type[IpcChannel]) -> None:
    with pytest.raises(TransferError, match="channel alone: 2 processes did not meet in 1 s"):
        kind(dist.HashStore(), "alone", 0, 2, CPU, 1.0)


def test_a_plan_travels_unchanged() -> None:
    plan = Job(SMALL, Parallel(tensor=2, ranks=4), EngineParallel(tensor=2), 2).plan
    assert Plan.from_bytes(plan.to_bytes()).digest() == plan.digest()
    shares = [plan.select(dst=w) for w in range(2)]
    assert sum(len(share.bucket) for share in shares) == len(plan.bucket)
    assert {share.num_buckets for share in shares} == {plan.num_buckets}


def test_a_plan_for_other_boxes_is_refused() -> None:
    job = Job(SMALL, Parallel(), EngineParallel(tensor=2), 1)
    share = job.plan.select(dst=0)
    check_share(share, job.boxes[0])
    with pytest.raises(ValueError, match=r"the plan sends model.embed_tokens.weight \[0, 0\] to .* does not keep"):
        check_share(share, job.boxes[1])
    with pytest.raises(ValueError, match="the plan sends 0 elements of more, expected 6"):
        check_share(share, [*job.boxes[0], Box("more", (0,), (6,))])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_memory_is_mapped_by_another_process() -> None:
    """CUDA IPC, three messages one behind the other from one buffer that does not begin its allocation."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sender = context.Process(target=_send_over_ipc, args=(server.port, theirs))
    sender.start()
    channel = IpcChannel(server, "gpu", 0, 2, torch.device("cuda", 0), TIMEOUT_S)
    for number in range(3):
        found = torch.zeros(1000, dtype=torch.uint8, device="cuda")
        channel.receive(found, 1, 0).wait(timedelta(seconds=TIMEOUT_S))
        assert found.tolist() == [(i + number) % 251 for i in range(1000)]
    assert ours.recv() == "sent"
    sender.join()


def _send_over_ipc(port: int, done: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    channel = IpcChannel(store, "gpu", 1, 2, torch.device("cuda", 0), TIMEOUT_S)
    buffer = channel.allocate(5000)[512:]
    channel.register([buffer])
    for number in range(3):
        buffer[100:1100] = (torch.arange(1000, device="cuda") + number) % 251
        channel.send(buffer[100:1100], 0, 0).wait(timedelta(seconds=TIMEOUT_S))
    done.send("sent")

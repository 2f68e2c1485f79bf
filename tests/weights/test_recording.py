"""Loaders of every kind, recorded and repeated: the parameters come out as the loaders would have made them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from megatron_dppo.weights.hub_files import TensorInfo
from megatron_dppo.weights.layout import Box
from megatron_dppo.weights.recording import apply_step, record, steps, storage_of

SHAPES = {
    "q": (8, 6),
    "k": (4, 6),
    "down": (6, 10),
    "expert": (3, 4, 6),
    "norm": (6,),
    "table": (5, 6),
    "scaled": (4, 6),
}
TENSORS = {name: TensorInfo(torch.float32, shape) for name, shape in SHAPES.items()}


class Worker(nn.Module):
    """Rank 1 of two: fused rows, columns, experts of which it has two, a padded table, a transposed copy."""

    def __init__(self, device: str) -> None:
        super().__init__()

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device), requires_grad=False)

        self.qk, self.down, self.experts = make(6, 6), make(6, 5), make(2, 4, 6)
        self.norm, self.table, self.down_t, self.scaled = make(6), make(3, 6), make(10, 6), make(4, 6)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, loaded in weights:
            if name == "q":
                self.qk.data.narrow(0, 0, 4).copy_(loaded.narrow(0, 4, 4))
            elif name == "k":
                self.qk.data[4:].copy_(loaded.chunk(2)[1])
            elif name == "down":
                self.down.data.copy_(loaded[:, 5:])
                self.down_t.data.copy_(loaded.t())
            elif name == "expert":
                for index, one in enumerate(loaded.unbind(0)):
                    if index:
                        self.experts.data[index - 1] = one
            elif name == "norm":
                assert loaded.shape == self.norm.shape and loaded.dtype == torch.float32
                self.norm.data.copy_(loaded.view(1, -1).squeeze(0))
            elif name == "table":
                self.table.data[:2].copy_(loaded[3:5])
            elif name == "scaled":
                self.scaled.data.copy_(loaded * 2)


def numbers() -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in SHAPES.items()}


def cut(box: Box, rows: int) -> list[Box]:
    """A box in parts of at most so many rows."""
    (first, *start), (last, *stop) = box.start, box.stop
    return [Box(box.tensor, (row, *start), (min(row + rows, last), *stop)) for row in range(first, last, rows)]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_what_was_recorded_is_repeated(rows: int) -> None:
    worker = Worker("meta")
    recording = record(worker.load_weights, TENSORS)
    assert recording.whole == {"scaled": "its loader computes aten.mul.Tensor"}
    expected = Worker("cpu")
    expected.load_weights(numbers().items())

    repeated = Worker("cpu")
    places = {storage_of(p): repeated.get_parameter(name).data.view(-1) for name, p in worker.named_parameters()}
    read = 0
    for box in recording.boxes():
        for part_of in cut(box, rows):
            part = numbers()[box.tensor][part_of.hub_index].contiguous()
            read += part.numel()
            for step in steps(recording.copies[box.tensor], part_of.start, part_of.stop):
                apply_step(step, part.view(-1), places[step.target])
    assert read == 4 * 6 + 2 * 6 + 6 * 10 + 2 * 4 * 6 + 6 + 2 * 6  # `down` once, though it is copied twice
    for name, parameter in expected.named_parameters():
        if name != "scaled":
            assert torch.equal(repeated.get_parameter(name), parameter), name


def test_boxes_are_those_a_worker_keeps() -> None:
    recording = record(Worker("meta").load_weights, TENSORS)
    assert list(recording.boxes()) == [
        Box("q", (4, 0), (8, 6)),
        Box("k", (2, 0), (4, 6)),
        Box("down", (0, 0), (6, 10)),
        Box("expert", (1, 0, 0), (2, 4, 6)),
        Box("expert", (2, 0, 0), (3, 4, 6)),
        Box("norm", (0,), (6,)),
        Box("table", (3, 0), (5, 6)),
    ]


def test_recording_writes_nothing() -> None:
    """Also where a parameter has memory already: what a loader writes into directly stays as it is."""
    worker = Worker("cpu")
    for parameter in worker.parameters():
        parameter.data.fill_(7.0)
    tensors = {name: info for name, info in TENSORS.items() if name != "scaled"}
    record(worker.load_weights, tensors)
    assert all((p == 7).all() for p in worker.parameters())


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (lambda p, w: p.copy_(w.flatten()[3:27].view(4, 6)), "copies (4, 6), which is no box of it"),
        (lambda p, w: p.copy_(w[::2]), "copies (4, 6), which is no box of it"),
        (lambda p, w: p.copy_(w[0]), "copies (6,), which is no box of it"),  # broadcast
        (lambda p, w: p.copy_(w[:4].double()), "computes aten._to_copy.default"),
        (lambda p, w: p.copy_(torch.cat([w[:2], w[6:]])), "computes aten.cat.default"),
    ],
)
def test_what_cannot_be_followed_is_named(load: object, why: str) -> None:
    parameter = torch.zeros(4, 6, device="meta")

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, loaded in weights:
            load(parameter, loaded)  # type: ignore[operator]

    recording = record(load_weights, {"q": TENSORS["q"]})
    assert recording.whole == {"q": f"its loader {why}"}
    assert list(recording.boxes()) == []

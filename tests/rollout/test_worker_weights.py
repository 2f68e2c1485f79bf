"""What a worker says of its weights when an update does not come to its end; in real engines: tests/engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_dppo.rollout.worker_weights import UNUSABLE, WorkerWeights
from megatron_dppo.weights.transfer import Index, Place, TransferError
from megatron_dppo.weights.update import GroupUpdate

GROUP = vars(GroupUpdate(3, "here:1", "digest", 1, 1, 0, 1, timeout_s=1.0))


class Reload:
    """Of a model of one tensor, which takes it row by row."""

    boxes = ((("a", (0, 0), (2, 2))),)
    whole: dict[str, str] = {}
    unreached: list[str] = []

    def __init__(self) -> None:
        self.model, self.placed = torch.zeros(2, 2), 0

    def begin(self) -> None:
        self.placed = 0

    def place(self, tensor: str, start: Index, stop: Index, part: torch.Tensor) -> None:
        self.model[start[0] : stop[0]] = part
        self.placed += stop[0] - start[0]

    def finish(self) -> None:
        if self.placed != 2:
            raise RuntimeError("parts are missing")


class Receiver:
    """Brings so many rows of ones, and then fails unless that is all."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def receive(self, place: Place) -> None:
        for row in range(self.rows):
            place("a", (row, 0), (row + 1, 2), torch.ones(1, 2))
        if self.rows < 2:
            raise TransferError("bucket 1 did not come")


@pytest.fixture
def worker(tmp_path: Path) -> WorkerWeights:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    reload: Any = Reload()
    return WorkerWeights(0, tmp_path, torch.device("cpu"), lambda _: reload)


@pytest.mark.parametrize("rows", [0, 1])
def test_weights_that_came_in_part_are_of_no_version(
    worker: WorkerWeights, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Neither the old one nor the new one, until all of an update has come."""
    monkeypatch.setattr(worker, "_receiver", lambda _: Receiver(rows))
    with pytest.raises(TransferError, match="bucket 1 did not come"):
        worker.receive(3, group=GROUP)
    assert worker.state() == {"version": UNUSABLE, "updates": 0}
    with pytest.raises(RuntimeError, match="nothing is staged"):
        worker.finish()
    monkeypatch.setattr(worker, "_receiver", lambda _: Receiver(2))
    worker.receive(3, group=GROUP)
    assert worker.state() == {"version": UNUSABLE, "updates": 0}  # the model does not compute before the end
    worker.finish()
    assert worker.state() == {"version": 3, "updates": 1}
    assert torch.equal(worker.reload.model, torch.ones(2, 2))  # type: ignore[attr-defined]

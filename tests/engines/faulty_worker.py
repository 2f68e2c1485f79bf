"""A worker extension that fails in the middle of a weight reload when told to. For tests only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from megatron_dppo.rollout.vllm_worker import WorkerExtension


class FaultyExtension(WorkerExtension):
    def mdppo_fail_next_load(self, after: int) -> dict[str, Any]:
        """Let the next reload load `after` tensors and then raise; the one after it is sound again."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        sound = model.load_weights

        def faulty(weights: Iterator[Any]) -> None:
            model.load_weights = sound
            sound(islice(weights, after))
            raise RuntimeError(f"injected fault after {after} tensors")

        model.load_weights = faulty
        return {}

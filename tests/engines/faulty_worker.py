"""A worker extension that tells of its parameters, and fails during an update when told to. For tests only."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_dppo.rollout.vllm import cpu as vllm_cpu
from megatron_dppo.rollout.vllm.worker import WorkerExtension
from tests.engines.faults import at_box


class FaultyExtension(WorkerExtension):
    def mdppo_fail_next_load(self, after: int) -> dict[str, Any]:
        """Let the next reload take `after` boxes and then raise; the one after it is sound again."""

        def fail(*box: Any) -> None:
            raise RuntimeError(f"injected fault after {after} tensors")

        return self._at_box(after, fail)

    def test_exit_next_load(self, after: int) -> dict[str, Any]:
        """Let this process end in the next reload, when `after` boxes are taken."""
        return self._at_box(after, lambda *box: os._exit(7))

    def test_stall_next_load(self, after: int, seconds: float) -> dict[str, Any]:
        """Let the next reload stop for a while when `after` boxes are taken."""
        return self._at_box(after, lambda *box: time.sleep(seconds))

    def test_damage_next_load(self, after: int) -> dict[str, Any]:
        """Let the next reload take other numbers than came."""
        return self._at_box(after, lambda *box: box[-1].add_(1.0))

    def test_forget_routes(self, forget: bool) -> dict[str, Any]:
        """Let routers' choices go unrecorded: zeros are returned for them; or record them again."""
        capturer: Any = self.model_runner.routed_experts_capturer  # type: ignore[attr-defined]
        if forget:
            capturer.device_buffer.zero_()
            capturer.capture = lambda *_: None
        else:
            del capturer.capture
        return {}

    def _at_box(self, after: int, what: Callable[..., Any]) -> dict[str, Any]:
        at_box(self.weight_transfer_engine.weights.reload, after, what)
        return {}

    def test_parameters(self) -> dict[str, int]:
        """crc32 of every parameter and buffer; of layers whose weights vLLM has packed away, of what they compute."""
        found: dict[str, int] = {}
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            found[name] = _crc32(tensor)
        for name, module in model.named_modules():
            if hasattr(module, "cpu_linear") and hasattr(module, "input_size_per_partition"):
                inputs = torch.randn(3, module.input_size_per_partition, generator=torch.Generator().manual_seed(1)).to(
                    module.params_dtype
                )
                found[f"{name} computes"] = _crc32(module.quant_method.apply(module, inputs, None))
        return found

    def test_load(self, path: str) -> dict[str, int]:
        """Loads a checkpoint by vLLM's own loaders; then as `test_parameters`."""
        from safetensors.torch import load_file

        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        vllm_cpu.before_reload(model)
        initialize_layerwise_reload(model)
        model.load_weights(iter(load_file(Path(path) / "model.safetensors").items()))
        finalize_layerwise_reload(model, self.vllm_config.model_config)
        vllm_cpu.after_reload(model)
        return self.test_parameters()

    def test_whole(self) -> dict[str, str]:
        """The tensors that this worker takes whole, and why."""
        return self.weight_transfer_engine.weights.reload.whole


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())

"""What runs inside vLLM's workers for `bench_sync.py`: the other way of syncing, and a look at the parameters."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from bench_sync import TIMEOUT, buckets_of, numbers
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_dppo.control import connect_store
from megatron_dppo.rollout.vllm import cpu as vllm_cpu
from megatron_dppo.rollout.vllm.worker import WorkerExtension
from megatron_dppo.rollout.worker_weights import answering
from megatron_dppo.weights.hub_files import typed


class BenchExtension(WorkerExtension):
    """Methods for `/collective_rpc`."""

    @answering
    def bench_broadcast(self, address: str, name: str, bucket_bytes: int) -> dict[str, Any]:
        """Takes whole tensors, broadcast by number 0 of a group, and of each what this worker keeps."""
        weights = self.weight_transfer_engine.weights
        if not hasattr(self, "_bench_group"):
            store = connect_store(address, TIMEOUT.total_seconds())
            size = self.weight_transfer_engine.parallel_config.world_size + 1
            prefixed = dist.PrefixStore(name, store)
            self._bench_group: Any = dist.ProcessGroupGloo(prefixed, weights.worker + 1, size, TIMEOUT)
        boxes: dict[str, list[Any]] = {}
        for tensor, start, stop in weights.reload.boxes:
            boxes.setdefault(tensor, []).append((start, stop))
        weights.reload.begin()
        for bucket in buckets_of(weights.tensors, bucket_bytes):
            last, at = bucket[-1]
            buffer = torch.empty(at + weights.tensors[last].nbytes, dtype=torch.uint8)
            self._bench_group.broadcast(buffer, 0).wait()
            for tensor, at in bucket:
                whole = typed(buffer[at:], weights.tensors[tensor].dtype, weights.tensors[tensor].shape)
                for low, high in boxes.get(tensor, ()):
                    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
                    weights.reload.place(tensor, low, high, whole[box].contiguous())
        weights.reload.finish()
        return {}

    @answering
    def bench_load(self, seed: int) -> dict[str, Any]:
        """Gives vLLM's own loaders everything."""
        engine, tensors = self.weight_transfer_engine, self.weight_transfer_engine.weights.tensors
        vllm_cpu.before_reload(engine.model)
        initialize_layerwise_reload(engine.model)
        engine.model.load_weights((name, numbers(name, info, seed)) for name, info in tensors.items())
        finalize_layerwise_reload(engine.model, engine.model_config)
        vllm_cpu.after_reload(engine.model)
        return {}

    @answering
    def bench_state(self) -> dict[str, Any]:
        """crc32 of the parameters, and of what layers compute whose weights are packed away."""
        model: Any = self.weight_transfer_engine.model
        crc = 0
        for _, tensor in model.named_parameters():
            crc = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
        for module in model.modules():
            if hasattr(module, "cpu_linear") and hasattr(module, "input_size_per_partition"):
                inputs = torch.linspace(-1, 1, 2 * module.input_size_per_partition).view(2, -1).to(module.params_dtype)
                computed = module.quant_method.apply(module, inputs, None)
                crc = zlib.crc32(computed.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
        receiver = self.weight_transfer_engine.weights._members
        return {"crc32": crc, "staging_bytes": receiver[1].staging_bytes if receiver else 0}

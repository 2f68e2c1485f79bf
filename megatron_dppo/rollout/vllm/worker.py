"""Runs inside vLLM's worker processes: weights come in, from a file or over a group; facts about the engine go out.

With `vllm_reload` and `vllm_cpu`, which it uses, the only module of the project that imports vLLM. The server loads it
as `worker_extension_cls` (`vllm_server.server_command`): importing it registers the weight-transfer backend, and
`WorkerExtension` is mixed into vLLM's worker, so that its methods can be called through the server's `/collective_rpc`.
What an update does is in `worker_weights`: vLLM's `/update_weights` receives one, `/finish_weight_update` applies it.

No method raises: vLLM would give up at the first worker's error and take the other workers' answers for those to its
next question. What went wrong is in the answer, or kept for `mdppo_fault`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from megatron_dppo.rollout.vllm import cpu as vllm_cpu
from megatron_dppo.rollout.vllm.reload import Reload
from megatron_dppo.rollout.vllm.server import TRANSFER_BACKEND
from megatron_dppo.rollout.worker_weights import WorkerWeights, answering

BACKEND = TRANSFER_BACKEND
MOST_ENDED = 4096  # requests that are remembered after their end


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update says where its weights come from."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """One complete set of weights: in a file, or sent over a group; the fields of `engine.Update`."""

    version: int
    file: dict[str, Any] | None = None
    group: dict[str, Any] | None = None


class WeightEngine(WeightTransferEngine[Init, Update]):
    """vLLM weight-transfer backend `BACKEND`: takes of hub tensors the boxes that this worker keeps."""

    init_info_cls, update_info_cls = Init, Update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault: dict[str, Any] = {}  # of the last call

    @functools.cached_property
    def weights(self) -> WorkerWeights:
        """What this worker has and gets."""
        parallel = self.parallel_config
        return WorkerWeights(
            worker=int(parallel.data_parallel_index * parallel.world_size + parallel.rank),
            model_dir=Path(self.model_config.model),
            device=torch.device("cpu" if current_platform.is_cpu() else f"cuda:{torch.cuda.current_device()}"),
            make_reload=lambda tensors: Reload(self.model, self.model_config, tensors),
        )

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        # Deliberately does not touch the model: a refused update leaves a working engine.
        self.weights.discard()

    def receive_weights(self, update_info: Update) -> None:
        """Stage an update from a file, or take one from a group; see `fault` for whether it did."""
        self.fault = self._receive(update_info)

    def finish_weight_update(self) -> None:
        """Put the update in use; see `fault` for whether it is."""
        self.fault = self._finish()

    @answering
    def _receive(self, update: Update) -> dict[str, Any]:
        self.weights.receive(update.version, file=update.file, group=update.group)
        return {}

    @answering
    def _finish(self) -> dict[str, Any]:
        self.weights.finish()
        return {}

    def shutdown(self) -> None:
        self.weights.discard()


vllm_cpu.mend_expert_parallel()
if BACKEND not in WeightTransferEngineFactory._registry:  # the module may be imported again in the same worker
    WeightTransferEngineFactory.register_engine(BACKEND, WeightEngine)


class Requests(dict[str, Any]):
    """The model runner's requests; how many tokens those had that ended since the last look is remembered."""

    def __init__(self, requests: dict[str, Any]) -> None:
        super().__init__(requests)
        self.ended: dict[str, int] = {}

    def pop(self, key: str, *default: Any) -> Any:
        """As of any dict."""
        if key in self:
            self.ended[key] = len(self[key].output_token_ids)
            if len(self.ended) > MOST_ENDED:
                del self.ended[next(iter(self.ended))]
        return super().pop(key, *default)

    def tokens(self) -> dict[str, int]:
        """Sampled tokens of every request that is there, or was at the last look."""
        found = self.ended | {key: len(request.output_token_ids) for key, request in self.items()}
        self.ended = {}
        return found


class WorkerExtension:
    """Methods added to vLLM's worker for `/collective_rpc`. They answer dicts, which HTTP leaves alone."""

    weight_transfer_engine: WeightEngine
    vllm_config: Any
    model_runner: Any

    @answering
    def mdppo_fault(self) -> dict[str, Any]:
        """What went wrong in the last step of an update: {"error": what}, or nothing."""
        return self.weight_transfer_engine.fault

    @answering
    def mdppo_describe(self) -> dict[str, Any]:
        """Facts that the client needs: see `engine.Capabilities`. It comes before the client's first request."""
        if not isinstance(self.model_runner.requests, Requests):
            self.model_runner.requests = Requests(self.model_runner.requests)
        config = self.vllm_config.model_config
        names = self.weight_transfer_engine.weights.tensors
        moe_layers = {int(m[1]) for name in names if (m := re.search(r"layers\.(\d+)\..*experts\.\d", name))}
        return {
            "engine_version": vllm.__version__,
            "data_parallel_size": self.vllm_config.parallel_config.data_parallel_size,
            "vocab_size": config.get_vocab_size(),
            "max_model_len": config.max_model_len,
            "max_logprobs": config.max_logprobs,
            "logprobs_mode": str(config.logprobs_mode),
            "routed_experts": bool(getattr(config, "enable_return_routed_experts", False)),
            "moe_layers": sorted(moe_layers),
            "dtype": str(config.dtype).removeprefix("torch."),
        }

    @answering
    def mdppo_progress(self) -> dict[str, Any]:
        """`tokens`: sampled so far of each request, by vLLM's id; also of those that ended since the last call."""
        return {"tokens": self.model_runner.requests.tokens()}

    @answering
    def mdppo_boxes(self) -> dict[str, Any]:
        """`WorkerWeights.layout`."""
        return self.weight_transfer_engine.weights.layout()

    @answering
    def mdppo_version(self) -> dict[str, Any]:
        """`WorkerWeights.state`."""
        return self.weight_transfer_engine.weights.state()

    @answering
    def mdppo_fingerprints(self) -> dict[str, Any]:
        """`WorkerWeights.received`."""
        return self.weight_transfer_engine.weights.received()

    @answering
    def mdppo_discard_update(self) -> dict[str, Any]:
        """Forget a started or staged update; the model keeps its weights. Returns the version in use."""
        self.weight_transfer_engine.weights.discard()
        self._weight_update_active = False  # vLLM's own flag: without this it refuses the next start
        return self.weight_transfer_engine.weights.state()

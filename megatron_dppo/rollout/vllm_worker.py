"""Runs inside vLLM's worker processes: weights come in, from a file or over a group; facts about the engine go out.

With `vllm_reload` and `vllm_cpu`, which it uses, the only module of the project that imports vLLM. The server loads it
as `worker_extension_cls` (`vllm_server.server_command`): importing it registers the weight-transfer backend, and
`WorkerExtension` is mixed into vLLM's worker, so that its methods can be called through the server's `/collective_rpc`.

An update has two phases. *Staging* (`/update_weights`) checks that the file is there, that it holds every
tensor of the checkpoint with the right shape, and its checksums: the model is not touched, so a refused or
abandoned update leaves a working engine. *Applying* (`/finish_weight_update`) copies the boxes that this worker keeps
into the model, layer by layer; should it fail half-way, the weights are marked unusable (version -1) until a full
update succeeds. Weights sent over a group go straight into the model: there is no memory to stage them.

No method raises: vLLM would give up at the first worker's error and take the other workers' answers for those to its
next question. What went wrong is in the answer, or kept for `mdppo_fault`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable
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

from megatron_dppo.control import connect_store
from megatron_dppo.rollout import vllm_cpu
from megatron_dppo.rollout.engine import GroupUpdate, Manifest
from megatron_dppo.rollout.vllm_reload import Reload
from megatron_dppo.rollout.vllm_server import TRANSFER_BACKEND
from megatron_dppo.weights.fingerprint import MODULUS, box_fingerprint
from megatron_dppo.weights.hub_files import HubFiles, TensorInfo
from megatron_dppo.weights.image import check_complete, checksums, map_tensors, shown
from megatron_dppo.weights.transfer import Index, Receiver, check_share, join_as_worker, published_share

BACKEND = TRANSFER_BACKEND
MOST_ENDED = 4096  # requests that are remembered after their end
UNUSABLE = -1  # the version of weights that a failed update left half-written
CPU = torch.device("cpu")


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update says where its weights come from."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """One complete set of weights: in a file, or sent over a group; the fields of `engine.Update`."""

    version: int
    file: dict[str, Any] | None = None
    group: dict[str, Any] | None = None


@dataclass
class Staged:
    """An update that waits for the end; `tensors`, in a mapped file, still have to be taken."""

    version: int
    tensors: dict[str, torch.Tensor]


Method = Callable[..., dict[str, Any]]


def answering(method: Method) -> Method:
    """Its error becomes its answer: {"error": what}."""

    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            logging.getLogger(__name__).exception(method.__name__)
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


class WeightEngine(WeightTransferEngine[Init, Update]):
    """vLLM weight-transfer backend `BACKEND`: takes of hub tensors the boxes that this worker keeps."""

    init_info_cls, update_info_cls = Init, Update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.version = 0  # the weights that the engine was started with
        self.updates = 0  # that were applied
        self.fingerprints: Counter[str] | None = None  # of what the last update brought to this worker, where asked for
        self.staged: Staged | None = None
        self.fault: dict[str, Any] = {}  # of the last call
        self._members: tuple[tuple[Any, ...], Receiver] | None = None

    @property
    def worker(self) -> int:
        """This worker's number in its engine."""
        parallel = self.parallel_config
        return int(parallel.data_parallel_index * parallel.world_size + parallel.rank)

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the engine was started with."""
        return checkpoint_tensors(Path(self.model_config.model))

    @functools.cached_property
    def reload(self) -> Reload:
        """Where this worker's weights come from and go; found when first asked for (0.2 ms a tensor)."""
        reload = Reload(self.model, self.model_config, self.tensors)
        for name, why in reload.whole.items():
            logging.getLogger(__name__).warning("%s: this worker takes all of it at every update: %s", name, why)
        return reload

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        # Deliberately does not touch the model: see the two phases in the module's docstring.
        self.staged = None

    def receive_weights(self, update_info: Update) -> None:
        """Stage an update from a file, or take one from a group; see `fault` for whether it did."""
        self.fault = self._receive(update_info)

    def finish_weight_update(self) -> None:
        """Put the update in use; see `fault` for whether it is."""
        self.fault = self._finish()

    @answering
    def _receive(self, update_info: Update) -> dict[str, Any]:
        """Raises ValueError, with the model untouched, if it is incomplete or damaged; TransferError if bytes of a
        group do not come or are damaged, with the weights unusable."""
        if self.staged is not None:
            raise ValueError(f"weight update: got a second payload for version {self.staged.version}, expected one")
        if update_info.file is not None:
            manifest = Manifest.from_json(update_info.file)
            self.staged = self._stage(manifest)
            self.fingerprints = Counter() if manifest.fingerprints else None
        elif update_info.group is not None:
            update = GroupUpdate(**update_info.group)
            self.fingerprints = Counter() if update.fingerprints else None
            self._take(update)
            self.staged = Staged(update_info.version, {})
        else:
            raise ValueError(f"weight update: got neither file nor group for version {update_info.version}")
        return {}

    def _stage(self, manifest: Manifest) -> Staged:
        check_complete(
            {name: tuple(shape) for name, _, shape, _ in manifest.tensors},
            self.tensors,
            needed={name for name, _, _ in self.reload.boxes},
        )
        tensors = dict(map_tensors(manifest))
        if manifest.crc32 is not None:
            crc32, names = checksums(tensors), [name for name, *_ in manifest.tensors]
            bad = [name for name, crc in zip(names, manifest.crc32, strict=True) if crc32[name] != crc]
            if bad:
                raise ValueError(f"weight update: crc32 differs from the manifest's for {shown(bad)}")
        return Staged(manifest.version, tensors)

    def _take(self, update: GroupUpdate) -> None:
        """Receives everything into the model, layer by layer: there is no memory to keep it elsewhere."""
        receiver = self._receiver(update)
        self.version = UNUSABLE  # until the last layer is in place
        self.reload.begin()

        receiver.receive(self._place)

    def _place(self, tensor: str, start: Index, stop: Index, part: torch.Tensor) -> None:
        """`start`, `stop`: of two axes; a tensor of one counts as a column."""
        shape = self.tensors[tensor].shape
        if self.fingerprints is not None:
            columns = shape[1] if len(shape) > 1 else 1
            self.fingerprints[tensor] += box_fingerprint(part, start, columns)
        self.reload.place(tensor, start[: len(shape)], stop[: len(shape)], part)

    def _receiver(self, update: GroupUpdate) -> Receiver:
        """Meets the trainer, and the instances before and behind, once a generation."""
        key = (update.store, update.generation, update.digest, update.instance)
        if self._members is None or self._members[0] != key:
            self._members = None
            store = connect_store(update.store, update.timeout_s)
            plan = published_share(store, update.digest, self.worker)
            check_share(plan, self.reload.boxes)
            device = CPU if current_platform.is_cpu() else torch.device("cuda", torch.cuda.current_device())
            channels = join_as_worker(store, update, self.worker, len(plan.kept_bytes), device)
            self._members = (key, Receiver(plan, self.worker, update.instance, *channels))
        return self._members[1]

    @answering
    def _finish(self) -> dict[str, Any]:
        """Raises RuntimeError if there is no update, or parts of it are missing."""
        if self.staged is None:
            raise RuntimeError("weight update: nothing is staged, send /update_weights first")
        staged, self.staged = self.staged, None
        if staged.tensors:
            self.version = UNUSABLE  # until the last layer is in place
            self.reload.begin()
            for name, start, stop in self.reload.boxes:
                box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
                self._place(name, start, stop, staged.tensors[name][box].contiguous())
        self.reload.finish()
        self.version, self.updates = staged.version, self.updates + 1
        return {}

    def shutdown(self) -> None:
        self.staged = None


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
        names = self.weight_transfer_engine.tensors
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
        """What this worker keeps: `worker` (its number), and its boxes as [tensor, start, stop]."""
        return {"worker": self.weight_transfer_engine.worker, "boxes": self.weight_transfer_engine.reload.boxes}

    @answering
    def mdppo_version(self) -> dict[str, int]:
        """Version of the weights in use (0: those of the start, -1: unusable after a failed update); updates so far."""
        return {"version": self.weight_transfer_engine.version, "updates": self.weight_transfer_engine.updates}

    @answering
    def mdppo_fingerprints(self) -> dict[str, Any]:
        """Of what this worker received in the last update: `worker` (its number), `fingerprints` by tensor."""
        found = self.weight_transfer_engine.fingerprints
        if found is None:
            raise ValueError("checksum: the last update did not ask for fingerprints")
        of_tensors = {name: value % MODULUS for name, value in found.items()}
        return {"worker": self.weight_transfer_engine.worker, "fingerprints": of_tensors}

    @answering
    def mdppo_discard_update(self) -> dict[str, int]:
        """Forget a started or staged update; the model keeps its weights. Returns the version in use."""
        self.weight_transfer_engine.staged = None
        self._weight_update_active = False  # vLLM's own flag: without this it refuses the next start
        return self.mdppo_version()


def checkpoint_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Every tensor in the directory's safetensors files: what the engine loaded at start.

    Raises ValueError for a directory that is not there or has none.
    """
    try:
        return dict(HubFiles(model_dir).tensors)
    except FileNotFoundError:
        raise ValueError(
            f"weight update: got {model_dir} without *.safetensors, expected the local checkpoint directory "
            "that the engine was started from (it says which tensors make a complete update)"
        ) from None

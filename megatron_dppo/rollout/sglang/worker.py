"""Runs inside SGLang's scheduler processes: weights come in, from a file or over a group, straight to their places.

The server is started with `--custom-weight-loader megatron_dppo.rollout.sglang.worker.call`
(`sglang_server.server_command`), so that `/update_weights_from_tensor` with this load format calls it in every worker.
What is sent as a tensor is a `Call` in the name of an empty one. SGLang does not pass on what a loader returns: answers
are left in a store that the client serves. Nothing is raised: a scheduler does not survive an error.

With `sglang_reload`, which it uses, the only module of the project that runs beside SGLang's own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dppo.control import connect_store
from megatron_dppo.rollout.sglang.message import Call, answer_key
from megatron_dppo.rollout.sglang.reload import Reload
from megatron_dppo.rollout.worker_weights import WorkerWeights, answering

ANSWER_TIMEOUT_S = 30.0  # for the client's store

_weights: dict[int, WorkerWeights] = {}  # by the id of the model, of which a process has one, or a draft beside it


def call(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Does what one message of the client asks, and leaves the answer for it."""
    try:
        wanted = Call.from_json(named_tensors[0][0])
        answer = _do(_of(model, wanted), wanted.method, wanted.arguments)
        store = connect_store(wanted.store, ANSWER_TIMEOUT_S)
        store.set(answer_key(wanted.number, dist.get_rank()), json.dumps(answer))
    except Exception:  # the client misses the answer, and says so
        logging.getLogger(__name__).exception("a call of the client could not be answered")


def _of(model: torch.nn.Module, wanted: Call) -> WorkerWeights:
    if id(model) not in _weights:
        device = next(model.parameters()).device
        _weights[id(model)] = WorkerWeights(
            worker=dist.get_rank(),
            model_dir=Path(wanted.model_dir),
            device=device,
            make_reload=lambda tensors: Reload(model, tensors),
        )
    return _weights[id(model)]


@answering
def _do(weights: WorkerWeights, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    match method:
        case "layout":
            return weights.layout()
        case "receive":
            weights.discard()
            weights.receive(**arguments)
        case "finish":
            weights.finish()
        case "discard":
            weights.discard()
        case "received":
            return weights.received()
        case "state":
            pass
        case _:
            raise ValueError(f"got method {method!r}, which this version does not have")
    return weights.state()

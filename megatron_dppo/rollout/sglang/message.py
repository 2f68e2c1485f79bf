"""How the client has SGLang's workers do something: `/update_weights_from_tensor`, with our loader as its load format.

A message is one empty tensor whose name says what to do; it holds nothing that lies in some process's memory, so that
it reaches engines on any machine. Answers come back through a store that the client serves.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict, dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing

LOADER = "megatron_dppo.rollout.sglang.worker.call"


@dataclass(frozen=True)
class Call:
    """A method of `worker_weights.WorkerWeights`, the directory the engine was started from, where answers go."""

    number: int  # of the client's calls
    method: str
    arguments: dict[str, Any]
    model_dir: str
    store: str  # host:port

    def message(self) -> str:
        """What stands for one worker's tensors in the request."""
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump([(json.dumps(asdict(self)), torch.empty(0, dtype=torch.uint8))])
        return base64.b64encode(buffer.getvalue()).decode()

    @classmethod
    def from_json(cls, name: str) -> Call:
        """What `message` was made of, from the tensor's name."""
        return cls(**json.loads(name))


def answer_key(number: int, worker: int) -> str:
    """Where in the store worker `worker` leaves its answer."""
    return f"answer/{number}/{worker}"

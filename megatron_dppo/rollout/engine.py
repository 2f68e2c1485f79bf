"""What the project asks of a rollout engine, whichever it is: protocol, requests, facts and errors.

Implementations: `vllm.VllmEngine`, `sglang.SglangEngine`. Contract tests, for either:
`tests/engines/test_engine_contract.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.weights.layout import Box

PauseMode = Literal["wait", "abort", "keep"]
Transport = Literal["shm", "group", "ipc", "disk"]  # ways for weights
UPDATE_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # name -> bytes an element


class EngineError(RuntimeError):
    """Something went wrong at an engine; the message begins with its url."""

    def __init__(self, url: str, message: str) -> None:
        super().__init__(f"engine {url}: {message}")
        self.url = url


class EngineUnreachable(EngineError):
    """The engine did not answer within the bounded number of attempts."""


class EngineBadAnswer(EngineError):
    """The engine answered something that cannot be right (wrong vocabulary, missing log-probs, no JSON)."""


class EngineNotReady(EngineError):
    """The engine takes no prompts now: it is paused, being updated, or without usable weights."""


class EngineRestarted(EngineError):
    """The engine has other weights than those it was given: it was restarted, or another client updated it."""


@dataclass(frozen=True)
class Capabilities:
    """What a running engine says about itself. Probed, never derived from a version number."""

    engine: str  # "vllm" or "sglang"
    engine_version: str
    vocab_size: int  # ids are in [0, vocab_size)
    max_model_len: int  # tokens, prompt and response together
    max_logprobs: int  # log-probs a token that a request may ask for; K + 1 must fit
    routed_experts: bool  # whether answers carry the routers' choices
    moe_layers: tuple[int, ...]
    dtype: str
    seeds: bool  # whether a request's seed is heeded
    weights: str = "shard to shard"  # how it takes them


@dataclass(frozen=True)
class Sampling:
    """How to sample one response.

    With `training=True` everything that the trainer could not reproduce as mu is refused: truncation (top_p,
    top_k, min_p), penalties and greedy decoding. Raises one ValueError that names every fault.
    """

    temperature: float
    max_tokens: int
    training: bool
    num_topk_logprobs: int = 0  # K; the sampled token's log-prob comes always
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's end of sequence
    top_p: float = 1.0
    top_k: int = -1  # -1: no truncation
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        faults = [*self._nonsense(), *(self._not_reproducible() if self.training else [])]
        if faults:
            raise ValueError("sampling: " + "; ".join(faults))

    def _nonsense(self) -> list[str]:
        faults = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            faults.append(f"temperature: got {self.temperature}, expected a finite number >= 0")
        if self.max_tokens < 1:
            faults.append(f"max_tokens: got {self.max_tokens}, expected at least 1")
        if self.num_topk_logprobs < 0:
            faults.append(f"num_topk_logprobs: got {self.num_topk_logprobs}, expected at least 0")
        return faults

    def _not_reproducible(self) -> list[str]:
        neutral = {
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
        }
        faults = [
            f"{name}: got {getattr(self, name)}, expected {value} in training (it cannot be reproduced)"
            for name, value in neutral.items()
            if getattr(self, name) != value
        ]
        if self.temperature == 0:
            faults.append("temperature: got 0 (greedy), expected > 0 in training")
        return faults


@dataclass(frozen=True)
class Manifest:
    """A complete set of weights for an engine, lying in one file: in shared memory, or on a disk that it sees too.

    `tensors` holds (name, dtype, shape, offset in bytes) under the names of the hub's files, one tensor an
    expert (`model.layers.0.mlp.experts.3.gate_proj.weight`). The file must not change before `commit` or
    `abort_update`. `crc32`, in the order of `tensors`, lets the engine refuse a damaged file. Raises
    ValueError. With `fingerprints` the engine can be asked for `checksum` afterwards.
    """

    version: int
    path: str
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    nbytes: int
    crc32: tuple[int, ...] | None = None
    fingerprints: bool = False
    transport: Literal["file"] = "file"

    def __post_init__(self) -> None:
        if self.transport != "file":
            raise ValueError(f"manifest: got transport {self.transport!r}, expected 'file'")
        if self.version < 0:
            raise ValueError(f"manifest: got version {self.version}, expected >= 0")
        if not self.path.startswith("/"):
            raise ValueError(f"manifest: got path {self.path!r}, expected an absolute one (another process opens it)")
        if self.crc32 is not None and len(self.crc32) != len(self.tensors):
            raise ValueError(f"manifest: got {len(self.crc32)} checksums for {len(self.tensors)} tensors")
        names = {name for name, *_ in self.tensors}
        if len(names) != len(self.tensors):
            raise ValueError(
                f"manifest: got {len(self.tensors)} tensors with {len(names)} names, expected distinct names"
            )
        end = 0
        for name, dtype, shape, offset in sorted(self.tensors, key=lambda tensor: tensor[3]):
            if dtype not in UPDATE_DTYPES:
                raise ValueError(f"manifest: got dtype {dtype} for {name}, expected one of {sorted(UPDATE_DTYPES)}")
            if offset < end:
                raise ValueError(f"manifest: {name} at {offset} overlaps its predecessor, which ends at {end}")
            end = offset + math.prod(shape) * UPDATE_DTYPES[dtype]
        if end > self.nbytes:
            raise ValueError(f"manifest: got {self.nbytes} bytes, expected at least {end} for its tensors")

    def as_json(self) -> dict[str, Any]:
        """The fields as plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Manifest:
        """What `as_json` made."""
        tensors = tuple((name, dtype, tuple(shape), offset) for name, dtype, shape, offset in fields["tensors"])
        crc32 = None if fields["crc32"] is None else tuple(fields["crc32"])
        return cls(**{**fields, "tensors": tensors, "crc32": crc32})


@dataclass(frozen=True)
class GroupUpdate:
    """A complete set of weights for an engine, sent to its workers by the trainer's ranks (`weights.transfer`).

    The ranks must be sending, or about to, when `begin_update` is called. `store`: host:port of a TCPStore, where
    the plan of `digest` was published. Channels are named by `generation`, a number that no earlier group of these
    engines has had: `{generation}/engine{i}`. Raises ValueError.
    """

    version: int
    store: str
    digest: str
    generation: int
    ranks: int  # of the trainer
    instance: int = 0  # which of the `instances` engines this one is
    instances: int = 1
    timeout_s: float = 120.0
    one_machine: bool = False  # ranks and workers share memory (`weights.ipc`), instead of a process group
    fingerprints: bool = False
    transport: Literal["group"] = "group"

    def __post_init__(self) -> None:
        if self.version < 0:
            raise ValueError(f"group update: got version {self.version}, expected >= 0")
        if not 0 <= self.instance < self.instances:
            raise ValueError(f"group update: got instance {self.instance}, expected 0..{self.instances - 1}")

    def as_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


Update = Manifest | GroupUpdate


class RolloutEngine(Protocol):
    """An engine that samples responses and takes new weights in memory. All methods are coroutines.

    Order of an update: `pause` (or no request in flight) -> `begin_update` -> `commit`. Between
    `begin_update` and `commit`, and while paused, `generate` is refused. `commit` resumes. All methods raise
    EngineUnreachable when the engine cannot be reached and EngineBadAnswer when its answer cannot be right.
    """

    url: str

    async def capabilities(self) -> Capabilities:
        """Facts about the engine, probed once."""
        ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, *, group_id: str = ""
    ) -> Trajectory:
        """Sample one response; `request_id` becomes its sample_id.

        The trajectory's log-probs are at the sampling temperature (at 1 for greedy); its K recorded entries
        are TopK(mu, K), in descending order, whether or not the sampled token is among them. A response that
        fills the context ends with "length". Cancelling the coroutine aborts the request at the engine.
        Raises ValueError if the prompt is empty, holds ids outside the vocabulary or leaves no room for a
        token, or if K does not fit the engine; EngineError while paused or during an update.
        """
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling: "wait" lets the requests in flight finish, "abort" ends them with what they have, and "keep"
        holds them: they go on after `commit` or `resume`, under the weights of then, and their trajectories say of each
        token which weights it was sampled from. While requests are held `generate` waits instead of being refused.
        """
        ...

    async def resume(self) -> None:
        """Undo `pause`. Raises EngineError during an update, and while the weights are unusable."""
        ...

    async def begin_update(self, version: int, update: Update) -> None:
        """Hand over a complete set of weights; the engine checks it and keeps its own until `commit`.

        Over a group they replace its own as they come, and a failure leaves it unusable until a full update. Raises
        ValueError if `version` is not the update's; EngineError if requests are in flight, or if the engine refuses
        the update (a missing tensor, a wrong shape, a checksum). Generation then stays refused until an update
        succeeds or `abort_update` makes sure of the old weights.
        """
        ...

    async def commit(self) -> None:
        """Put the handed-over weights in use, drop every cache of the old ones, and resume."""
        ...

    async def abort_update(self) -> None:
        """Forget the handed-over weights and resume with the old ones.

        Raises EngineError if the old ones are gone because a `commit` failed half-way: only a full update
        helps then.
        """
        ...

    async def layout(self) -> list[list[Box]]:
        """The boxes of hub tensors that each worker keeps."""
        ...

    async def checksum(self) -> dict[str, int]:
        """`weights.fingerprint` of every tensor as its workers received it in the last committed update.

        Raises EngineError unless that update asked for `fingerprints`, or where workers disagree on what they share.
        """
        ...

    async def rejoin(self) -> None:
        """Looks at the engine anew, after it was restarted: what it knows, and which weights it has now."""
        ...

    async def version(self) -> int:
        """Version of the weights in use, asked from the engine: 0 those it started with, -1 unusable."""
        ...

    async def health(self) -> None:
        """Raise EngineError unless the engine answers; EngineRestarted unless it has the weights this client knows."""
        ...

    async def close(self) -> None:
        """Close the connections; the engine keeps running."""
        ...

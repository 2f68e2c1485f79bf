"""One sample of a rollout, and how a batch of them travels between processes.

A `Trajectory` is made where an engine's answer enters (`rollout/vllm/client.py`), validates itself there once, and
is immutable after that. `Scored` adds what the reward and the advantage estimator say. A batch goes from the
rollout client to the trainer ranks as one safetensors file in shared memory: ragged arrays are concatenated
and their lengths kept, so nothing is pickled and nothing is parsed.

Symbols: P prompt tokens, R response tokens, K recorded top log-probs, L MoE layers, k experts a token is
routed to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from megatron_dppo.files import replacing

Array = npt.NDArray[Any]

FINISH_REASONS = ("stop", "length", "abort")
LOGPROB_CEILING = 1e-4  # a log-prob is at most 0; engines round
ROUTES_OF_LAYER = "routes.of_layer."
FORMAT_VERSION = 2  # of the columns of `to_columns`


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One prompt with one sampled response. All arrays become read-only.

    Raises ValueError naming the field, if a shape, a dtype or a value breaks the contract below.
    """

    sample_id: str
    group_id: str  # samples of one group share a prompt and a baseline
    engine: str  # which engine sampled it, for error messages and metrics
    finish_reason: str  # one of FINISH_REASONS
    temperature: float  # of sampling; 0 is greedy (evaluation only), its log-probs are then those at temperature 1
    prompt_ids: npt.NDArray[np.int32]  # [P], P >= 1
    response_ids: npt.NDArray[np.int32]  # [R]
    loss_mask: npt.NDArray[np.bool_]  # [R], False on tool or environment tokens
    rollout_logprobs: npt.NDArray[np.float32]  # [R], log mu at the sampling temperature; NaN where absent
    topk_ids: npt.NDArray[np.int32]  # [R, K], -1 where absent; K may be 0
    topk_logprobs: npt.NDArray[np.float32]  # [R, K], -inf where absent
    policy_versions: npt.NDArray[np.int32]  # [R], the weights that sampled each token; -1 on tokens not sampled
    routed_experts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None = None  # [P+R-1, L, k]
    routes_valid: npt.NDArray[np.bool_] | None = None  # [P+R-1], False where a row was not recorded
    moe_layers: npt.NDArray[np.int32] | None = None  # [L], ascending layer numbers

    def __post_init__(self) -> None:
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason: got {self.finish_reason!r}, expected one of {FINISH_REASONS}")
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: got {self.temperature}, expected a finite number >= 0")
        for name, array in _arrays(self):
            object.__setattr__(self, name, _read_only(name, array))
        _check_tokens(self)
        _check_topk(self)
        _check_routes(self)

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_ids)

    @property
    def response_length(self) -> int:
        return len(self.response_ids)

    @property
    def num_tokens(self) -> int:
        """P + R: what the sequence costs in the trainer's pack."""
        return self.prompt_length + self.response_length

    @property
    def routes(self) -> tuple[Array, Array, Array] | None:
        """`routed_experts`, `routes_valid` and `moe_layers`, where there are any."""
        if self.routed_experts is None or self.routes_valid is None or self.moe_layers is None:
            return None
        return self.routed_experts, self.routes_valid, self.moe_layers


@dataclass(frozen=True, eq=False)
class Scored:
    """A trajectory with its rewards by name and the advantage of each response token, f32[R].

    Raises ValueError if a number is not finite or the advantage has another length than the response.
    """

    trajectory: Trajectory
    rewards: Mapping[str, float]
    advantage: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        _expect("advantage", self.advantage, np.float32, (self.trajectory.response_length,))
        if not np.isfinite(self.advantage).all():
            raise ValueError(f"advantage: got a non-finite value in {self.trajectory.sample_id}, expected finite ones")
        for name, value in self.rewards.items():
            if not np.isfinite(value):
                raise ValueError(f"reward {name}: got {value} in {self.trajectory.sample_id}, expected a finite number")
        object.__setattr__(self, "advantage", _read_only("advantage", self.advantage))
        object.__setattr__(self, "rewards", MappingProxyType({k: float(v) for k, v in self.rewards.items()}))


# ---- validation --------------------------------------------------------------------------------------------


def _arrays(trajectory: Trajectory) -> list[tuple[str, Array]]:
    named = [(field.name, getattr(trajectory, field.name)) for field in fields(trajectory)[5:]]
    return [(name, array) for name, array in named if array is not None]


def _read_only(name: str, array: Array) -> Array:
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise ValueError(f"{name}: got {type(array).__name__}, expected a numpy array")
    view = array.view()
    view.flags.writeable = False
    return view


def _expect(name: str, array: Array, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name}: got {array.dtype}{list(array.shape)}, expected {dtype.__name__}{list(shape)}")


def _check_tokens(t: Trajectory) -> None:
    P, R = len(t.prompt_ids), len(t.response_ids)
    if P == 0:
        raise ValueError("prompt_ids: got an empty prompt, expected at least one token")
    _expect("prompt_ids", t.prompt_ids, np.int32, (P,))
    _expect("response_ids", t.response_ids, np.int32, (R,))
    _expect("loss_mask", t.loss_mask, np.bool_, (R,))
    _expect("rollout_logprobs", t.rollout_logprobs, np.float32, (R,))
    _expect("policy_versions", t.policy_versions, np.int32, (R,))
    for name in ("prompt_ids", "response_ids"):
        if (getattr(t, name) < 0).any():
            raise ValueError(f"{name}: got a negative token id, expected ids >= 0")
    absent = np.isnan(t.rollout_logprobs)
    if (absent & t.loss_mask).any():
        raise ValueError(
            "rollout_logprobs: got NaN on a token of the loss, expected a log-prob wherever loss_mask is True"
        )
    present = t.rollout_logprobs[~absent]
    if not (np.isfinite(present) & (present <= LOGPROB_CEILING)).all():
        raise ValueError("rollout_logprobs: got an infinite or positive value, expected finite log-probs <= 0")
    if (t.policy_versions < np.where(t.loss_mask, 0, -1)).any():
        raise ValueError("policy_versions: got a negative version on a sampled token, expected >= 0")


def _check_topk(t: Trajectory) -> None:
    R = len(t.response_ids)
    K = t.topk_ids.shape[-1] if t.topk_ids.ndim == 2 else 0
    _expect("topk_ids", t.topk_ids, np.int32, (R, K))
    _expect("topk_logprobs", t.topk_logprobs, np.float32, (R, K))
    absent = t.topk_ids == -1
    if (t.topk_ids < -1).any() or (absent != np.isneginf(t.topk_logprobs)).any():
        raise ValueError("topk_ids: expected -1 exactly where topk_logprobs is -inf, and ids >= 0 elsewhere")
    present = t.topk_logprobs[~absent]
    if not (np.isfinite(present) & (present <= LOGPROB_CEILING)).all():
        raise ValueError("topk_logprobs: got NaN or a positive value, expected log-probs <= 0")
    ordered = np.sort(t.topk_ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("topk_ids: got the same id twice for one token, expected distinct ids")


def _check_routes(t: Trajectory) -> None:
    if t.routes is None:
        if not (t.routed_experts is None and t.routes_valid is None and t.moe_layers is None):
            raise ValueError("routed_experts, routes_valid, moe_layers: expected all three or none of them")
        return
    experts, valid, layers = t.routes
    rows, L = t.num_tokens - 1, len(layers)
    if experts.dtype not in (np.uint8, np.uint16) or experts.ndim != 3 or experts.shape[:2] != (rows, L):
        raise ValueError(
            f"routed_experts: got {experts.dtype}{list(experts.shape)}, expected uint8 or uint16 [{rows}, {L}, k]"
        )
    _expect("routes_valid", valid, np.bool_, (rows,))
    _expect("moe_layers", layers, np.int32, (L,))
    if (layers < 0).any() or (np.diff(layers) <= 0).any():
        raise ValueError(f"moe_layers: got {layers.tolist()}, expected ascending layer numbers >= 0")


# ---- transport ---------------------------------------------------------------------------------------------

STRINGS = ("sample_id", "group_id", "engine", "finish_reason")
PER_TOKEN = ("response_ids", "loss_mask", "rollout_logprobs", "topk_ids", "topk_logprobs", "policy_versions")
TOKEN_DTYPES = dict(zip(PER_TOKEN, ("i4", "?", "f4", "i4", "f4", "i4"), strict=True))


def to_columns(batch: Sequence[Scored]) -> dict[str, Array]:
    """A batch as flat arrays: ragged fields concatenated beside their lengths, strings as UTF-8 bytes.

    `from_columns` gives the same batch back, bit for bit. An empty batch is allowed.
    """
    ts = [scored.trajectory for scored in batch]
    columns: dict[str, Array] = {
        "format_version": np.array([FORMAT_VERSION], np.int32),
        "temperature": np.array([t.temperature for t in ts], np.float64),
        "prompt_length": np.array([t.prompt_length for t in ts], np.int64),
        "response_length": np.array([t.response_length for t in ts], np.int64),
        "topk": np.array([t.topk_ids.shape[1] for t in ts], np.int64),
        "prompt_ids": _concat([t.prompt_ids for t in ts], "i4"),
        "advantage": _concat([s.advantage for s in batch], "f4"),
        "num_rewards": np.array([len(s.rewards) for s in batch], np.int64),
        "reward": np.array([value for s in batch for value in s.rewards.values()], np.float64),
    }
    for name in PER_TOKEN:
        columns[name] = _concat([getattr(t, name) for t in ts], TOKEN_DTYPES[name])
    for name in STRINGS:
        columns |= _string_columns(name, [getattr(t, name) for t in ts])
    columns |= _string_columns("reward_name", [name for s in batch for name in s.rewards])
    return columns | _route_columns(ts)


def from_columns(columns: Mapping[str, Array]) -> list[Scored]:
    """The batch that `to_columns` made; arrays are views of the columns. ValueError on another format."""
    found = columns["format_version"].tolist() if "format_version" in columns else None
    if found != [FORMAT_VERSION]:
        raise ValueError(f"batch columns: got format {found}, expected [{FORMAT_VERSION}]; write it with this version")
    P, R, K = (columns[name].tolist() for name in ("prompt_length", "response_length", "topk"))
    shapes = {
        name: [(r, k) if name.startswith("topk") else (r,) for r, k in zip(R, K, strict=True)] for name in PER_TOKEN
    }
    tokens: dict[str, list[Any]] = {name: _split(columns[name], shapes[name]) for name in PER_TOKEN}
    strings: dict[str, list[Any]] = {name: _split_strings(columns, name) for name in STRINGS}
    prompts = _split(columns["prompt_ids"], [(p,) for p in P])
    advantages = _split(columns["advantage"], [(r,) for r in R])
    routes = _split_routes(columns, [p + r - 1 for p, r in zip(P, R, strict=True)])
    rewards = iter(zip(_split_strings(columns, "reward_name"), columns["reward"].tolist(), strict=True))
    batch = []
    for i, num_rewards in enumerate(columns["num_rewards"].tolist()):
        fields_i: dict[str, Any] = {name: values[i] for name, values in (strings | tokens).items()}
        trajectory = Trajectory(
            temperature=float(columns["temperature"][i]), prompt_ids=prompts[i], **fields_i, **routes[i]
        )
        batch.append(Scored(trajectory, dict(next(rewards) for _ in range(num_rewards)), advantages[i]))
    return batch


def save_batch(path: Path, batch: Sequence[Scored]) -> None:
    """Write `batch` as one safetensors file, which appears whole or not at all (written beside, renamed)."""
    with replacing(path) as beside:
        save_file(to_columns(batch), beside)


def load_batch(path: Path, routed_layers: Collection[int] | None = None) -> list[Scored]:
    """Read what `save_batch` wrote; of recorded routes, those of some layers only, which is all that is read of them.

    Raises FileNotFoundError, or ValueError on another format.
    """
    wanted = None if routed_layers is None else {_layer_column(layer) for layer in routed_layers}
    with safe_open(path, "np") as file:
        every = file.keys()  # a method of the file, which is no dict
        names = [name for name in every if wanted is None or name in wanted or not name.startswith(ROUTES_OF_LAYER)]
        return from_columns({name: file.get_tensor(name) for name in names})


def _concat(arrays: Sequence[Array], dtype: str) -> Array:
    return np.concatenate([a.reshape(-1) for a in arrays]) if arrays else np.zeros(0, dtype)


def _split(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes], dtype=np.int64).tolist()
    return [flat[start:end].reshape(shape) for start, end, shape in zip([0, *ends], ends, shapes, strict=False)]


def _string_columns(name: str, values: Sequence[str]) -> dict[str, Array]:
    encoded = [value.encode() for value in values]
    return {
        f"{name}.bytes": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}.lengths": np.array([len(value) for value in encoded], np.int64),
    }


def _split_strings(columns: Mapping[str, Array], name: str) -> list[str]:
    parts = _split(columns[f"{name}.bytes"], [(n,) for n in columns[f"{name}.lengths"].tolist()])
    return [part.tobytes().decode() for part in parts]


def _layer_column(layer: int) -> str:
    return f"{ROUTES_OF_LAYER}{layer}"


def _route_columns(ts: Sequence[Trajectory]) -> dict[str, Array]:
    """Routes layer by layer, so that a rank can read those of its own; width 0 marks a trajectory without routes."""
    routed = [t.routes for t in ts if t.routes is not None]
    shape = [
        (0, 0, 0) if t.routed_experts is None else (t.routed_experts.itemsize, *t.routed_experts.shape[1:]) for t in ts
    ]
    columns = {
        "routes.shape": np.array(shape, np.int64).reshape(len(ts), 3),  # bytes an id, L, k
        "routes.valid": _concat([valid for _, valid, _ in routed], "?"),
        "routes.layers": _concat([layers for *_, layers in routed], "i4"),
    }
    of_layers: dict[int, list[Array]] = {}
    for experts, _, layers in routed:
        for place, layer in enumerate(layers.tolist()):
            of_layers.setdefault(layer, []).append(experts[:, place])
    # Where uint8 meets uint16 a column is uint16; each trajectory gets its own back.
    return columns | {_layer_column(layer): _concat(of_layers[layer], "u1") for layer in sorted(of_layers)}


def _split_routes(columns: Mapping[str, Array], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Of the layers whose columns are there."""
    shape = columns["routes.shape"].tolist()
    valid = _split(
        columns["routes.valid"], [(n if width else 0,) for n, (width, _, _) in zip(rows, shape, strict=True)]
    )
    layers = _split(columns["routes.layers"], [(L,) for _, L, _ in shape])
    read: dict[int, int] = {}  # of each layer's column
    routes: list[dict[str, Any]] = []
    for i, (width, _, k) in enumerate(shape):
        if width == 0:
            routes.append({})
            continue
        here = [layer for layer in layers[i].tolist() if _layer_column(layer) in columns]
        experts = np.empty((rows[i], len(here), k), f"u{width}")
        for place, layer in enumerate(here):
            start = read.get(layer, 0)
            read[layer] = start + rows[i] * k
            experts[:, place] = columns[_layer_column(layer)][start : read[layer]].reshape(rows[i], k)
        routes.append({"routed_experts": experts, "routes_valid": valid[i], "moe_layers": np.array(here, np.int32)})
    return routes

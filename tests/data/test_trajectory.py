"""`trajectory`: what it refuses, and that a batch comes back bit for bit from its columns and from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dppo.data.trajectory import (
    Scored,
    Trajectory,
    from_columns,
    load_batch,
    save_batch,
    to_columns,
)


def make(P: int = 3, R: int = 4, K: int = 2, routes: str | None = None, seed: int = 0, **changes: Any) -> Trajectory:
    """A random valid trajectory; routes: None, "uint8" or "uint16"."""
    rng = np.random.default_rng(seed)
    topk = -np.sort(-np.log(rng.dirichlet(np.ones(20), R)), axis=1)[:, ::-1][:, :K] if R else np.zeros((0, K))
    fields: dict[str, Any] = {
        "sample_id": f"sample-{seed}-é😀",
        "group_id": f"group-{seed}",
        "engine": "http://engine:1",
        "finish_reason": "stop",
        "temperature": 0.7,
        "prompt_ids": rng.integers(0, 99, P).astype(np.int32),
        "response_ids": rng.integers(0, 99, R).astype(np.int32),
        "loss_mask": rng.random(R) < 0.8,
        "rollout_logprobs": -rng.random(R).astype(np.float32),
        "topk_ids": np.argsort(rng.random((R, 99)), axis=1)[:, :K].astype(np.int32),
        "topk_logprobs": topk.astype(np.float32),
        "policy_versions": rng.integers(0, 9, R).astype(np.int32),
    }
    if routes is not None:
        rows = P + R - 1
        fields["routed_experts"] = rng.integers(0, 200, (rows, 3, 5)).astype(routes)
        fields["routes_valid"] = rng.random(rows) < 0.9
        fields["moe_layers"] = np.array([1, 2, 4], np.int32)
    return Trajectory(**(fields | changes))


def scored(trajectory: Trajectory, **rewards: float) -> Scored:
    rng = np.random.default_rng(len(rewards))
    return Scored(trajectory, rewards, rng.standard_normal(trajectory.response_length).astype(np.float32))


def assert_same(a: Scored, b: Scored) -> None:
    """Same values, dtypes and shapes in every field; NaN equals NaN."""
    assert dict(a.rewards) == dict(b.rewards) and list(a.rewards) == list(b.rewards)
    pairs = [("advantage", a.advantage, b.advantage)]
    pairs += [
        (f.name, getattr(a.trajectory, f.name), getattr(b.trajectory, f.name)) for f in dataclasses.fields(Trajectory)
    ]
    for name, x, y in pairs:
        assert type(x) is type(y), name
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.shape == y.shape, name
            assert x.tobytes() == y.tobytes(), name
        else:
            assert x == y, name


def absent_entries() -> Trajectory:
    """Tool tokens without a log-prob or a version, top-K rows with absent entries."""
    return make(
        R=3,
        K=2,
        loss_mask=np.array([True, False, True]),
        rollout_logprobs=np.array([-0.5, np.nan, -1.0], np.float32),
        policy_versions=np.array([4, -1, 5], np.int32),
        topk_ids=np.array([[3, -1], [-1, -1], [7, 8]], np.int32),
        topk_logprobs=np.array([[-0.5, -np.inf], [-np.inf, -np.inf], [-1.0, -1.5]], np.float32),
    )


BATCHES: dict[str, list[Scored]] = {
    "empty": [],
    "one": [scored(make(), correct=1.0)],
    "no rewards": [scored(make())],
    "zero-length response": [scored(make(P=1, R=0, K=2, finish_reason="abort"), correct=0.0)],
    "zero-length response with routes": [scored(make(P=1, R=0, K=0, routes="uint16", finish_reason="abort"))],
    "absent entries": [scored(absent_entries(), correct=0.5, length=-2.25)],
    "several K, with and without routes": [
        scored(make(P=2, R=5, K=0, seed=1), correct=1.0),
        scored(make(P=4, R=1, K=7, routes="uint8", seed=2), correct=0.0, länge=0.125),
        scored(make(P=1, R=3, K=1, routes="uint16", seed=3), bonus=1e-300),
        scored(make(P=7, R=0, K=3, seed=4, group_id="", finish_reason="abort"), correct=1.0),
        scored(make(P=1, R=64, K=20, routes="uint8", seed=5, temperature=1.3, finish_reason="length")),
    ],
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_comes_back_from_its_columns(batch: list[Scored]) -> None:
    back = from_columns(to_columns(batch))
    assert len(back) == len(batch)
    for before, after in zip(batch, back, strict=True):
        assert_same(before, after)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_comes_back_from_a_file(batch: list[Scored], tmp_path: Path) -> None:
    save_batch(tmp_path / "batch.safetensors", batch)
    assert [file.name for file in tmp_path.iterdir()] == ["batch.safetensors"]  # nothing is left beside it
    back = load_batch(tmp_path / "batch.safetensors")
    assert len(back) == len(batch)
    for before, after in zip(batch, back, strict=True):
        assert_same(before, after)


def test_columns_are_plain_one_file_of_bytes() -> None:
    columns = to_columns([scored(make(P=2, R=3, K=2), correct=1.0), scored(make(P=1, R=1, K=0, seed=1))])
    assert columns["prompt_length"].tolist() == [2, 1]
    assert columns["response_length"].tolist() == [3, 1]
    assert columns["topk"].tolist() == [2, 0]
    assert columns["topk_ids"].shape == (6,)
    assert columns["advantage"].shape == (4,) and columns["advantage"].dtype == np.float32
    assert bytes(columns["group_id.bytes"]) == b"group-0group-1"
    assert not any(array.dtype.hasobject for array in columns.values())


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "batch.safetensors"
    save_batch(path, BATCHES["one"])
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        Path(str(_[1])).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("megatron_dppo.data.trajectory.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_batch(path, BATCHES["absent entries"])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_only_the_routes_that_are_wanted_are_read(tmp_path: Path) -> None:
    """Of layers 2, 5 and 9 of some samples; what a layer's column has is found whoever else has the layer."""
    layers = np.array([2, 5, 9], np.int32)
    batch = [
        scored(make(routes="uint8", seed=1, moe_layers=layers)),
        scored(make(seed=2)),
        scored(make(P=1, R=9, routes="uint16", seed=3, moe_layers=layers)),
    ]
    save_batch(tmp_path / "batch", batch)
    for wanted, places in (((5,), [1]), ((9, 2, 7), [0, 2]), ((), [])):
        for before, after in zip(batch, load_batch(tmp_path / "batch", wanted), strict=True):
            if before.trajectory.routed_experts is None:
                assert after.trajectory.routed_experts is None
                continue
            expected = before.trajectory.routed_experts[:, places]
            assert after.trajectory.routed_experts.dtype == expected.dtype
            np.testing.assert_array_equal(after.trajectory.routed_experts, expected)
            np.testing.assert_array_equal(after.trajectory.moe_layers, layers[places])
            np.testing.assert_array_equal(after.trajectory.routes_valid, before.trajectory.routes_valid)


def test_another_format_is_refused() -> None:
    columns = to_columns(BATCHES["one"])
    columns["format_version"] = np.array([99], np.int32)
    with pytest.raises(ValueError, match=r"format \[99\], expected \[2\]"):
        from_columns(columns)


def test_num_tokens_and_lengths() -> None:
    trajectory = make(P=3, R=4)
    assert (trajectory.prompt_length, trajectory.response_length, trajectory.num_tokens) == (3, 4, 7)


def test_a_trajectory_cannot_be_changed() -> None:
    trajectory = make(routes="uint8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory.temperature = 2.0
    for name in ("prompt_ids", "rollout_logprobs", "topk_logprobs", "routed_experts"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(trajectory, name)[0] = 0
    with pytest.raises(TypeError):
        scored(trajectory, correct=1.0).rewards["correct"] = 2.0


def test_the_callers_array_stays_writeable() -> None:
    prompt = np.array([1, 2, 3], np.int32)
    make(prompt_ids=prompt)
    prompt[0] = 9


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def i32(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "tired"}, "finish_reason: got 'tired'"),
        ({"finish_reason": None}, "finish_reason: got None"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"prompt_ids": i32()}, "empty prompt"),
        ({"prompt_ids": [1, 2]}, "prompt_ids: got list, expected a numpy array"),
        ({"prompt_ids": np.array(3, np.int32)}, "prompt_ids: got"),
        ({"prompt_ids": np.array([1, 2])}, r"prompt_ids: got int64\[2\], expected int32\[2\]"),
        ({"prompt_ids": i32(1, -2)}, "prompt_ids: got a negative token id"),
        ({"response_ids": i32(1, 2, 3, -4)}, "response_ids: got a negative token id"),
        ({"response_ids": i32(1, 2, 3)}, r"loss_mask: got bool\[4\], expected bool\w*\[3\]"),
        ({"loss_mask": np.ones(4, np.float32)}, "loss_mask: got float32"),
        ({"rollout_logprobs": f32(-1, -1, -1)}, r"rollout_logprobs: got float32\[3\], expected float32\[4\]"),
        (
            {"loss_mask": np.ones(4, bool), "rollout_logprobs": f32(-1, np.nan, -1, -1)},
            "NaN on a token of the loss",
        ),
        ({"rollout_logprobs": f32(-1, -np.inf, -1, -1)}, "rollout_logprobs: got an infinite or positive"),
        ({"rollout_logprobs": f32(-1, 2e-4, -1, -1)}, "rollout_logprobs: got an infinite or positive"),
        (
            {"loss_mask": np.ones(4, bool), "policy_versions": i32(0, 1, -1, 1)},
            "policy_versions: got a negative",
        ),
        ({"policy_versions": np.zeros(4, np.int64)}, "policy_versions: got int64"),
        ({"topk_ids": i32(1, 2, 3, 4)}, "topk_ids: got int32"),
        (
            {"topk_logprobs": np.zeros((4, 3), np.float32)},
            r"topk_logprobs: got float32\[4, 3\], expected float32\[4, 2\]",
        ),
        (
            {"topk_ids": i32([0, 1], [0, 1], [0, 1], [0, -1])},
            "expected -1 exactly where topk_logprobs is -inf",
        ),
        ({"topk_ids": i32([0, 1], [0, 1], [0, 1], [5, 5])}, "same id twice"),
        ({"topk_logprobs": np.full((4, 2), np.nan, np.float32)}, "topk_logprobs: got NaN or a positive"),
        ({"topk_logprobs": np.full((4, 2), 1e-3, np.float32)}, "topk_logprobs: got NaN or a positive"),
        ({"routes_valid": np.ones(6, bool)}, "expected all three or none"),
    ],
)
def test_a_broken_trajectory_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"routed_experts": np.zeros((7, 3, 2), np.uint8)},
            r"got uint8\[7, 3, 2\], expected uint8 or uint16 \[6, 3, k\]",
        ),
        ({"routed_experts": np.zeros((6, 3, 2), np.int32)}, "routed_experts: got int32"),
        ({"routed_experts": np.zeros((6, 3), np.uint8)}, "routed_experts: got uint8"),
        ({"routes_valid": np.ones(7, bool)}, "routes_valid: got bool"),
        ({"moe_layers": i32(1, 1, 2)}, "ascending layer numbers"),
        ({"moe_layers": i32(-1, 1, 2)}, "ascending layer numbers"),
    ],
)
def test_broken_routes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(routes="uint8", **changes)


def test_one_absent_id_may_repeat_in_a_row() -> None:
    ids, logprobs = np.full((4, 2), -1, np.int32), np.full((4, 2), -np.inf, np.float32)
    assert make(topk_ids=ids, topk_logprobs=logprobs).topk_ids.shape == (4, 2)


@pytest.mark.parametrize(
    ("rewards", "advantage", "message"),
    [
        ({"correct": float("nan")}, f32(0, 0, 0, 0), "reward correct: got nan"),
        ({}, f32(0, np.inf, 0, 0), "advantage: got a non-finite"),
        ({}, f32(0), r"advantage: got float32\[1\], expected float32\[4\]"),
        ({}, np.zeros(4), "advantage: got float64"),
    ],
)
def test_broken_scores_are_refused(rewards: dict[str, float], advantage: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scored(make(), rewards, advantage)

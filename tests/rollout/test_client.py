"""What the rollout client decides by itself: how a step's samples are divided, when a run is over,
which engines will do.

The whole of it, with real engines and ranks: tests/engines/test_job.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dppo.architecture import load_architecture
from megatron_dppo.config import Config
from megatron_dppo.data.trajectory import Scored, Trajectory, load_batch
from megatron_dppo.rollout.client import Client, place_batch
from megatron_dppo.rollout.engine import Capabilities
from megatron_dppo.rollout.engines import check_engine
from tests.tiny_models import tiny_config

GROUPS, SIZE, STEPS = 4, 3, 5
ROLLOUT = {"max_response_tokens": 8, "prompts_per_step": GROUPS, "samples_per_prompt": SIZE}


def config(**sections: Any) -> Config:
    training = {"steps": STEPS, "minibatches": 1, "micro_batch_tokens": 16, "lr": 1e-3}
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"path": "unused"},
            "data": {"train": "unused", "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": ROLLOUT,
            **sections,
            "training": training | sections.get("training", {}),
        }
    )


def scored(name: str, length: int) -> Scored:
    """A prompt of one token, and a response for the rest of `length`."""
    response = length - 1
    trajectory = Trajectory(
        sample_id=name, group_id="0", engine="test", finish_reason="stop", temperature=1.0,
        prompt_ids=np.array([1], np.int32), response_ids=np.ones(response, np.int32),
        loss_mask=np.ones(response, np.bool_), rollout_logprobs=np.full(response, -1.0, np.float32),
        topk_ids=np.empty((response, 0), np.int32), topk_logprobs=np.empty((response, 0), np.float32),
        policy_versions=np.zeros(response, np.int32),
    )  # fmt: skip
    return Scored(trajectory, {}, np.ones(response, np.float32))


def placed(directory: Path, settings: Config, step: int, length: int) -> list[list[list[str]]]:
    """[minibatch][micro-batch] of the first replica: names of its samples, which are group-number."""
    samples = [scored(f"{group}-{i}", length) for group in range(GROUPS) for i in range(SIZE)]
    order = place_batch(directory, step, samples, np.repeat(np.arange(GROUPS), SIZE), settings)
    found = iter(load_batch(Path(order["files"][0])))
    return [
        [[next(found).trajectory.sample_id for _ in range(n)] for n in sizes] for sizes in order["micro_batch_sizes"][0]
    ]


def test_the_budget_of_a_micro_batch_is_of_padded_sequences(tmp_path: Path) -> None:
    """Samples of 5 tokens in micro-batches of 16: three, or two where two context ranks pad each to 8."""
    (whole,) = placed(tmp_path, config(), 0, 5)
    (shared,) = placed(tmp_path, config(parallel={"context": 2, "ranks": 2}), 0, 5)
    assert [len(micro) for micro in whole] == [3] * 4 and [len(micro) for micro in shared] == [2] * 6


def test_groups_are_dealt_anew_in_each_step_and_the_same_in_a_repeated_one(tmp_path: Path) -> None:
    """Whole ones, to minibatches; a run that goes on divides a step as it would have."""

    def dealt(step: int) -> list[list[str]]:
        minibatches = placed(tmp_path, config(training={"minibatches": 4}), step, 5)
        return [sorted({name.partition("-")[0] for micro in minibatch for name in micro}) for minibatch in minibatches]

    steps = [dealt(step) for step in range(6)]
    assert all(sorted(groups) == [["0"], ["1"], ["2"], ["3"]] for groups in steps)
    assert len({str(groups) for groups in steps}) > 2 and steps == [dealt(step) for step in range(6)]


@pytest.mark.parametrize(
    ("step", "evaluation", "reason"),
    [
        (2, {"a": 0.95, "b": 0.5}, None),  # one set is not all of them
        (2, {"a": 0.95, "b": 0.9}, "held-out accuracy reached 0.9"),
        (0, {"a": 1.0}, None),  # a run that trains nothing is not what was asked for
        (2, None, None),
        (STEPS, {"a": 0.0}, f"{STEPS} steps done"),
    ],
)
def test_a_run_is_over_when_every_set_is_good_enough_or_its_steps_are_done(
    step: int, evaluation: dict[str, float] | None, reason: str | None
) -> None:
    nobody: Any = None
    settings = config(evaluation={"target_accuracy": 0.9})
    client = Client(settings, nobody, nobody, nobody, nobody, Path("nowhere"), {})
    assert client._reason_to_stop(step, evaluation) == reason


GOOD = Capabilities(
    engine="vllm",
    engine_version="0",
    vocab_size=64,
    max_model_len=8 + 8,
    max_logprobs=4 + 1,  # the sampled token beside the objective's four
    routed_experts=True,
    moe_layers=(0, 1),
    dtype="float32",
    seeds=True,
)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"vocab_size": 63}, "a vocabulary of 63, expected the model's 64"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, expected rollout.dtype float32"),
        ({"max_model_len": 15}, "a context of 15, expected at least prompt [+] response = 16"),
        ({"max_logprobs": 4}, "at most 4 log-probs, expected 5"),
        ({"routed_experts": False}, "no recorded routes"),
        ({"moe_layers": (1,)}, r"routes of layers \(1,\), expected the model's \(0, 1\)"),
        ({"dtype": "bfloat16", "vocab_size": 63}, "a vocabulary of 63.*; dtype bfloat16"),
    ],
)
def test_an_engine_that_just_will_not_do_is_refused(tmp_path: Path, changes: dict[str, Any], fault: str | None) -> None:
    tiny_config().save_pretrained(tmp_path)
    settings = config(
        model={"path": str(tmp_path)},
        rollout={**ROLLOUT, "dtype": "float32"},
        routing={"mode": "rollout"},
        objective={"name": "dppo_topk_tv", "top_k": 4},
    )
    arch = load_architecture(tmp_path)
    if fault is None:
        check_engine("here", replace(GOOD, **changes), settings, arch)
        return
    with pytest.raises(ValueError, match=f"engine here: got {fault}"):
        check_engine("here", replace(GOOD, **changes), settings, arch)

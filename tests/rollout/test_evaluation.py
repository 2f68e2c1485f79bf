"""What an evaluation asks for and how it counts; with a real engine: tests/engines/test_evaluate.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megatron_dppo.config import Config
from megatron_dppo.data.addition import build_tokenizer
from megatron_dppo.data.prompts import Prompt
from megatron_dppo.data.rewards import FinalAnswer
from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.rollout.evaluation import evaluate, measures_of
from megatron_dppo.rollout.fleet import Request


def config(eval_sets: Any, **evaluation: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"path": "unused"},
            "data": {"train": "unused", "eval": eval_sets, "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": 8, "prompts_per_step": 2, "samples_per_prompt": 2},
            "training": {"steps": 1, "micro_batch_tokens": 64, "lr": 1e-3},
            "evaluation": evaluation,
        }
    )


def prompts(*answers: str) -> list[Prompt]:
    return [Prompt(i, "1+1=", answer, np.array([i], np.int32)) for i, answer in enumerate(answers)]


def answer(request: Request, ids: Sequence[int], finish_reason: Any) -> Trajectory:
    length = len(ids)
    return Trajectory(
        sample_id=request.request_id, group_id=request.group_id, engine="test", finish_reason=finish_reason,
        temperature=1.0, prompt_ids=np.array(request.prompt_ids, np.int32), response_ids=np.array(ids, np.int32),
        loss_mask=np.ones(length, np.bool_), rollout_logprobs=np.full(length, -1.0, np.float32),
        topk_ids=np.empty((length, 0), np.int32), topk_logprobs=np.empty((length, 0), np.float32),
        policy_versions=np.zeros(length, np.int32),
    )  # fmt: skip


def test_a_single_path_keeps_its_names_and_its_seeds() -> None:
    measures = measures_of(config("heldout.jsonl"), {"": prompts("1", "2")}, "eval5")
    assert [m.name for m in measures] == ["accuracy_greedy", "accuracy_sampled"]
    assert [m.sampling.temperature for m in measures] == [0.0, 1.0]
    requests = [r for m in measures for r in m.requests(seed=3)]
    assert [r.request_id for r in requests] == [
        "eval5-greedy-0", "eval5-greedy-1", "eval5-sampled-0", "eval5-sampled-1",
    ]  # fmt: skip
    # Written down, so that the quickstart's numbers stay what they are.
    expected = int(np.random.default_rng([3, *b"eval5-sampled-1"]).integers(2**31 - 1))
    assert requests[3].sampling.seed == expected


def test_named_sets_are_sampled_k_times_each_with_a_seed_of_its_own() -> None:
    settings = {"greedy": False, "samples": 3, "temperature": 0.7, "top_p": 0.95, "max_response_tokens": 20}
    sets = {"aime24": prompts("1", "2"), "aime25": prompts("3")}
    measures = measures_of(config({"aime24": "a", "aime25": "b"}, **settings), sets, "eval0")
    assert [(m.name, m.samples) for m in measures] == [("aime24/avg@3", 3), ("aime25/avg@3", 3)]
    requests = [r for m in measures for r in m.requests(seed=0)]
    assert [(r.prompt_ids, r.spread) for r in requests] == [([0], 0)] * 3 + [([1], 1)] * 3 + [([0], 0)] * 3
    assert len({r.sampling.seed for r in requests}) == len({r.request_id for r in requests}) == 9
    for request in requests:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.training) == (0.7, 0.95, 20, False)


def test_shares_are_of_all_samples_and_what_was_cut_off_is_wrong(tmp_path: Any) -> None:
    tokenizer = build_tokenizer(tmp_path)
    right, wrong = (tokenizer.encode(text) for text in (">7", "1>8"))
    given = itertools.cycle([(right, "stop"), (wrong, "stop"), (right, "length"), (right, "stop")])

    async def sample(requests: Sequence[Request]) -> list[Trajectory]:
        return [answer(request, *next(given)) for request in requests]

    sets = {"a": prompts("7"), "b": prompts("8", "7")}
    measures = measures_of(config({"a": "a", "b": "b"}, greedy=False, samples=4), sets, "e")
    first, second = asyncio.run(evaluate(measures, sample, tokenizer, FinalAnswer(), seed=0))
    assert (first.name, first.accuracy, first.truncated_share, first.prompts) == ("a/avg@4", 0.5, 0.25, 1)
    assert (second.name, second.accuracy, second.prompts, second.samples) == ("b/avg@4", 3 / 8, 2, 4)
    assert first.response_length == pytest.approx((2 + 3 + 2 + 2) / 4)

"""Accuracy on held-out prompts, by requests of its own to the engines that there are.

A run evaluates while its ranks wait; `megatron-dppo evaluate` (`megatron_dppo/evaluate.py`) evaluates a model without
ranks. What is sampled here is never trained, so it may be greedy or truncated. An answer that was cut off at its
longest length is wrong, as in training.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_dppo.config import Config
from megatron_dppo.data.prompts import Prompt, PromptSet, load_prompts
from megatron_dppo.data.rewards import Reward
from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.rollout.engine import Sampling
from megatron_dppo.rollout.fleet import Request
from megatron_dppo.rollout.sampler import request_of, score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = Callable[[Sequence[Request]], Awaitable[list[Trajectory]]]


@dataclass(frozen=True)
class Measure:
    """One accuracy of one set: `samples` responses to each of its prompts."""

    name: str  # in the metrics, behind eval/: accuracy_greedy, aime24/avg@32
    label: str  # in the requests' ids, which their seeds follow from
    prompts: Sequence[Prompt]
    sampling: Sampling
    samples: int

    def requests(self, seed: int) -> list[Request]:
        """All of them, a prompt's one after the other and at the same engine."""
        return [
            request_of(
                prompt, self.sampling, seed, f"{self.label}-{i * self.samples + k}", group=f"{self.label}-{i}", spread=i
            )
            for i, prompt in enumerate(self.prompts)
            for k in range(self.samples)
        ]


@dataclass(frozen=True)
class Result:
    """What a measure found; shares and means are over all its responses."""

    name: str
    accuracy: float
    truncated_share: float  # of responses that were cut off, which are wrong
    response_length: float
    prompts: int
    samples: int


def load_eval_sets(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptSet]:
    """The first `evaluation.prompts` of each file of `data.eval`, by name. Raises what `load_prompts` does."""
    data = config.data
    return {
        name: load_prompts(
            chosen.path,
            tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            prompt_key=chosen.prompt_key or data.prompt_key,
            answer_key=chosen.answer_key or data.answer_key,
            prompt_template=chosen.prompt_template or data.prompt_template,
            chat_template=data.chat_template,
            limit=config.evaluation.prompts,
        )
        for name, chosen in data.eval.items()
    }


def describe_eval_sets(config: Config, sets: Mapping[str, PromptSet]) -> dict[str, str]:
    """What was taken of each file, by words for it."""
    return {f"held out, {config.data.eval[name].path}": found.describe() for name, found in sets.items()}


def measures_of(config: Config, sets: Mapping[str, Sequence[Prompt]], label: str) -> list[Measure]:
    """What the `evaluation` section asks for, of every set. `label`: of this evaluation, new in each."""
    settings = config.evaluation
    max_tokens = settings.max_response_tokens or config.rollout.max_response_tokens
    greedy = Sampling(temperature=0.0, max_tokens=max_tokens, training=False)
    sampled = replace(greedy, temperature=settings.temperature, top_p=settings.top_p)
    measures = []
    for name, prompts in sets.items():
        before, place = (f"{name}/", f"{label}-{name}") if name else ("", label)
        if settings.greedy:
            measures.append(Measure(f"{before}accuracy_greedy", f"{place}-greedy", prompts, greedy, 1))
        if settings.sampled:
            kind = "accuracy_sampled" if settings.samples == 1 else f"avg@{settings.samples}"
            measures.append(Measure(before + kind, f"{place}-sampled", prompts, sampled, settings.samples))
    return measures


async def evaluate(
    measures: Sequence[Measure], sample: Sample, tokenizer: PreTrainedTokenizerBase, reward: Reward, seed: int
) -> list[Result]:
    """One result for each measure. All requests go out together, so that no measure waits for another's longest."""
    requests = [measure.requests(seed) for measure in measures]
    answers = await sample([request for of_measure in requests for request in of_measure])
    results, start = [], 0
    for measure, of_measure in zip(measures, requests, strict=True):
        own = answers[start : start + len(of_measure)]
        start += len(of_measure)
        prompts = [prompt for prompt in measure.prompts for _ in range(measure.samples)]
        scores = await score(own, prompts, tokenizer, reward)
        results.append(
            Result(
                name=measure.name,
                accuracy=float(np.mean([found.get("accuracy", found["reward"]) for found in scores])),
                truncated_share=float(np.mean([answer.finish_reason == "length" for answer in own])),
                response_length=float(np.mean([answer.response_length for answer in own])),
                prompts=len(measure.prompts),
                samples=measure.samples,
            )
        )
    return results

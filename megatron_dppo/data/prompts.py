"""Prompts: read from JSONL line by line, each taken or refused on its own, and which of them a step uses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_LINE_NUMBERS = 5  # of refused lines, for each reason

NOT_JSON = "not a JSON object"
NO_VALUE = "without a usable {}"  # key
EMPTY = "empty prompt"
NOT_IN_VOCABULARY = "cannot be tokenised"
TOO_LONG = "longer than max_prompt_tokens"
PLACE = "{prompt}"  # of the prompt's text in a template
ABSENT = object()  # what a record has under a key that it does not have


@dataclass(frozen=True)
class Prompt:
    """A prompt that can be rolled out, its `token_ids` int32 [P], and the answer that checks a response."""

    text: str
    answer: str
    token_ids: np.ndarray


@dataclass(frozen=True)
class PromptSet:
    """The prompts taken from a file, in its order, and how many lines were refused for which reason."""

    prompts: tuple[Prompt, ...]
    refused: Mapping[str, int]
    refused_lines: Mapping[str, tuple[int, ...]]  # the first few 1-based line numbers for each reason

    def describe(self) -> str:
        """One line for the log: taken, refused, why and where."""
        text = f"{len(self.prompts)} prompts taken, {sum(self.refused.values())} refused"
        reasons = [
            f"{count} {reason} (lines {', '.join(map(str, self.refused_lines[reason]))}"
            + (", ...)" if count > len(self.refused_lines[reason]) else ")")
            for reason, count in self.refused.items()
        ]
        return text + (": " + "; ".join(reasons) if reasons else "")


def load_prompts(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    prompt_template: str = PLACE,
    chat_template: bool = False,
    limit: int | None = None,
) -> PromptSet:
    """Reads JSONL objects with a prompt and an answer; stops after `limit` prompts are taken.

    Dots in a key go into objects. A prompt is a text or a list of messages; `prompt_template` has `{prompt}` where
    the text, or that of the last message, goes. With `chat_template` the messages (a text is the user's) are rendered
    with the opening of the assistant's turn; without, the last message's text is all that the model sees. Answers may
    be numbers. Blank lines are skipped; every other line that cannot be used is refused and counted. Raises ValueError
    when no prompt is left.
    """
    prompts: list[Prompt] = []
    refused: Counter[str] = Counter()
    lines: dict[str, list[int]] = {}
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if limit is not None and len(prompts) >= limit:
                break
            if not raw.strip():
                continue
            try:
                messages, answer = _parse(raw, prompt_key, answer_key, prompt_template)
                token_ids = _tokenise(messages, tokenizer, chat_template, max_prompt_tokens)
            except _Refused as refusal:
                refused[refusal.reason] += 1
                if len(kept := lines.setdefault(refusal.reason, [])) < KEPT_LINE_NUMBERS:
                    kept.append(number)
                continue
            prompts.append(Prompt(messages[-1]["content"], answer, token_ids))
    taken = PromptSet(tuple(prompts), dict(refused), {reason: tuple(kept) for reason, kept in lines.items()})
    if not prompts:
        raise ValueError(f"prompts: no usable line in {path}, expected JSONL ({taken.describe()})")
    return taken


class _Refused(Exception):
    """Why one line is not used."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def value_at(record: Mapping[str, Any], key: str) -> Any:
    """The value under a key, or under a path of keys with dots between them; ABSENT where there is none."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def _parse(raw: bytes, prompt_key: str, answer_key: str, template: str) -> tuple[list[dict[str, Any]], str]:
    """A line's messages, the template around the last one's text, and its answer."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise _Refused(NOT_JSON) from None
    if not isinstance(record, dict):
        raise _Refused(NOT_JSON)
    prompt, answer = value_at(record, prompt_key), value_at(record, answer_key)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(prompt, str | list):
        raise _Refused(NO_VALUE.format(prompt_key))
    if not isinstance(answer, str):
        raise _Refused(NO_VALUE.format(answer_key))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages):
        raise _Refused(NO_VALUE.format(prompt_key))
    if not messages or not messages[-1]["content"].strip():
        raise _Refused(EMPTY)
    text = template.replace(PLACE, messages[-1]["content"])
    return [*messages[:-1], {**messages[-1], "content": text}], answer


def _tokenise(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, chat_template: bool, max_prompt_tokens: int
) -> np.ndarray:
    """int32 [P] of one prompt."""
    try:
        if chat_template:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer.encode(text, add_special_tokens=False)  # the template wrote them
        else:
            ids = tokenizer.encode(messages[-1]["content"])
    except Exception:  # tokenizers and templates raise bare Exceptions for text they do not cover
        raise _Refused(NOT_IN_VOCABULARY) from None
    if not ids:
        raise _Refused(EMPTY)
    if len(ids) > max_prompt_tokens:
        raise _Refused(TOO_LONG)
    return np.asarray(ids, dtype=np.int32)


def prompt_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation int64 [num_prompts] that depends on nothing but the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


def batch_indices(step: int, prompts_per_step: int, num_prompts: int, seed: int) -> np.ndarray:
    """Which prompts step `step` (from 0) uses: int64 [prompts_per_step].

    Steps walk through reshuffled epochs without a gap, and each is a function of its number alone, whatever came
    before. A step that crosses into the next epoch may hold a prompt twice.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts: got {num_prompts}, expected at least 1")
    positions = np.arange(step * prompts_per_step, (step + 1) * prompts_per_step)
    epochs, within = np.divmod(positions, num_prompts)
    indices = np.empty(prompts_per_step, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = prompt_order(num_prompts, seed, int(epoch))[within[here]]
    return indices

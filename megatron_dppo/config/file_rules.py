"""The rules of a config that read files: the model's, its tokenizer's and the prompts'. See `config.rules`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dppo.data.prompts import ABSENT, value_at
from megatron_dppo.files import absent, pointer_note, read_json_object

if TYPE_CHECKING:
    from megatron_dppo.architecture import Architecture
    from megatron_dppo.config import DataConfig, EvaluationConfig, ModelConfig

FIRST_LINES = 100  # of a file of prompts
FEW = 4  # of what is found, that a message names


def _model_files(model: ModelConfig) -> Iterator[str]:
    """config.json and every weights file are there."""
    path = model.path
    if not path.is_dir():
        yield f"model.path: {absent('directory', path)}, expected a Hugging Face model directory"
        return
    if not (path / "config.json").is_file():
        yield f"model.path: no config.json in {path}, expected a Hugging Face model directory"
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json_object(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            yield f"model.path: {path} lacks {len(missing)} of {len(shards)} weights files: {few(missing)}"
    elif not (path / "model.safetensors").is_file():
        yield f"model.path: no model.safetensors (nor its index) in {path}, expected the weights"


def _weights(model: ModelConfig, arch: Architecture) -> Iterator[str]:
    """The weights files are whole and hold the model's tensors; their headers alone are read."""
    if any(_model_files(model)):
        return  # it says more
    from megatron_dppo.weights.hub_files import HubFiles, check_tensors

    try:
        check_tensors(HubFiles(model.path), arch)
    except ValueError as error:
        yield f"model.path: {error}"


def _quantised(model: ModelConfig) -> Iterator[str]:
    """The engine would keep the checkpoint's 8-bit weights, and get others."""
    path = model.path
    method = (_json(path / "config.json").get("quantization_config") or {}).get("quant_method")
    if method is not None:
        yield (
            f"model.path: got weights quantised by {method} in {path}, expected bfloat16 or float32: convert them with "
            "`megatron-dppo convert hf-to-megatron` and `megatron-to-hf`, which dequantise"
        )


def _tokenizer(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    """The tokenizer is there and belongs to the model: no id beyond its vocabulary, the same end of text."""
    from tokenizers import Tokenizer

    path = model.path
    if not (path / "config.json").is_file():
        return  # _model_files says it
    if not (path / "tokenizer.json").is_file():
        yield f"model.path: no tokenizer.json in {path}, expected the model's fast tokenizer"
        return
    try:
        vocabulary = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing more specific
        yield f"model.path: {path}/tokenizer.json cannot be read{pointer_note(path / 'tokenizer.json')}: {error}"
        return
    settings, hf = _json(path / "tokenizer_config.json"), _json(path / "config.json")
    largest, vocab_size = max(vocabulary.values()), hf.get("vocab_size", math.inf)
    if largest >= vocab_size:
        yield (
            f"model.path: the tokenizer does not match the model: its largest id is {largest}, "
            f"expected below the model's vocab_size {vocab_size}"
        )
    eos = settings.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    model_ids = _ids(hf.get("eos_token_id")) | _ids(_json(path / "generation_config.json").get("eos_token_id"))
    if eos is None or eos not in vocabulary:
        yield f"model.path: the tokenizer's eos_token: got {eos!r}, expected a token of its vocabulary"
    elif not model_ids:
        yield f"model.path: config.json has no eos_token_id, expected the tokenizer's {vocabulary[eos]}"
    elif vocabulary[eos] not in model_ids:
        yield (
            f"model.path: the tokenizer does not match the model: its eos_token {eos!r} is id "
            f"{vocabulary[eos]}, expected the model's eos_token_id {few(sorted(model_ids))}"
        )
    templates = ("chat_template.jinja", "chat_template.json")
    if data.chat_template and "chat_template" not in settings and not any((path / t).is_file() for t in templates):
        yield f"data.chat_template: got true, expected false: the tokenizer in {path} has none"


def _train_prompts(data: DataConfig) -> Iterator[str]:
    yield from _prompt_file("data.train", data.train, (data.prompt_key, data.answer_key))


def _eval_prompts(data: DataConfig, evaluation: EvaluationConfig) -> Iterator[str]:
    for name, chosen in data.eval.items():
        keys = (chosen.prompt_key or data.prompt_key, chosen.answer_key or data.answer_key)
        yield from _prompt_file(f"data.eval.{name}" if name else "data.eval", chosen.path, keys)
    if data.eval:
        return
    for name in ("every", "target_accuracy"):
        if getattr(evaluation, name):
            yield f"evaluation.{name}: got {getattr(evaluation, name)}, but data.eval is not set"


def _prompt_file(key: str, path: Path, names: Sequence[str]) -> Iterator[str]:
    """The file is there and its first object has the keys; lines are judged one by one when they are read."""
    expected = "expected JSONL with one prompt and answer a line"
    if not path.is_file():
        yield f"{key}: {absent('file', path)}, {expected}"
        return
    with path.open("rb") as file:
        lines = list(itertools.islice((line for line in file if line.strip()), FIRST_LINES))
    if not lines:
        yield f"{key}: {path} is empty, {expected}"
        return
    record = next(filter(None, map(_object, lines)), None)
    if record is None:
        yield f"{key}: {path} has no JSON object in its first {len(lines)} lines{pointer_note(path)}, {expected}"
        return
    for name in names:
        if value_at(record, name) is ABSENT:
            yield f"{key}: the first line of {path} has no key {name!r}, its keys are {few(sorted(record))}"


FILE_RULES = (_model_files, _weights, _quantised, _tokenizer, _train_prompts, _eval_prompts)


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None where there is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _ids(value: int | list[int] | None) -> set[int]:
    """A token id, several or none, as a set."""
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def few(items: list[Any]) -> str:
    """The first few items, and how many more."""
    shown = ", ".join(map(str, items[:FEW]))
    return shown if len(items) <= FEW else f"{shown} and {len(items) - FEW} more"

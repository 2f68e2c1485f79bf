"""`megatron-dppo evaluate` as a user runs it, on a model whose answers are known."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from tests.engines.kinds import KIND
from tests.tiny_models import EOS_ID, character_tokenizer, tiny_config, tiny_model, write_checkpoint

DEADLINE_S = 400.0


@torch.no_grad()
def chain_model() -> PreTrainedModel:
    """The next token depends on the last alone: "=" is followed by ">", that by "7" (0.6) or "8" (0.4), those by the
    end; "-" by "-", for ever."""
    model = tiny_model(tiny_config())
    tokenizer = character_tokenizer(model.config.vocab_size)
    size = model.config.hidden_size
    assert size == model.config.vocab_size
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()  # the residual stream stays the token's embedding
        elif "norm" in name:
            parameter.fill_(1.0)
    model.get_input_embeddings().weight.copy_(torch.eye(size))
    head = model.get_output_embeddings().weight.zero_()

    def follow(last: str, following: int, probability: float = 1.0) -> None:
        """Over logits of 0: 1e-7 for all other tokens. The last norm makes an embedding sqrt(size) long."""
        head[following, tokenizer.convert_tokens_to_ids(last)] = (20 + math.log(probability)) / math.sqrt(size)

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ">78-"}
    follow("=", ids[">"])
    follow(">", ids["7"], 0.6)
    follow(">", ids["8"], 0.4)
    follow("7", EOS_ID)
    follow("8", EOS_ID)
    follow("-", ids["-"])
    return model


def jsonl(path: Path, *records: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", chain_model())
    sums = jsonl(tmp_path / "sums.jsonl", *({"prompt": f"{i}+1=", "answer": a} for i, a in enumerate("778")))
    endless = jsonl(tmp_path / "endless.jsonl", {"problem": "1-", "solution": {"value": 7}}, {"problem": "1+"})
    config = {
        "run": {"name": f"evaluate{os.getpid()}", "dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "parallel": {"tensor": 4, "expert": 2, "ranks": 8},  # nobody starts them
        "data": {
            "train": sums,
            "eval": {
                "sums": sums,
                "endless": {"path": endless, "prompt_key": "problem", "answer_key": "solution.value"},
            },
            "max_prompt_tokens": 8,
        },
        "reward": {"name": "final_answer"},
        "rollout": {
            "engine": KIND.name,
            "dtype": "float32",
            "max_response_tokens": 6,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
        },
        "training": {"steps": 1, "micro_batch_tokens": 64, "lr": 1e-3},
        "evaluation": {"samples": 8, "temperature": 0.7, "top_p": 0.5, "max_response_tokens": 20},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_evaluate_measures_every_set_without_ranks(recipe: Path) -> None:
    argv = [sys.executable, "-m", "megatron_dppo.cli", "evaluate", str(recipe), "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    results = {result["name"]: result for result in found["results"]}
    samples = {name: result["samples"] for name, result in results.items()}
    assert samples == {
        "sums/accuracy_greedy": 1, "sums/avg@8": 8, "endless/accuracy_greedy": 1, "endless/avg@8": 8,
    }  # fmt: skip
    # top_p 0.5 leaves "7" alone: of 24 samples, without it, all are "7" once in 50,000 times
    for name in ("sums/accuracy_greedy", "sums/avg@8"):
        assert results[name]["accuracy"] == pytest.approx(2 / 3)
        assert (results[name]["truncated_share"], results[name]["response_length"]) == (0.0, 3.0)
    for name in ("endless/accuracy_greedy", "endless/avg@8"):  # what was cut off is wrong, at evaluation's own length
        assert results[name]["accuracy"] == 0.0
        assert (results[name]["truncated_share"], results[name]["response_length"]) == (1.0, 20.0)
    assert found["engine"].startswith(KIND.name)
    assert "1 without a usable solution.value (lines 2)" in " ".join(found["prompts"].values())
    assert json.loads((recipe.parent / "run" / "evaluate" / "summary.json").read_text()) == found
    assert not list((recipe.parent / "run" / "evaluate" / "logs").glob("rank*"))

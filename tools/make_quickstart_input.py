"""Makes the quickstart's input: a small Qwen3-MoE that half knows addition, and prompts with checkable answers.

    python tools/make_quickstart_input.py runs/quickstart/input

writes OUT/model (a Hugging Face directory with a tokenizer), OUT/train.jsonl and OUT/heldout.jsonl. The model is
warm-started by supervised training in this project's own Megatron path (two data-parallel ranks) on a teacher that
forgets carries, so that every prompt is solvable by sampling and the preferred mode is wrong: the paper's sanity test
(section 5), small.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dppo.data.addition import build_tokenizer, prompt_text, sample_problems, teacher, write_problems
from megatron_dppo.data.packing import LossWeights, MicroBatch, build_micro_batch
from megatron_dppo.data.trajectory import Scored, Trajectory
from megatron_dppo.job.machines import start_ranks
from megatron_dppo.job.processes import stop_on_exit, supervise
from megatron_dppo.weights.layout import Parallel

PARALLEL = Parallel(ranks=2)
ITERATIONS = 700
BATCH = 128  # problems an iteration, over all ranks
FORGET = 0.7  # probability that the teacher forgets a carry
NUM_TRAIN, NUM_HELD_OUT = 50_000, 2_000


def write_initial_model(path: Path, seed: int, num_layers: int = 2) -> None:
    """A random Qwen3-MoE of 225k parameters (with two layers) and the tokenizer of the task."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = build_tokenizer(path)
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # not hidden_size / heads, as in the real ones; what vLLM can do on CPU
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)


def supervised_batch(iteration: int, seed: int, rank: int, tokenizer: Any) -> MicroBatch:
    """This rank's share of an iteration's problems with the teacher's responses, every response token counted."""
    rng = random.Random(f"{seed}-{iteration}-{rank}")
    samples = []
    for a, b in sample_problems(rng, BATCH // PARALLEL.ranks, held_out=False):
        prompt = np.array(tokenizer.encode(prompt_text(a, b)), np.int32)
        response = np.array(tokenizer.encode(teacher(a, b, FORGET, rng)), np.int32)
        samples.append(Scored(_taught(prompt, response), {}, np.ones(len(response), np.float32)))
    return build_micro_batch(samples, num_topk=0, weights=LossWeights())


def _taught(prompt: np.ndarray, response: np.ndarray) -> Trajectory:
    """A response to imitate: like a sampled one, its log-probs are just not used."""
    num = len(response)
    return Trajectory(
        sample_id="", group_id="", engine="teacher", finish_reason="stop", temperature=1.0,
        prompt_ids=prompt, response_ids=response, loss_mask=np.ones(num, np.bool_),
        rollout_logprobs=np.zeros(num, np.float32), topk_ids=np.empty((num, 0), np.int32),
        topk_logprobs=np.empty((num, 0), np.float32), policy_versions=np.zeros(num, np.int32),
    )  # fmt: skip


def train_rank(model_path: Path, seed: int) -> None:
    """Supervised training on one rank: the trainer's own step, with a coefficient of 1 for every token."""
    from dataclasses import replace

    import torch
    from transformers import AutoTokenizer

    from megatron_dppo.backend.model import load_model
    from megatron_dppo.backend.optimizer import Optimizer, OptimizerSettings
    from megatron_dppo.backend.parallel import finalise_parallel, initialise_parallel
    from megatron_dppo.backend.step import loss_pass
    from megatron_dppo.weights.sync import save_checkpoint

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rank = initialise_parallel(PARALLEL, seed)
    model = load_model(model_path, rank, torch.float32, sequence_parallel=False)
    settings = OptimizerSettings(
        lr=3e-3,
        warmup_steps=50,
        decay_steps=ITERATIONS,
        min_lr_ratio=0.0,
        schedule="linear",
        beta2=0.98,
        weight_decay=0.01,
    )
    optimizer = Optimizer(model.chunks, settings, dtype=torch.float32, distributed=True)
    model = replace(model, chunks=optimizer.chunks)
    for iteration in range(ITERATIONS):
        batch = supervised_batch(iteration, seed, rank.rank, tokenizer)
        optimizer.advance()
        optimizer.zero()
        (sums,) = loss_pass(model, [batch], lambda _, stats, tokens: (torch.ones_like(stats.logprob), None, {}))
        optimizer.step(watch={"the loss": sums["loss"]})
        if rank.rank == 0 and (iteration + 1) % 100 == 0:
            print(f"iteration {iteration + 1}: loss {float(sums['loss'] / sums['count']):.4f}", flush=True)
    save_checkpoint(model.held, model_path, model_path)
    finalise_parallel()


def make_input(out: Path, seed: int) -> None:
    """Everything, written beside and renamed."""
    started = time.perf_counter()
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    rng = random.Random(seed)
    write_problems(beside / "train.jsonl", sample_problems(rng, NUM_TRAIN, held_out=False))
    write_problems(beside / "heldout.jsonl", sample_problems(rng, NUM_HELD_OUT, held_out=True))
    write_initial_model(beside / "model", seed)
    print(f"warm start: {ITERATIONS} iterations of supervised training on {PARALLEL.ranks} ranks", flush=True)
    with stop_on_exit() as children:
        argv = [sys.executable, __file__, str(beside), "--seed", str(seed), "--rank"]
        children.extend(start_ranks(argv, PARALLEL.ranks, env=os.environ, logs=beside / "logs"))
        supervise(children, until=children)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(beside, out)
    print(f"{out} made in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        train_rank(arguments.out / "model", arguments.seed)
    else:
        make_input(arguments.out, arguments.seed)

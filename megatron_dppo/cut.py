"""A recipe's cut: its layout on a model of four layers and narrow widths, small enough for a machine without GPUs.

Tensor, context and expert parallelism stay as they are, so that the same code splits the same kinds of weights; the
pipeline has at most as many chunks as there are layers, and data parallelism is what the fewest ranks leave. The
model keeps its architecture: whether heads share keys and values, or TP splits inside a group of them, groups of
experts, shared experts, dense first layers, latent attention. `tools/make_cut.py` writes one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.config import ClusterConfig, Config, ParallelConfig
from megatron_dppo.config.loading import save_config

LAYERS = 4
WIDTH = 32  # of a head, and of each rank's share of a feed-forward layer
VOCABULARY = 320  # bytes, special tokens, and rows that no token has
PROMPT_TOKENS, RESPONSE_TOKENS = 384, 16  # a token is a byte; DAPO-Math's instructions alone are 250
PROBLEMS = 64
SAMPLES = 2  # of each prompt
END, PAD = "<end>", "<pad>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def cut_parallel(parallel: ParallelConfig) -> ParallelConfig:
    """The same degrees on the fewest ranks, with at most `LAYERS` chunks of layers.

    Uneven stages stay uneven where chunks and layers allow that.
    """
    pipeline = min(parallel.pipeline, LAYERS)
    virtual = min(parallel.virtual, LAYERS // pipeline)
    chunks = pipeline * virtual
    uneven = None
    if parallel.chunk_layers is not None or LAYERS % chunks:
        each, rest = divmod(LAYERS, chunks)
        uneven = tuple(each + (1 <= chunk <= rest) for chunk in range(chunks))
    ranks = math.lcm(parallel.tensor * parallel.context * pipeline, parallel.expert * parallel.expert_tensor * pipeline)
    changes = {"pipeline": pipeline, "virtual": virtual, "chunk_layers": uneven, "ranks": ranks}
    return parallel.model_copy(update=changes)


def cut_model(hf: dict[str, Any], arch: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    """A config.json of the same architecture that `parallel` can split."""
    tensor = parallel.tensor
    if arch.latent is not None:
        kv_heads = heads = 2 * tensor
    elif arch.num_key_value_heads % tensor == 0:
        kv_heads = tensor * min(2, arch.num_key_value_heads // tensor)
        heads = kv_heads * min(2, arch.heads_per_group)
    else:  # fewer than TP ranks: TP splits inside a group
        kv_heads, heads = arch.num_key_value_heads, 2 * tensor
    small = {
        "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_size": heads * WIDTH, "intermediate_size": 2 * WIDTH * tensor, "vocab_size": VOCABULARY,
        "bos_token_id": None, "eos_token_id": VOCABULARY - 2, "pad_token_id": VOCABULARY - 1,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    if "head_dim" in hf:
        small["head_dim"] = WIDTH
    if arch.latent is not None:  # kv_lora_rank and qk_rope_head_dim stay: vLLM on the CPU computes no others
        small |= {"q_lora_rank": WIDTH, "qk_nope_head_dim": WIDTH, "v_head_dim": WIDTH}
        small["first_k_dense_replace"] = min(1, hf["first_k_dense_replace"])
    if arch.is_moe:
        groups = min(arch.num_expert_groups, 4)
        chosen = min(arch.expert_groups_per_tok, groups // 2) or 1
        experts = 2 * math.lcm(parallel.expert, 2 * groups)
        names = ("n_routed_experts", "n_group", "topk_group") if arch.latent is not None else ("num_experts",)
        small |= dict(zip(names, (experts, groups, chosen), strict=False))
        small["num_experts_per_tok"] = 2 * chosen
        small["moe_intermediate_size"] = WIDTH * math.lcm(parallel.expert_tensor, tensor)
    return {**hf, **small}


def cut_config(config: Config, directory: Path, parallel: ParallelConfig) -> Config:
    """The recipe with the cut's model, prompts and layout: one step, on this machine's CPU, with one engine."""
    sets = {
        name: chosen.model_copy(update={"path": directory / f"{name or 'eval'}.jsonl"})
        for name, chosen in config.data.eval.items()
    }
    groups = max(parallel.data, parallel.micro_batch_multiple)  # of a gradient step: samples for every replica
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": f"{config.run.name}_cut", "dir": directory / "run"},
        "model": {"path": directory / "model"},
        "data": {"train": directory / "train.jsonl", "eval": sets, "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {
            "engines": 1, "tensor": 1, "max_response_tokens": RESPONSE_TOKENS, "samples_per_prompt": SAMPLES,
            "prompts_per_step": config.training.minibatches * groups,
            "max_concurrency": 64,
        },
        "training": {"steps": 1, "micro_batch_tokens": 2 * (PROMPT_TOKENS + RESPONSE_TOKENS)},
        "evaluation": {"prompts": 2, "samples": min(config.evaluation.samples, SAMPLES)},
        "checkpoint": {"every": min(config.checkpoint.every, 1)},
    }  # fmt: skip
    sections = {name: getattr(config, name).model_copy(update=change) for name, change in changes.items()}
    cluster = ClusterConfig(devices_per_node=parallel.ranks, device="cpu")
    return config.model_copy(update={**sections, "parallel": parallel, "cluster": cluster})


def write_cut(config: Config, directory: Path, seed: int = 0) -> Path:
    """Writes recipe.yaml, model/ (random weights and a tokenizer of bytes) and prompts; returns the recipe's path.

    Raises ValueError and OSError where the recipe's config.json cannot be read.
    """
    arch, parallel = load_architecture(config.model.path), cut_parallel(config.parallel)
    hf = json.loads((config.model.path / "config.json").read_text(encoding="utf-8"))
    directory = directory.absolute()
    write_model(directory / "model", cut_model(hf, arch, parallel), seed)
    small = cut_config(config, directory, parallel)
    data = small.data
    _write_problems(data.train, data.prompt_key, data.answer_key, messages=data.answer_key.startswith("reward_model."))
    for chosen in data.eval.values():
        _write_problems(chosen.path, chosen.prompt_key or data.prompt_key, chosen.answer_key or data.answer_key)
    save_config(small, directory / "recipe.yaml")
    return directory / "recipe.yaml"


def write_model(path: Path, hf: dict[str, Any], seed: int) -> None:
    """A random model of a config.json, and a tokenizer whose tokens are bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"kimi_k2": "deepseek_v3"}.get(hf["model_type"], hf["model_type"])  # transformers has no kimi_k2
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf | {"model_type": kind}))
    model.to(torch.bfloat16).save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": hf["model_type"]}, indent=2))
    _write_tokenizer(path)


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fillers = {f"<{number}>": number for number in range(len(alphabet), VOCABULARY - 2)}
    vocabulary = {**alphabet, **fillers, END: VOCABULARY - 2, PAD: VOCABULARY - 1}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)


def _write_problems(path: Path, prompt_key: str, answer_key: str, *, messages: bool = False) -> None:
    """Sums, in the schema of the recipe's file; `messages`: as DAPO-Math has prompts."""
    lines = []
    for number in range(PROBLEMS):
        text = f"What is {number} + {number}?"
        record: dict[str, Any] = {prompt_key: [{"role": "user", "content": text}] if messages else text}
        inner: Any = str(2 * number)
        *parents, leaf = answer_key.split(".")
        for key in (leaf, *reversed(parents)):
            inner = {key: inner}
        lines.append(json.dumps(record | inner))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

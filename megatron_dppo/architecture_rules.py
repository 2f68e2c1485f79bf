"""Which Hugging Face configurations this package computes exactly: everything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

GROUPED_MODEL_TYPES = ("qwen3_moe", "qwen3", "qwen2", "llama")
LATENT_MODEL_TYPES = ("deepseek_v3", "kimi_k2")  # Kimi-K2 is DeepSeek-V3's architecture under its own name
SUPPORTED_MODEL_TYPES = GROUPED_MODEL_TYPES + LATENT_MODEL_TYPES
# Their files name all of these; a guessed default would be one implementation's.
LATENT_KEYS = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts_per_tok",
    "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor",
)  # fmt: skip
GROUP_SCORE_EXPERTS = 2  # DeepSeek-V3 ranks a group of experts by the sum of this many of its best


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 nests rope settings in `rope_parameters`; older files have `rope_theta` and `rope_scaling`."""
    if hf.get("rope_parameters"):
        return dict(hf["rope_parameters"])
    return {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}


def rope_type(rope: dict[str, Any]) -> str:
    """`default`, `llama3`, `yarn`...; older files call the key `type`."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def unsupported_features(hf: dict[str, Any]) -> list[str]:
    """What stands in the way of an exact computation, each as `key: got X, expected Y`; empty where nothing does."""
    faults = []
    kind = hf.get("model_type")
    if kind not in SUPPORTED_MODEL_TYPES:
        faults.append(f"model_type: got {kind!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(name):
            faults.append(f"{name}: got true, expected false")
    if other := set(hf.get("layer_types") or ()) - {"full_attention"}:
        faults.append(f"layer_types: got {', '.join(sorted(other))}, expected full_attention only")
    if hf.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act: got {hf['hidden_act']!r}, expected 'silu'")
    if hf.get("num_experts_per_tok") == 1 and hf.get("norm_topk_prob"):
        faults.append("norm_topk_prob: got true, expected false with one expert per token (its weight would be 1)")
    latent = kind in LATENT_MODEL_TYPES
    faults += _rope_faults(rope_parameters(hf), "yarn" if latent else "llama3")
    if (partial := hf.get("partial_rotary_factor") or 1.0) != 1.0:
        faults.append(f"partial_rotary_factor: got {partial}, expected 1")
    return [*faults, *_latent_faults(hf)] if latent else faults


def _rope_faults(rope: dict[str, Any], scaling: str) -> Iterator[str]:
    kind = rope_type(rope)
    if kind not in ("default", scaling):
        yield f"rope_type: got {kind!r}, expected 'default' or {scaling!r}"
        return
    needed = {
        "default": (),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
    for name in needed[kind]:
        if not rope.get(name):
            yield f"rope {name}: got {rope.get(name)!r}, expected a positive number for rope_type {kind!r}"
    if (partial := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        yield f"rope partial_rotary_factor: got {partial}, expected 1"
    if kind != "yarn":
        return
    if rope.get("attention_factor") is not None:
        yield f"rope attention_factor: got {rope['attention_factor']}, expected none (the mscales give it)"
    if not rope.get("truncate", True):
        yield "rope truncate: got false, expected true"
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim) and (all_dim or mscale != 1):
        # the two published implementations disagree on what one of them alone means
        yield f"rope mscale, mscale_all_dim: got {mscale}, {all_dim}, expected both or neither"


def _latent_faults(hf: dict[str, Any]) -> Iterator[str]:
    """DeepSeek-V3's family; Megatron's router has one rule for groups and normalisation, which must be the model's."""
    if absent := [name for name in LATENT_KEYS if name not in hf]:
        yield f"{', '.join(absent)}: got nothing, expected a value"
        return
    heads = hf.get("num_attention_heads")
    if (kv_heads := hf.get("num_key_value_heads") or heads) != heads:
        yield f"num_key_value_heads: got {kv_heads}, expected num_attention_heads = {heads}"
    expected = {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    for name, value in expected.items():
        if hf.get(name, value) != value:
            yield f"{name}: got {hf[name]!r}, expected {value!r}"
    top_k, groups, chosen = hf["num_experts_per_tok"], hf["n_group"], hf["topk_group"]
    if top_k > 1 and not hf["norm_topk_prob"]:
        yield "norm_topk_prob: got false, expected true with more than one expert per token"
    if chosen < groups and top_k // chosen != GROUP_SCORE_EXPERTS:
        yield (
            f"num_experts_per_tok / topk_group: got {top_k} / {chosen}, expected {GROUP_SCORE_EXPERTS} (the model "
            f"ranks a group by its {GROUP_SCORE_EXPERTS} best experts, Megatron by that quotient)"
        )

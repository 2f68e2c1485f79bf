"""The shape of a model, read once from a Hugging Face `config.json`.

Everything that depends on a model's numbers (Megatron's configuration, the weight mapping, the checks of a
config) takes them from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_MODEL_TYPES = ("qwen3_moe", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with grouped-query attention and dense or mixture-of-experts layers."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of the dense layers
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    moe_layers: tuple[bool, ...] = ()  # one per layer: True where the layer has experts

    @property
    def is_moe(self) -> bool:
        """True when at least one layer has experts."""
        return any(self.moe_layers)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


def load_architecture(model_path: Path | str) -> Architecture:
    """Reads `config.json` of a Hugging Face directory.

    Raises FileNotFoundError where there is none and ValueError where the model is one that this package would
    not compute exactly (another model type, biases, rope scaling, a sliding window, an activation other than silu).
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.path: no config.json in {model_path}, expected a Hugging Face model directory")
    return architecture_from_hf(json.loads(path.read_text()))


def architecture_from_hf(hf: dict[str, Any]) -> Architecture:
    """The Architecture of a parsed `config.json`; raises ValueError naming every feature that is not supported."""
    faults = _unsupported_features(hf)
    if faults:
        raise ValueError("model config: " + "; ".join(faults))
    heads = hf["num_attention_heads"]
    moe_layers = _moe_layers(hf)
    moe: dict[str, Any] = {}
    if any(moe_layers):
        moe = {
            "num_experts": _num_experts(hf),
            "num_experts_per_tok": hf["num_experts_per_tok"],
            "moe_intermediate_size": hf["moe_intermediate_size"],
            "norm_topk_prob": hf.get("norm_topk_prob", False),
        }
    return Architecture(
        model_type=hf["model_type"],
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rope_theta=float(_rope_parameters(hf).get("rope_theta", 10000.0)),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        moe_layers=moe_layers,
        **moe,
    )


def _rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 nests rope settings in `rope_parameters`; older files have `rope_theta` and `rope_scaling`."""
    if hf.get("rope_parameters"):
        return dict(hf["rope_parameters"])
    return {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}


def _num_experts(hf: dict[str, Any]) -> int:
    """transformers 5 writes `num_local_experts` where the hub's files have `num_experts`."""
    return hf.get("num_experts") or hf.get("num_local_experts") or 0


def _moe_layers(hf: dict[str, Any]) -> tuple[bool, ...]:
    """Qwen3-MoE's rule: every `decoder_sparse_step`-th layer, except those in `mlp_only_layers`."""
    num_layers = hf["num_hidden_layers"]
    if hf["model_type"] != "qwen3_moe" or not _num_experts(hf):
        return (False,) * num_layers
    step, dense = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _unsupported_features(hf: dict[str, Any]) -> list[str]:
    faults = []
    if hf.get("model_type") not in SUPPORTED_MODEL_TYPES:
        faults.append(f"model_type: got {hf.get('model_type')!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    if hf.get("attention_bias"):
        faults.append("attention_bias: got true, expected false")
    if hf.get("use_sliding_window"):
        faults.append("use_sliding_window: got true, expected false")
    if hf.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act: got {hf['hidden_act']!r}, expected 'silu'")
    if hf.get("num_experts_per_tok") == 1 and hf.get("norm_topk_prob"):
        faults.append("norm_topk_prob: got true, expected false with one expert per token (its weight would be 1)")
    rope = _rope_parameters(hf)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        faults.append(f"rope_type: got {rope_type!r}, expected 'default' (no rope scaling)")
    return faults

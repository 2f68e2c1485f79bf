from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_dppo.architecture import architecture_from_hf
from megatron_dppo.architecture_rules import unsupported_features
from megatron_dppo.config import Config
from megatron_dppo.config.loading import ConfigError, check_config, load_config, save_config, validate_or_raise
from megatron_dppo.data.addition import build_tokenizer, write_problems
from megatron_dppo.weights.hub_files import TensorInfo, header_bytes
from megatron_dppo.weights.mapping import hub_shapes

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"  # what git leaves of a large file
LATENT = {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 560,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "moe_intermediate_size": 62, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
ARCHITECTURE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 14,
}


def write_model(path: Path, hf: dict[str, Any]) -> None:
    """config.json and, where it is one that is computed, weights of 0: a header, and a hole in the file."""
    (path / "config.json").write_text(json.dumps(hf))
    if unsupported_features(hf):
        return
    tensors = {name: TensorInfo(torch.float32, shape) for name, shape in hub_shapes(architecture_from_hf(hf)).items()}
    header = header_bytes(tensors)
    (path / "model.safetensors").write_bytes(header)
    os.truncate(path / "model.safetensors", len(header) + sum(info.nbytes for info in tensors.values()))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A recipe without a fault: a model directory, a tokenizer and prompts that all exist."""
    model = tmp_path / "model"
    build_tokenizer(model)
    write_model(model, ARCHITECTURE)
    write_problems(tmp_path / "train.jsonl", [(347, 285)])
    return {
        "run": {"name": "test"},
        "model": {"path": str(model), "dtype": "float32"},
        "parallel": {"tensor": 2, "expert": 2, "ranks": 2},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 16},
        "reward": {"name": "final_answer"},
        "rollout": {"max_response_tokens": 12, "prompts_per_step": 8, "samples_per_prompt": 4},
        "training": {"steps": 10, "micro_batch_tokens": 1024, "lr": "5e-4"},
    }


def write(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def load(recipe: dict[str, Any], tmp_path: Path, *overrides: str) -> Config:
    return load_config(write(recipe, tmp_path), overrides)


def faults_of(recipe: dict[str, Any], tmp_path: Path, *overrides: str) -> list[str]:
    return check_config(load(recipe, tmp_path, *overrides))


def test_a_sound_recipe_has_no_fault_and_its_defaults_are_filled_in(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = load(recipe, tmp_path)
    assert check_config(config) == []
    validate_or_raise(config)
    assert config.run.dir == Path("runs/test")
    assert config.training.lr == 5e-4  # YAML reads 5e-4 without a point as text
    assert config.parallel.data == 1
    assert config.parallel.uses_sequence_parallel
    assert config.reward.marker == ">"  # type: ignore[union-attr]


def test_overrides_are_yaml_values_at_dotted_keys(recipe: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["training.steps=50", "rollout.urls=[http://a:1, http://b:2]", "objective.cap=.inf"]
    overrides += [
        "evaluation.every=0",
        "training.lr=1e-3",
        "run.name=2026",
        "parallel.sequence_parallel=true",
        "routing.mode=off",  # false, to YAML
    ]
    config = load(recipe, tmp_path, *overrides)
    assert config.training.steps == 50
    assert config.rollout.urls == ["http://a:1", "http://b:2"]
    assert config.objective.cap == math.inf
    assert config.objective.overrides == {"cap": math.inf}
    assert config.training.lr == 1e-3
    assert config.run.name == "2026"
    assert config.routing.mode == "off"
    assert config.parallel.sequence_parallel is True


def test_the_saved_config_reads_back_equal(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = load(recipe, tmp_path, "objective.cap=.inf", "reward.name=math", "reward.timeout_s=2")
    save_config(config, tmp_path / "out" / "resolved.yaml")
    assert load_config(tmp_path / "out" / "resolved.yaml") == config
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["resolved.yaml"]


def test_type_faults_and_broken_rules_come_in_one_message(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["trainning"] = {}
    recipe["model"]["path"] = str(tmp_path / "absent")
    with pytest.raises(ConfigError) as caught:
        load(recipe, tmp_path, "training.step=3", "rollout.top_p=0.9", "training.lr=-1", "parallel.tensor=x")
    message = str(caught.value)
    assert len(caught.value.faults) == 6
    assert "6 faults" in message
    assert "trainning: unknown key, did you mean training?" in message
    assert "training.step: unknown key, did you mean training.steps?" in message
    assert "training.lr: got -1, input should be greater than 0" in message
    assert "parallel.tensor: got 'x', input should be a valid integer" in message
    assert f"model.path: no directory {tmp_path}/absent" in message
    assert "rollout.top_p: got 0.9, expected 1.0" in message


def test_every_broken_rule_is_in_the_one_message(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = load(
        recipe,
        tmp_path,
        "parallel.tensor=3",
        "parallel.expert=3",
        "parallel.ranks=4",
        "rollout.top_k=50",
        "data.max_prompt_tokens=100",
        "training.minibatches=3",
        "objective.name=dppo",
        "data.train=absent.jsonl",
        "loss.constant=12",
        "evaluation.target_accuracy=0.9",
    )
    with pytest.raises(ConfigError) as caught:
        validate_or_raise(config)
    keys = [fault.partition(":")[0] for fault in caught.value.faults]
    assert keys == [
        "data.train",
        "evaluation.target_accuracy",
        "parallel.ranks",
        "parallel.ranks",
        "parallel.tensor",
        "parallel.tensor",
        "parallel.expert",
        "evaluation.every",
        "rollout.top_k",
        "data.max_prompt_tokens + rollout.max_response_tokens",
        "training.minibatches",
        "loss.constant",
        "objective",
    ]
    assert "got 3, expected a divisor of the model's 4 attention heads" in str(caught.value)
    assert "got 3, expected a divisor of the model's 8 experts" in str(caught.value)
    assert "got 112, expected at most the model's max_position_embeddings 64" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["parallel.tensor=4", "parallel.ranks=4"], None),  # a multiple of the 2 KV heads
        (["parallel.pipeline=4", "parallel.ranks=8"], "parallel.pipeline: got 4, expected a divisor of 2 layers"),
        (["parallel.virtual=2"], "parallel.virtual: got 2, expected 1 with one pipeline stage"),
        (
            ["parallel.pipeline=2", "parallel.ranks=4", "parallel.chunk_layers=[2, 1]"],
            "parallel.chunk_layers: got 3 layers in all, expected the model's 2",
        ),
        (["parallel.pipeline=2", "parallel.ranks=4", "parallel.chunk_layers=[2, 0]"], None),
        (["parallel.sequence_parallel=false"], "parallel.sequence_parallel: got false, expected true"),
        (["parallel.tensor=1", "parallel.sequence_parallel=true"], "parallel.sequence_parallel: got true"),
        (
            ["parallel.expert_tensor=2"],
            "parallel.ranks: got 2, expected a multiple of expert x expert_tensor",
        ),
        (
            ["parallel.expert_tensor=3", "parallel.ranks=6"],
            "parallel.expert_tensor: got 3, expected a divisor",
        ),
        (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt: got 1"),
        (["rollout.urls=[node1:8000]"], "rollout.urls: got 'node1:8000'"),
        (["rollout.urls=[http://10.1.2.3:8000]"], None),
        (["rollout.urls=[http://127.0.0.1:8000, http://127.0.0.1:8000]"], "rollout.urls: got an address twice"),
        (["rollout.urls=[http://10.1.2.3:8000]", "sync.transport=shm"], "sync.transport: got shm, expected group or"),
        (["rollout.urls=[http://10.1.2.3:8000]", "sync.transport=disk"], "sync.dir: missing, http://10.1.2.3:8000"),
        (["rollout.urls=[http://10.1.2.3:8000]", "sync.transport=disk", "sync.dir=/shared"], None),
        (["rollout.urls=[http://10.1.2.3:8000]", "rollout.tensor=2"], "rollout.tensor: got 2, which engines of"),
        (["rollout.tensor=8"], "rollout.tensor: got 8, expected a divisor of the model's"),
        (["rollout.expert_parallel=true"], "rollout.expert_parallel: got true, expected false: there is nothing"),
        (["rollout.expert_parallel=true", "rollout.tensor=2"], None),
        (
            ["objective.name=dppo_topk_tv", "objective.top_k=5", "rollout.log_topk=3"],
            "rollout.log_topk: got 3, expected 0",
        ),
        (["training.micro_batch_tokens=27"], "training.micro_batch_tokens: got 27, expected at least 28"),
        (["parallel.ranks=8", "training.minibatches=8"], None),
        (["parallel.ranks=16", "training.minibatches=8"], "training.minibatches: got 8, expected fewer: 4"),
        (["training.min_lr_ratio=0.1"], "training.min_lr_ratio: got 0.1, which schedule constant"),
        (["training.schedule=linear"], "training.min_lr_ratio: got 1.0, expected less"),
        (["training.schedule=cosine", "training.min_lr_ratio=0"], None),
        (
            ["training.schedule=linear", "training.min_lr_ratio=0", "training.warmup_steps=10"],
            "training.warmup_steps: got 10, expected below decay_steps 10",
        ),
        (["loss.normaliser=constant"], "loss.constant: missing"),
        (
            ["loss.skip_zero_advantage=true", "loss.entropy_coefficient=0.01"],
            "loss.skip_zero_advantage: got true, expected false",
        ),
        (["loss.skip_zero_advantage=true"], None),
        (
            ["loss.skip_zero_advantage=true", "loss.kl.coefficient=0.1"],
            "loss.skip_zero_advantage: got true, expected false: the pull to a reference",
        ),
        (["loss.kl.estimator=k1"], "loss.kl.estimator: got k1, which loss.kl.coefficient 0 does not use"),
        (["loss.kl.coefficient=0.1", "loss.kl.estimator=k1"], None),
        (
            ["loss.kl.coefficient=0.1", "loss.kl.estimator=k1", "loss.kl.importance=false"],
            "loss.kl.importance: got false, expected true: k1 alone",
        ),
        (["loss.kl.coefficient=0.1", "loss.kl.reference=nowhere"], "loss.kl.reference: no config.json in nowhere"),
        (["training.optimizer=sgd"], "parallel.distributed_optimizer: got true, expected false"),
        (
            ["training.optimizer=sgd", "parallel.distributed_optimizer=false", "checkpoint.every=2"],
            "checkpoint.every: got 2, expected 0",
        ),
        (["training.optimizer=sgd", "parallel.distributed_optimizer=false"], None),
        (
            ["training.offload_optimizer=true", "model.dtype=bfloat16"],
            "training.offload_optimizer: got true, expected false: there is no GPU",
        ),
        (["training.no_weight_decay=['*.gate.weight']"], "training.no_weight_decay: got names, expected none"),
        (["training.no_weight_decay=['*.gate.weight']", "training.weight_decay=0.1"], None),
        (
            ["training.no_weight_decay=['*.gates']", "training.weight_decay=0.1"],
            "training.no_weight_decay: got '*.gates', expected to match tensors",
        ),
        (["model.layers=transformer_engine"], "model.layers: got transformer_engine, expected auto or torch"),
        (["model.layers=torch"], None),
        (["training.expert_bias_rate=0.001"], "training.expert_bias_rate: got 0.001, expected 0"),
        (["head.memory_mib=1e-5"], "head.memory_mib: got 1e-05, expected at least 0.001: one token's float32 logits"),
        (["head.memory_mib=0.001", "head.path=chunk"], None),
        (["objective.alpha=0.1"], "objective: dppo_binary_tv: got alpha, which it does not use"),
        (
            ["objective.name=dppo_topk_tv"],
            "objective.top_k: got 20, expected less than the model's vocabulary",
        ),
        (["objective.name=dppo_topk_tv", "objective.top_k=15"], None),
        (["rollout.log_topk=16"], "rollout.log_topk: got 16, expected less than"),
        (["data.chat_template=true"], "data.chat_template: got true, expected false"),
        (["data.answer_key=solution"], "data.train: the first line of"),
        (["routing.measure_every=2"], "routing.measure_every: got 2, which routing.mode off does not use"),
        (["routing.mode=rollout", "routing.measure_every=2"], None),
        (
            ["routing.mode=recompute", "training.packed=false"],
            "training.packed: got false, expected true: routing.mode",
        ),
    ],
)
def test_each_rule(recipe: dict[str, Any], tmp_path: Path, overrides: list[str], fault: str | None) -> None:
    faults = faults_of(recipe, tmp_path, *overrides)
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert faults[0].startswith(fault)


def test_two_overrides_that_an_objective_does_not_use_are_both_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    faults = faults_of(recipe, tmp_path, "objective.alpha=0.1", "objective.eps_low=0.2")
    assert ["alpha" in fault for fault in faults] == [False, True]
    assert ["eps_low" in fault for fault in faults] == [True, False]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"vocab_size": 15}, "its largest id is 15, expected below the model's vocab_size 15"),
        ({"eos_token_id": 3}, "its eos_token '$' is id 14, expected the model's eos_token_id 3"),
        ({"eos_token_id": [3, 14]}, None),
        ({"eos_token_id": None}, "config.json has no eos_token_id, expected the tokenizer's 14"),
        ({"num_experts": None}, "parallel.expert: got 2, expected 1: the model has no experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "got weights quantised by fp8 in"),
        ({"quantization_config": None}, None),
        (LATENT, None),  # vLLM's list of head sizes is for the other attention
        (LATENT | {"kv_lora_rank": 32}, "got kv_lora_rank + qk_rope_head_dim = 48, expected what vLLM computes"),
        (LATENT | {"moe_intermediate_size": 63}, "got 2, expected a divisor of the shared experts' width 63"),
        ({"num_attention_heads": None, "hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
    ],
)
def test_model_against_tokenizer_and_layout(
    recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], fault: str | None
) -> None:
    write_model(tmp_path / "model", ARCHITECTURE | change)
    faults = faults_of(recipe, tmp_path)
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert fault in faults[0]


def test_a_missing_weights_file_of_an_index_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "model-1.safetensors").write_bytes(b"")
    (fault,) = faults_of(recipe, tmp_path)
    assert fault.endswith("lacks 1 of 2 weights files: model-2.safetensors")


def test_damaged_model_files_are_faults_not_crashes(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    (fault,) = faults_of(recipe, tmp_path)
    assert "tokenizer.json cannot be read" in fault
    build_tokenizer(tmp_path / "model")
    for text, expected in (
        ("{", "model/config.json: is not JSON: Expecting property name"),
        ("[1]", "model/config.json: got a JSON list, expected an object"),
        (POINTER, "model/config.json: is not JSON (it is a git-lfs pointer: `git lfs pull` fetches the file)"),
    ):
        (tmp_path / "model" / "config.json").write_text(text)
        (fault,) = faults_of(recipe, tmp_path)
        assert expected in fault
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert any("has no 'num_attention_heads'" in fault for fault in faults_of(recipe, tmp_path))


def test_weights_that_no_rank_could_load_are_faults(recipe: dict[str, Any], tmp_path: Path) -> None:
    weights = tmp_path / "model" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert "model.safetensors: truncated: got" in faults_of(recipe, tmp_path)[0]
    weights.write_text(POINTER)
    assert "expected a safetensors file (it is a git-lfs pointer: `git lfs pull`" in faults_of(recipe, tmp_path)[0]
    write_model(weights.parent, ARCHITECTURE)
    (weights.parent / "config.json").write_text(json.dumps(ARCHITECTURE | {"num_hidden_layers": 3}))
    (fault,) = faults_of(recipe, tmp_path)
    assert "got no tensor model.layers.2.input_layernorm.weight, expected it for qwen3_moe" in fault
    index = weights.with_name("model.safetensors.index.json")
    for text, expected in ((POINTER, "is not JSON (it is a git-lfs pointer"), ("{}", "got no weight_map")):
        index.write_text(text)
        (fault,) = faults_of(recipe, tmp_path)
        assert f"{index}: {expected}" in fault


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\n", "is empty"),
        (POINTER.encode(), "has no JSON object in its first 3 lines (it is a git-lfs pointer"),
        (b'[\n  "a",\n  "b"\n]\n', "has no JSON object in its first 4 lines, expected JSONL"),
        (b'{"promt": "1=", "answer": "1"}\n', "has no key 'prompt', its keys are answer, promt"),
        (b'not JSON\n{"prompt": "1=", "answer": "1"}\n', None),  # a line is judged when it is read
        (b'\xef\xbb\xbf{"prompt": "1=", "answer": "1"}\r\n', None),
    ],
)
def test_a_file_of_which_no_prompt_could_be_used(
    recipe: dict[str, Any], tmp_path: Path, data: bytes, fault: str | None
) -> None:
    (tmp_path / "train.jsonl").write_bytes(data)
    faults = faults_of(recipe, tmp_path)
    assert [fault in found for found in faults] == ([] if fault is None else [True])


def test_a_path_says_what_is_there_or_where_from(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe["model"]["path"] = "nowhere"
    faults = faults_of(recipe, tmp_path, f"data.train={tmp_path}")
    assert f"model.path: no directory nowhere in {tmp_path}, expected a Hugging Face model directory" in faults
    assert f"data.train: {tmp_path} is a directory, expected JSONL with one prompt and answer a line" in faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("run: {name: a", "is not YAML"),
        ("- 1\n", "got list, expected a mapping of sections"),
        ("run: {name: a}\nrun: {name: b}\n", "key 'run' given twice"),
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=fault):
        load_config(tmp_path / "recipe.yaml")


def test_bad_overrides_are_faults(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            recipe,
            tmp_path,
            "steps",
            "run.name.first=a",
            "reward.markr=x",
            "rollout.seed=1",
            "training.lr=.nan",
            "parallel.chunk_layers=[-1, 3]",
        )
    assert caught.value.faults[:2] == [
        "override 'steps': expected key.path=value, as in training.steps=50",
        "override 'run.name.first=a': name is a value, not a section",
    ]
    assert set(caught.value.faults[2:]) == {
        "reward.markr: unknown key, did you mean reward.marker?",
        "rollout.seed: unknown key, did you mean run.seed?",
        "training.lr: got nan, input should be a finite number",
        "parallel.chunk_layers.0: got -1, input should be greater than or equal to 0",
    }


def test_an_absent_recipe_is_one_clear_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_the_quickstart_recipe_is_the_tried_one() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    training, rollout, parallel = config.training, config.rollout, config.parallel
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.temperature) == (64, 8, 1.0)
    assert (training.minibatches, training.lr, training.beta1, training.beta2) == (4, 5e-4, 0.9, 0.999)
    assert (training.warmup_steps, training.schedule, training.decay_steps) == (4, "linear", 60)
    assert (training.min_lr_ratio, training.clip_grad) == (0.1, 1.0)
    assert (parallel.tensor, parallel.expert, parallel.ranks, parallel.distributed_optimizer) == (
        2,
        2,
        2,
        True,
    )
    assert (config.objective.name, config.objective.overrides) == ("dppo_binary_tv", {})
    assert (config.model.dtype, rollout.dtype) == ("float32", "float32")
    assert (config.evaluation.every, config.evaluation.target_accuracy) == (5, 0.93)
    needs_input = ("model.path: no directory", "data.train: no file", "data.eval: no file")
    assert [fault for fault in check_config(config) if not fault.startswith(needs_input)] == []

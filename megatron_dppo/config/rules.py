"""The rules of a config that no single field can state: between fields, against the model's files and the
prompts'.

A rule is a function whose parameter names are the config's sections it reads (and `arch`, the model's
numbers, where its config.json can be read); it yields one line per fault, `key: got X, expected Y` and what
to do. A rule runs when everything it reads is there, so a config broken in one place is still checked in
every other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.config.cluster_rules import CLUSTER_RULES
from megatron_dppo.config.file_rules import FILE_RULES
from megatron_dppo.config.rollout_rules import ENGINE_MACHINE_RULES, ROLLOUT_RULES
from megatron_dppo.data.prompts import PLACE
from megatron_dppo.files import UnreadableFile
from megatron_dppo.weights.layout import chunk_layers, padded_vocab_size
from megatron_dppo.weights.mapping import hub_shapes

if TYPE_CHECKING:
    from megatron_dppo.config import (
        CheckpointConfig,
        ClusterConfig,
        DataConfig,
        EvaluationConfig,
        HeadConfig,
        LoraConfig,
        LossConfig,
        ModelConfig,
        ObjectiveConfig,
        ParallelConfig,
        RolloutConfig,
        RoutingConfig,
        TrainingConfig,
    )


Rule = Callable[..., Iterator[str]]


def broken_rules(sections: Mapping[str, Any], rules: Sequence[Rule], arch: Architecture | None = None) -> list[str]:
    """One line for every broken rule among the given sections of a config (name -> section). Reads files.

    `arch`: the model's numbers, where they are not to be read from `model.path`.
    """
    known = dict(sections)
    faults: list[str] = []
    if arch is not None:
        known["arch"] = arch
    elif "model" in known:
        try:
            known["arch"] = load_architecture(known["model"].path)
        except FileNotFoundError:
            pass  # model_files says it
        except (OSError, ValueError) as error:
            faults.append(f"model.path: {error}")
    for rule in rules:
        wanted = inspect.signature(rule).parameters
        if wanted.keys() <= known.keys():
            try:
                faults += rule(**{name: known[name] for name in wanted})
            except (OSError, UnreadableFile) as error:  # a file that is there and cannot be read
                if not any(str(error) in fault for fault in faults):
                    faults.append(f"{', '.join(wanted)}: {error}")
    return faults


def _ranks(parallel: ParallelConfig) -> Iterator[str]:
    """The ranks divide into both grids, the dense layers' and the experts'."""
    for names in (("tensor", "context", "pipeline"), ("expert", "expert_tensor", "pipeline")):
        size = math.prod(getattr(parallel, name) for name in names)
        if parallel.ranks % size:
            yield f"parallel.ranks: got {parallel.ranks}, expected a multiple of {' x '.join(names)} = {size}"
    if parallel.sequence_parallel is True and parallel.tensor == 1:
        yield "parallel.sequence_parallel: got true with parallel.tensor 1, expected false or auto"


def _layers(model: ModelConfig) -> Iterator[str]:
    if model.layers != "transformer_engine":
        return
    import torch

    if not torch.cuda.device_count() or find_spec("transformer_engine") is None:
        yield "model.layers: got transformer_engine, expected auto or torch: there is none, or no GPU"


def _layout(parallel: ParallelConfig, arch: Architecture) -> Iterator[str]:
    """Every degree of parallelism divides what it splits."""
    tensor, heads, kv_heads = parallel.tensor, arch.num_attention_heads, arch.num_key_value_heads
    if heads % tensor:
        yield f"parallel.tensor: got {tensor}, expected a divisor of the model's {heads} attention heads"
    if kv_heads % tensor and tensor % kv_heads:
        yield f"parallel.tensor: got {tensor}, expected a divisor or multiple of its {kv_heads} KV heads"
    if not all(arch.moe_layers) and arch.intermediate_size % tensor:
        yield (
            f"parallel.tensor: got {tensor}, expected a divisor of the dense layers' intermediate_size "
            f"{arch.intermediate_size}"
        )
    try:
        chunk_layers(arch.num_layers, parallel.layout, 0)
    except ValueError as error:
        if not str(error).startswith("parallel: "):  # ranks that do not divide: `_ranks` says it
            yield str(error)
    if not arch.is_moe:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                yield f"parallel.{name}: got {getattr(parallel, name)}, expected 1: the model has no experts"
        return
    if arch.num_experts % parallel.expert:
        experts = arch.num_experts
        yield f"parallel.expert: got {parallel.expert}, expected a divisor of the model's {experts} experts"
    if arch.moe_intermediate_size % parallel.expert_tensor:
        yield (
            f"parallel.expert_tensor: got {parallel.expert_tensor}, expected a divisor of the experts' "
            f"moe_intermediate_size {arch.moe_intermediate_size}"
        )
    if arch.shared_expert_intermediate_size % tensor:
        yield (
            f"parallel.tensor: got {tensor}, expected a divisor of the shared experts' width "
            f"{arch.shared_expert_intermediate_size}"
        )
    if tensor > 1 and not parallel.uses_sequence_parallel:
        yield "parallel.sequence_parallel: got false, expected true or auto: experts under tensor > 1 need it"


def _lora(lora: LoraConfig) -> Iterator[str]:
    """What a recipe may name already, and no trainer does yet."""
    if lora.rank:
        yield (
            f"lora: got rank {lora.rank}, expected 0: training of low-rank adapters is not there yet; leave the "
            "section out to train all weights"
        )
    elif lora.alpha is not None:
        yield f"lora.alpha: got {lora.alpha}, which lora.rank 0 does not use"


def _templates(data: DataConfig) -> Iterator[str]:
    """The prompt has one place in every template."""
    templates: dict[str, str | None] = {"data.prompt_template": data.prompt_template}
    templates |= {f"data.eval.{name}.prompt_template": chosen.prompt_template for name, chosen in data.eval.items()}
    for key, template in templates.items():
        if template is not None and template.count(PLACE) != 1:
            yield f"{key}: got {template!r}, expected {PLACE} once, where the prompt goes"


def _evaluation(evaluation: EvaluationConfig) -> Iterator[str]:
    if not evaluation.greedy and not evaluation.sampled:
        yield "evaluation.greedy, evaluation.sampled: got false for both, expected one of them true"
    if not evaluation.sampled:
        for name in ("samples", "temperature", "top_p"):
            if (got := getattr(evaluation, name)) != type(evaluation).model_fields[name].default:
                yield f"evaluation.{name}: got {got}, which evaluation.sampled false does not use"
    if evaluation.target_accuracy is not None and not evaluation.every:
        yield "evaluation.every: got 0, expected more: evaluation.target_accuracy needs it"


def _advantage_groups(rollout: RolloutConfig) -> Iterator[str]:
    if rollout.samples_per_prompt == 1:
        yield "rollout.samples_per_prompt: got 1, expected at least 2: a group of one has advantage 0"


def _lengths(
    rollout: RolloutConfig, data: DataConfig, evaluation: EvaluationConfig, arch: Architecture
) -> Iterator[str]:
    for name, tokens in (("rollout", rollout.max_response_tokens), ("evaluation", evaluation.max_response_tokens)):
        if tokens and (longest := data.max_prompt_tokens + tokens) > arch.max_position_embeddings:
            yield (
                f"data.max_prompt_tokens + {name}.max_response_tokens: got {longest}, expected at most "
                f"the model's max_position_embeddings {arch.max_position_embeddings}"
            )


def _micro_batch(
    rollout: RolloutConfig, data: DataConfig, training: TrainingConfig, parallel: ParallelConfig
) -> Iterator[str]:
    multiple = 2 * parallel.context if parallel.context > 1 else 1
    longest = -(-(data.max_prompt_tokens + rollout.max_response_tokens) // multiple) * multiple
    if training.micro_batch_tokens < longest:
        yield (
            f"training.micro_batch_tokens: got {training.micro_batch_tokens}, expected at least {longest}, "
            "the longest sequence (data.max_prompt_tokens + rollout.max_response_tokens)"
        )


def _minibatches(rollout: RolloutConfig, training: TrainingConfig) -> Iterator[str]:
    if rollout.prompts_per_step % training.minibatches:
        yield (
            f"training.minibatches: got {training.minibatches}, expected a divisor of "
            f"rollout.prompts_per_step {rollout.prompts_per_step}: groups stay whole"
        )


def _replicas(rollout: RolloutConfig, training: TrainingConfig, parallel: ParallelConfig) -> Iterator[str]:
    samples = rollout.prompts_per_step * rollout.samples_per_prompt // training.minibatches
    if samples < parallel.data:
        yield (
            f"training.minibatches: got {training.minibatches}, expected fewer: {samples} samples in each "
            f"for {parallel.data} data-parallel replicas"
        )


def _packed(training: TrainingConfig, parallel: ParallelConfig) -> Iterator[str]:
    if parallel.context > 1 and not training.packed:
        yield f"training.packed: got false, expected true: parallel.context {parallel.context} divides packed sequences"


def _schedule(training: TrainingConfig) -> Iterator[str]:
    if training.schedule == "constant":
        if training.min_lr_ratio != 1.0:
            yield f"training.min_lr_ratio: got {training.min_lr_ratio}, which schedule constant does not use"
        if training.decay_steps is not None:
            yield f"training.decay_steps: got {training.decay_steps}, which schedule constant does not use"
        return
    if training.min_lr_ratio == 1.0:
        yield f"training.min_lr_ratio: got 1.0, expected less: schedule {training.schedule} decays to it"
    decay_steps = training.decay_steps or training.steps
    if training.warmup_steps >= decay_steps:
        yield f"training.warmup_steps: got {training.warmup_steps}, expected below decay_steps {decay_steps}"


def _loss(loss: LossConfig) -> Iterator[str]:
    if loss.normaliser == "constant" and loss.constant is None:
        yield "loss.constant: missing, loss.normaliser constant needs it"
    if loss.normaliser != "constant" and loss.constant is not None:
        yield f"loss.constant: got {loss.constant}, which loss.normaliser {loss.normaliser} does not use"
    for name, coefficient in (
        ("the entropy bonus", loss.entropy_coefficient),
        ("the pull to a reference", loss.kl.coefficient),
    ):
        if loss.skip_zero_advantage and coefficient:
            yield f"loss.skip_zero_advantage: got true, expected false: {name} has a gradient at every token"


def _reference(loss: LossConfig) -> Iterator[str]:
    """The reference has a use, and its estimator pulls."""
    kl = loss.kl
    if not kl.coefficient:
        for name in ("estimator", "importance", "reference"):
            if (got := getattr(kl, name)) != type(kl).model_fields[name].default:
                yield f"loss.kl.{name}: got {got}, which loss.kl.coefficient 0 does not use"
        return
    if kl.estimator == "k1" and not kl.importance:
        yield "loss.kl.importance: got false, expected true: k1 alone does not pull"


def _reference_model(loss: LossConfig, model: ModelConfig, arch: Architecture) -> Iterator[str]:
    """The reference is of the same kind as the model."""
    kl = loss.kl
    if not kl.coefficient or kl.reference is None:
        return
    try:
        other = load_architecture(kl.reference)
    except (OSError, ValueError) as error:
        yield f"loss.kl.reference: {error}"
        return
    if other != arch:
        yield f"loss.kl.reference: got another architecture in {kl.reference}, expected that of {model.path}"


def _optimizer(
    training: TrainingConfig,
    parallel: ParallelConfig,
    checkpoint: CheckpointConfig,
    model: ModelConfig,
    arch: Architecture,
) -> Iterator[str]:
    if training.optimizer == "sgd":
        if parallel.distributed_optimizer:
            yield "parallel.distributed_optimizer: got true, expected false: sgd has no state to shard"
        if checkpoint.every:
            yield f"checkpoint.every: got {checkpoint.every}, expected 0: training.optimizer sgd is for comparisons"
    yield from _offload(training, parallel, checkpoint, model)
    if training.no_weight_decay and not training.weight_decay:
        yield "training.no_weight_decay: got names, expected none: training.weight_decay is 0"
    names = hub_shapes(arch) if training.no_weight_decay else {}
    for pattern in training.no_weight_decay:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"training.no_weight_decay: got {pattern!r}, expected to match tensors, such as {next(iter(names))}"
    if training.expert_bias_rate and not arch.sigmoid_router:
        yield f"training.expert_bias_rate: got {training.expert_bias_rate}, expected 0: the routers have no bias"


def _offload(
    training: TrainingConfig, parallel: ParallelConfig, checkpoint: CheckpointConfig, model: ModelConfig
) -> Iterator[str]:
    """What Megatron's hybrid optimizer can do, and what of it this package can save."""
    if not training.offload_optimizer:
        return
    what = "training.offload_optimizer: got true, expected"
    if not parallel.distributed_optimizer or training.optimizer != "adam" or model.dtype != "bfloat16":
        yield f"{what} false, or Adam on bfloat16 weights with parallel.distributed_optimizer"
    if checkpoint.every:
        yield f"{what} false, or checkpoint.every 0: its state cannot be loaded again yet"


def _offload_device(training: TrainingConfig) -> Iterator[str]:
    """There is something to offload from, and Transformer Engine, without which Megatron's optimizer fails."""
    if not training.offload_optimizer:
        return
    import torch

    if not torch.cuda.device_count():
        yield "training.offload_optimizer: got true, expected false: there is no GPU, all is on the CPU already"
    elif find_spec("transformer_engine") is None:
        yield "training.offload_optimizer: got true, expected false: Megatron's needs Transformer Engine, there is none"


def _routing(routing: RoutingConfig, training: TrainingConfig, arch: Architecture) -> Iterator[str]:
    if routing.measure_every and routing.mode != "rollout":
        yield f"routing.measure_every: got {routing.measure_every}, which routing.mode {routing.mode} does not use"
    if routing.mode == "off":
        return
    if not arch.is_moe:
        yield f"routing.mode: got {routing.mode}, expected off: the model has no experts"
    if not training.packed:
        yield f"training.packed: got false, expected true: routing.mode {routing.mode} replays routes of packed samples"


def _head(head: HeadConfig, parallel: ParallelConfig, arch: Architecture) -> Iterator[str]:
    """A chunk holds at least one token's logits."""
    rows = padded_vocab_size(arch.vocab_size, parallel.tensor) // parallel.tensor
    if head.memory_bytes < 4 * rows:
        yield (
            f"head.memory_mib: got {head.memory_mib:g}, expected at least {math.ceil(4e3 * rows / (1 << 20)) / 1e3:g}: "
            f"one token's float32 logits over {rows} rows of the vocabulary"
        )


def _objective(objective: ObjectiveConfig) -> Iterator[str]:
    """The objective exists and uses everything that was set beside its name."""
    from megatron_dppo.algorithm.objectives import make_objective

    def fault(**overrides: Any) -> str | None:
        try:
            make_objective(objective.name, preset=objective.preset, **overrides)
        except ValueError as error:
            return f"objective: {str(error).removeprefix('objective: ')}"
        return None

    faults = [fault()]
    if faults == [None]:  # a known name: each override alone, so that every fault is named, then all of them
        faults = [fault(**{name: value}) for name, value in objective.overrides.items()]
        faults = faults if any(faults) else [fault(**objective.overrides)]
    yield from filter(None, faults)


def _top_k(objective: ObjectiveConfig, rollout: RolloutConfig, arch: Architecture) -> Iterator[str]:
    """The K recorded tokens leave room for the sampled one beside them."""
    from megatron_dppo.algorithm.objectives import make_objective

    try:
        top_k = make_objective(objective.name, preset=objective.preset, **objective.overrides).top_k
    except ValueError:  # _objective says it
        top_k = 0
    for key, value in (("rollout.log_topk", rollout.log_topk), ("objective.top_k", top_k)):
        if value and value >= arch.vocab_size:
            yield f"{key}: got {value}, expected less than the model's vocabulary of {arch.vocab_size}"
    if top_k and rollout.log_topk:
        yield f"rollout.log_topk: got {rollout.log_topk}, expected 0: {objective.name} records its own {top_k}"


# Of the settings among themselves and against the model's numbers: what can be said of a job before its files and its
# machines are at hand.
SETTING_RULES: tuple[Rule, ...] = (
    _ranks,
    *CLUSTER_RULES,
    _layout,
    _lora,
    _templates,
    _evaluation,
    *ROLLOUT_RULES,
    _advantage_groups,
    _lengths,
    _micro_batch,
    _minibatches,
    _replicas,
    _packed,
    _schedule,
    _loss,
    _reference,
    _optimizer,
    _routing,
    _head,
    _objective,
    _top_k,
)
MACHINE_RULES: tuple[Rule, ...] = (*ENGINE_MACHINE_RULES, _layers, _offload_device)  # of the machine that this runs on
RULES: tuple[Rule, ...] = (*FILE_RULES, *MACHINE_RULES, *SETTING_RULES, _reference_model)


def machine_rules(cluster: ClusterConfig) -> tuple[Rule, ...]:
    """Those of the machine that this runs on, where it speaks for the job's: a login node has none of its GPUs."""
    return MACHINE_RULES if cluster.device in ("auto", "cpu") else ()


def submission_rules(cluster: ClusterConfig) -> tuple[Rule, ...]:
    """What can be said of a job before it runs on its machines."""
    return (*FILE_RULES, *machine_rules(cluster), *SETTING_RULES, _reference_model)

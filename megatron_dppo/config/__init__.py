"""The config tree: what a run is told, typed and bounded. `config/loading.py` reads it from a recipe."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megatron_dppo.rollout.engine import Transport
from megatron_dppo.weights.layout import Parallel

if TYPE_CHECKING:
    from megatron_dppo.algorithm.objectives import Objective
    from megatron_dppo.algorithm.reference_kl import ReferenceKl

DType = Literal["float32", "bfloat16"]
MAX_TOP_K = 128  # entries an engine is asked for beside the sampled one; a reply grows with it


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are read-only, numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )


class RunConfig(Section):
    """Name, place and seed of a run."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    dir: Path = Field(default_factory=lambda data: Path("runs") / data["name"])  # everything a run writes
    seed: int = Field(0, ge=0)


class ModelConfig(Section):
    """The model to train."""

    path: Path  # Hugging Face directory: config.json, safetensors, tokenizer
    dtype: DType = "bfloat16"  # of the trained parameters; the optimizer's are float32
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"  # auto: Transformer Engine's where it is installed


class ParallelConfig(Section):
    """How the trainer's ranks split the model."""

    tensor: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    expert_tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual: int = Field(1, ge=1)  # chunks of layers on each pipeline rank
    # of chunk v of rank p at place v x pipeline + p, 0 allowed; null: all alike
    chunk_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    context: int = Field(1, ge=1)  # ranks that share each sequence; needs training.packed
    ranks: int = Field(1, ge=1)
    sequence_parallel: Literal["auto", True, False] = "auto"  # auto: where tensor > 1
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False  # sum gradients over replicas while backward still runs

    @property
    def layout(self) -> Parallel:
        """The same degrees for `weights.layout`; raises ValueError where they do not fit the ranks."""
        return Parallel(
            tensor=self.tensor,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            pipeline=self.pipeline,
            ranks=self.ranks,
            virtual=self.virtual,
            chunk_layers=self.chunk_layers,
            context=self.context,
        )

    @property
    def data(self) -> int:
        """Data-parallel replicas of the dense layers: what tensor, context and pipeline leave of the ranks."""
        return self.ranks // (self.tensor * self.context * self.pipeline)

    @property
    def micro_batch_multiple(self) -> int:
        """Of a gradient step on each replica: Megatron's schedule of virtual stages takes them by pipeline ranks."""
        return self.pipeline if self.virtual > 1 else 1

    @property
    def uses_sequence_parallel(self) -> bool:
        """`sequence_parallel` with "auto" decided."""
        return self.tensor > 1 if self.sequence_parallel == "auto" else self.sequence_parallel


class ClusterConfig(Section):
    """The machines of a job: what launchers of several nodes allocate, and what the planner reckons with."""

    nodes: int = Field(1, ge=1)  # for the trainer's ranks, evenly
    engine_nodes: int = Field(0, ge=0)  # for the engines alone; 0: they run on the trainer's nodes
    devices_per_node: int = Field(8, ge=1)
    device: Literal["auto", "cpu", "h100", "h200", "b200"] = "auto"  # auto: what this machine has

    @property
    def machines(self) -> int:
        """All of them."""
        return self.nodes + self.engine_nodes


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights; not there yet, and refused by a rule."""

    rank: int = Field(0, ge=0)  # 0: all weights are trained
    alpha: float | None = Field(None, gt=0)


class EvalSetConfig(Section):
    """A file of held-out prompts; null: as in training."""

    path: Path
    prompt_key: str | None = Field(None, min_length=1)
    answer_key: str | None = Field(None, min_length=1)
    prompt_template: str | None = None


def _named_eval_sets(value: object) -> object:
    """One path is a set without a name; a path by a name is a set with no keys of its own."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        return {"": {"path": value}}
    return {name: each if isinstance(each, dict) else {"path": each} for name, each in value.items()}


SetName = Annotated[str, Field(pattern=r"^[\w.-]*$")]
EvalSets = Annotated[dict[SetName, EvalSetConfig], BeforeValidator(_named_eval_sets)]


class DataConfig(Section):
    """JSONL files of prompts with checkable answers."""

    train: Path
    eval: EvalSets = {}  # by name, as in eval/NAME/avg@32; or one path, which has none
    prompt_key: str = Field("prompt", min_length=1)  # dots go into objects: reward_model.ground_truth
    answer_key: str = Field("answer", min_length=1)
    prompt_template: str = "{prompt}"  # text around a prompt that is text, or around the last message of a list
    max_prompt_tokens: int = Field(gt=0)  # longer prompts are refused, with a count
    chat_template: bool = False


class FinalAnswerReward(Section):
    """1 where the text after the last marker equals the answer."""

    name: Literal["final_answer"]
    marker: str = Field(">", min_length=1)


class MathReward(Section):
    """1 where math-verify finds the response's answer equal to the expected one."""

    name: Literal["math"]
    timeout_s: float = Field(5.0, gt=0)  # CPU seconds for one response, which is wrong beyond
    workers: int = Field(2, ge=1)  # processes that check answers


RewardConfig = Annotated[FinalAnswerReward | MathReward, Field(discriminator="name")]


class RolloutConfig(Section):
    """Engines and sampling."""

    engine: Literal["vllm", "sglang"] = "vllm"
    urls: list[str] = []  # running servers; empty: this job starts `engines` of them and ends them
    engines: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)  # tensor parallelism of each engine that this job starts
    expert_parallel: bool = False  # whole experts on each of an engine's workers, not a slice of every one
    dtype: DType = "bfloat16"
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    max_response_tokens: int = Field(gt=0)
    prompts_per_step: int = Field(gt=0)
    samples_per_prompt: int = Field(gt=0)
    max_concurrency: int = Field(64, gt=0)  # requests in flight
    request_timeout_s: float = Field(600.0, gt=0)
    max_retries: int = Field(3, ge=0)  # of one request
    start_timeout_s: float = Field(300.0, gt=0)
    kv_cache_gib: int = Field(1, ge=1)  # of an engine on the CPU
    max_staleness: int = Field(0, ge=0)  # versions by which a token may be older than the weights it trains
    too_old: Literal["drop", "refuse"] = "drop"  # what is older than that: sampled anew, or the end of the run
    log_topk: int = Field(0, ge=0, le=MAX_TOP_K)  # most probable tokens recorded for metrics alone


class SyncConfig(Section):
    """How new weights get to the engines.

    `shm`: a file in shared memory, for engines on the trainer's machine. `group`: ranks send to workers, over NCCL or
    gloo. `ipc`: the same through memory that both map (CUDA IPC), also on one GPU. `disk`: a file in `dir`. `auto`:
    group where an engine has GPUs of its own or another machine, else shm.
    """

    transport: Literal["auto"] | Transport = "auto"
    dir: Path | None = None  # that all machines see; None: in run.dir
    bucket_mib: float = Field(512, gt=0)  # of a group: what a worker receives at a time; twice that is staged
    timeout_s: float = Field(120.0, gt=0)  # of a group: how long one side waits for the other
    attempts: int = Field(3, ge=1)  # of an update, at engines that answer

    @property
    def bucket_bytes(self) -> int:
        """The bucket in bytes."""
        return int(self.bucket_mib * (1 << 20))

    def directory_of(self, run: RunConfig) -> Path:
        """Where `disk` puts its files: of this run only."""
        return (self.dir / run.name if self.dir else run.dir / "weights").absolute()


class ObjectiveConfig(Section):
    """A policy objective with the paper's numbers of a preset; what is not None departs from them."""

    name: str = "dppo_binary_tv"
    preset: Literal["sanity", "scaling", "lora"] = "sanity"
    anchor: Literal["rollout", "recomputed"] | None = None
    cap: float | None = Field(None, ge=1, allow_inf_nan=True)  # .inf: uncapped
    delta: float | None = Field(None, gt=0, allow_inf_nan=True)  # both sides at once; .inf leaves a side free
    delta_low: float | None = Field(None, gt=0, allow_inf_nan=True)
    delta_high: float | None = Field(None, gt=0, allow_inf_nan=True)
    eps_low: float | None = Field(None, gt=0, allow_inf_nan=True)
    eps_high: float | None = Field(None, gt=0, allow_inf_nan=True)
    alpha: float | None = Field(None, ge=0, le=1)
    relax: Literal["both", "high", "low"] | None = None
    top_k: int | None = Field(None, gt=0, le=MAX_TOP_K)

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that were set beside `name` and `preset`."""
        return {k: v for k, v in self.model_dump(exclude={"name", "preset"}).items() if v is not None}


class AdvantageConfig(Section):
    """The advantage of a sample within its group."""

    normalise: Literal["none", "std", "leave_one_out"] = "none"


class KlConfig(Section):
    """A pull to a frozen reference policy (`algorithm/reference_kl.py`)."""

    coefficient: float = Field(0.0, ge=0)  # 0: none, and no reference is loaded
    estimator: Literal["k1", "k2", "k3"] = "k3"
    importance: bool = True  # the gradient of the divergence under pi, not of the term on mu's samples
    reference: Path | None = None  # Hugging Face directory of the same model; null: model.path, before training


class LossConfig(Section):
    """What the summed loss is divided by, the entropy bonus, and the pull to a reference."""

    normaliser: Literal["tokens", "sequences", "constant"] = "tokens"
    constant: int | None = Field(None, gt=0)  # of `normaliser: constant`: tokens by which each sequence is divided
    entropy_coefficient: float = 0.0
    kl: KlConfig = KlConfig()
    skip_zero_advantage: bool = False  # leave tokens without gradient out of the head, and of the metrics' means


def _unless_yaml_read_false(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class RoutingConfig(Section):
    """Which experts tokens take in training: those the engine took (R3), those the old policy did, or their own."""

    mode: Annotated[Literal["off", "rollout", "recompute"], BeforeValidator(_unless_yaml_read_false)] = "off"
    measure_every: int = Field(0, ge=0)  # steps; also the mismatch without replay, by one more forward pass; 0: never


class HeadConfig(Section):
    """How the policy head keeps logits: all of a micro-batch's once (store), or a chunk of tokens at a time."""

    path: Literal["auto", "store", "chunk"] = "auto"  # auto: store where a micro-batch's logits fit into memory_mib
    memory_mib: float = Field(1024, gt=0)  # of float32 logits alive on one rank

    @property
    def memory_bytes(self) -> int:
        """The budget in bytes."""
        return int(self.memory_mib * (1 << 20))


class TrainingConfig(Section):
    """Gradient steps, optimizer and schedule."""

    steps: int = Field(gt=0)  # batches of rollouts
    minibatches: int = Field(4, gt=0)  # gradient steps on each batch
    packed: bool = True  # samples one behind the other, without padding
    micro_batch_tokens: int = Field(gt=0)  # budget of one micro-batch; of a padded one: rows x longest row
    lr: float = Field(gt=0)
    min_lr_ratio: float = Field(1.0, ge=0, le=1)  # last learning rate over `lr`
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, gt=0)  # None: `steps`
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd: to compare runs with, no checkpoints
    weight_decay: float = Field(0.0, ge=0)  # of matrices; norms and biases have none
    no_weight_decay: tuple[str, ...] = ()  # nor have hub tensors with such names, as in "*.mlp.gate.weight"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, gt=0)
    offload_optimizer: bool = False  # Adam and its state on the CPU, of a GPU's weights
    recompute: Literal["none", "selective", "full"] = "none"  # in backward: attention's core, or whole layers
    expert_bias_rate: float = Field(0.0, ge=0)  # by which a biased router's experts move towards an even load a step
    rollout_timeout_s: float = Field(3600.0, gt=0)  # how long trainer and client wait for each other in one step


class EvaluationConfig(Section):
    """Accuracy on `data.eval`, before and after training and every so many steps."""

    every: int = Field(0, ge=0)  # 0: only before and after
    prompts: int = Field(512, gt=0)  # the first so many of each file
    target_accuracy: float | None = Field(None, gt=0, le=1)  # stop when every accuracy that is measured reaches it
    greedy: bool = True  # one response a prompt at temperature 0
    sampled: bool = True
    samples: int = Field(1, gt=0)  # k of Avg@k: responses a prompt of the sampled evaluation
    temperature: float = Field(1.0, gt=0)  # of the sampled evaluation, as is top_p; training may not truncate
    top_p: float = Field(1.0, gt=0, le=1)
    max_response_tokens: int | None = Field(None, gt=0)  # null: rollout.max_response_tokens


class CheckpointConfig(Section):
    """The training state, in run.dir/checkpoints."""

    every: int = Field(0, ge=0)  # steps; 0: never
    keep: int = Field(2, ge=1)  # the newest so many


class LoggingConfig(Section):
    """What a run writes beside metrics.jsonl and summary.json."""

    tensorboard: bool = True
    plot: bool = True


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig
    sync: SyncConfig = SyncConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    routing: RoutingConfig = RoutingConfig()
    head: HeadConfig = HeadConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: Literal["never", "auto"] | Path = "never"  # auto: from the newest checkpoint of run.dir, if there is one
    logging: LoggingConfig = LoggingConfig()


def objective_of(config: Config) -> Objective:
    """The objective that the config names, with its overrides."""
    return _objective(config.objective)


@lru_cache(maxsize=64)
def _objective(section: ObjectiveConfig) -> Objective:
    """Kept, for a planner asks thousands of times."""
    from megatron_dppo.algorithm.objectives import make_objective  # torch is not needed to read a config

    return make_objective(section.name, preset=section.preset, **section.overrides)


def reference_kl_of(config: Config) -> ReferenceKl:
    """The pull to a reference that the config asks for."""
    from megatron_dppo.algorithm.reference_kl import ReferenceKl

    kl = config.loss.kl
    return ReferenceKl(kl.coefficient, kl.estimator, kl.importance)


def num_recorded_topk(config: Config) -> int:
    """How many of the engine's most probable tokens are recorded: the objective's K, or some for the metrics alone."""
    return objective_of(config).top_k or config.rollout.log_topk


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt and response that engines are asked for, in training or evaluation."""
    longest = max(config.rollout.max_response_tokens, config.evaluation.max_response_tokens or 0)
    return config.data.max_prompt_tokens + longest

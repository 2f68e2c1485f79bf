"""From hidden states and a shard of the LM head to token statistics and the policy gradient.

The logits never leave this package. `token_stats` yields log-probs, entropy and the log-probs of the engine's Top-K;
`policy_loss` also yields the loss and its gradient. Three paths, one meaning, none of which repeats a matrix product:

- stats: no gradient; chunks of tokens pass through one buffer of logits.
- store: the logits of all tokens are kept once, and backward writes their gradient over them.
- chunk: chunks pass through one buffer; the coefficient of a token (paper Eq. 23) is known as soon as its statistics
  are, so each chunk's gradient is made in forward and backward only hands it over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.head import matmul, weight_gradient
from megatron_dppo.head.backends import shard_operations
from megatron_dppo.head.reference import RowScalars
from megatron_dppo.head.statistics import VocabShard, merge, pick

# (statistics of a range of tokens, that range) -> (coefficient of log-prob, coefficient of entropy or None)
CoefficientFn = Callable[[TokenStats, slice], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class HeadMemory:
    """How much memory logits may take: `auto` stores them where all fit into `budget_bytes`, else works in chunks."""

    path: Literal["auto", "store", "chunk"] = "auto"
    budget_bytes: int = 1 << 30

    def stores(self, tokens: int, rows: int) -> bool:
        """Whether the logits of all `tokens` over `rows` of a shard are kept."""
        return self.path == "store" or (self.path == "auto" and tokens <= self.chunk_tokens(rows))

    def chunk_tokens(self, rows: int) -> int:
        """Tokens whose f32 logits over `rows` fit into the budget; raises ValueError where not one does."""
        tokens = self.budget_bytes // (4 * rows)
        if tokens < 1:
            raise ValueError(
                f"head memory: got {self.budget_bytes} bytes, expected at least {4 * rows} (one token's logits)"
            )
        return tokens


def token_stats(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    topk_ids_TK: Tensor | None = None,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    memory: HeadMemory = HeadMemory(),
) -> TokenStats:
    """Log-prob, entropy and the K+1 log-probs of each token, without gradient.

    hidden_TH: [T, H], the rows of the counted tokens, the same on every rank of the group. weight_VH: [V/TP, H].
    targets_T: i64[T], the token that came next. topk_ids_TK: i64[T, K], -1 where absent. Results are fp32 and
    bit-identical on all ranks of the group. Columns 0..K-1 of `topk_logprob` are the ids', column K the target's.
    Uses `memory.budget_bytes` at most for logits.

    Collectives over `shard.group`, for each chunk of tokens: one all-gather of 4 fp32 a token and, with Top-K ids,
    one sum all-reduce of K fp32 a token.
    Raises ValueError for shapes that do not fit, ids outside the vocabulary and temperatures <= 0; for ids on a GPU
    that is an assertion on the device, since looking at them would wait for it (on the host: `MicroBatch.check_ids`).
    """
    call = _Call(targets_T, topk_ids_TK, shard, temperature)
    _check(hidden_TH, weight_VH, call)
    with torch.no_grad():
        hidden, weight = matmul.operands(hidden_TH, weight_VH[: call.columns(weight_VH)])
        buffer = _Buffer(weight, min(memory.chunk_tokens(weight_VH.shape[0]), len(targets_T)))
        parts = [
            _measure(matmul.logits(hidden[tokens], weight, buffer.rows(tokens)), call, tokens, keep_logits=False).stats
            for tokens in buffer.chunks(len(targets_T))
        ]
    return _joined(parts)


def policy_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    topk_ids_TK: Tensor | None,
    coefficient_fn: CoefficientFn,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    memory: HeadMemory = HeadMemory(),
) -> tuple[Tensor, TokenStats]:
    """The scalar sum_t c_logprob_t log pi(y_t) + c_entropy_t H_t (fp32, unnormalised) and detached statistics.

    Arguments as in `token_stats`. `coefficient_fn` is called once for each chunk of tokens, in order, with the
    statistics of that chunk and its range; coefficients are constants of the gradient and the caller puts the sign
    in. It may return coefficients of the entropy only with `entropy_gradient`.

    The gradient with respect to `hidden_TH` is this rank's part: its sum over the group is the caller's (see
    `rows.counted_rows`). The weight's goes into `weight_VH.main_grad` where that exists in fp32, in forward on the
    chunk path, in backward on the store path; without autograd (`torch.no_grad`) nothing is accumulated anywhere.

    Collectives: as `token_stats`, in forward; none in backward.
    Keeps for backward: fp32 [T, V/TP] logits (store), or the gradient [T, H] of the hidden states (chunk), and the
    fp32 gradient of the weight where it has no `main_grad`.
    Raises as `token_stats`. Backward raises RuntimeError for a retained graph (`retain_graph`, `create_graph`), whose
    logits have been overwritten, and on the chunk path for an upstream gradient other than 1, which its forward
    took for granted (on a GPU an assertion on the device).
    """
    call = _Call(targets_T, topk_ids_TK, shard, temperature)
    _check(hidden_TH, weight_VH, call)
    is_store = memory.stores(len(targets_T), weight_VH.shape[0])
    with_gradient = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)
    plan = _Plan(
        coefficient_fn,
        entropy_gradient,
        # On the store path, and without gradient too where all tokens fit, the chunk is everything.
        chunk=len(targets_T) if is_store else memory.chunk_tokens(weight_VH.shape[0]),
        with_gradient=with_gradient,
    )
    function = _StoreLoss if is_store and with_gradient else _ChunkLoss
    loss, *parts = function.apply(hidden_TH, weight_VH, call, plan)
    return loss, TokenStats(*parts)


@dataclass(frozen=True)
class _Call:
    """What to measure: the arguments of both entries that are not differentiated."""

    targets_T: Tensor
    topk_ids_TK: Tensor | None
    shard: VocabShard
    temperature: float

    def columns(self, weight_VH: Tensor) -> int:
        return self.shard.columns(weight_VH.shape[0])


@dataclass(frozen=True)
class _Plan:
    """How the loss is made."""

    coefficient_fn: CoefficientFn
    entropy_gradient: bool
    chunk: int
    with_gradient: bool

    def coefficients(self, stats: TokenStats, tokens: slice) -> tuple[Tensor, Tensor | None]:
        c_logprob, c_entropy = self.coefficient_fn(stats, tokens)
        if c_entropy is not None and not self.entropy_gradient:
            raise ValueError("coefficient_fn: got coefficients of the entropy, expected none without entropy_gradient")
        if self.entropy_gradient and c_entropy is None:
            c_entropy = torch.zeros_like(c_logprob)
        return c_logprob, c_entropy


class _Buffer:
    """The f32 logits of one chunk of tokens, used for every chunk in turn."""

    def __init__(self, weight_VH: Tensor, tokens: int) -> None:
        self._logits = weight_VH.new_empty((tokens, weight_VH.shape[0]), dtype=torch.float32)

    def rows(self, tokens: slice) -> Tensor:
        return self._logits[: tokens.stop - tokens.start]

    def chunks(self, tokens: int) -> list[slice]:
        """Ranges of the tokens; one, empty, where there are none: the ranks' collectives stay in step."""
        size = max(len(self._logits), 1)
        return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]


@dataclass(frozen=True)
class _Measured:
    """A chunk's statistics, and its logits as `row_statistics_` left them."""

    stats: TokenStats
    logits_TV: Tensor
    scalars: RowScalars
    target_column_T: Tensor
    temperature: float

    def gradient_(
        self, c_logprob: Tensor, c_entropy: Tensor | None, scale: Tensor | float, dtype: torch.dtype
    ) -> Tensor:
        """Of the loss times `scale`, over the logits."""
        return shard_operations(self.logits_TV.device.type).row_gradient_(
            self.logits_TV,
            self.scalars,
            self.target_column_T,
            c_logprob * scale,
            None if c_entropy is None else c_entropy * scale,
            self.temperature,
            dtype=dtype,
        )


def _measure(logits_TV: Tensor, call: _Call, tokens: slice, *, keep_logits: bool) -> _Measured:
    """Statistics of a chunk; without `keep_logits`, entropies can get no gradient."""
    targets_T = call.targets_T[tokens]
    topk_ids_TK = None if call.topk_ids_TK is None else call.topk_ids_TK[tokens]
    columns = logits_TV.shape[1]
    target_column_T = call.shard.local(targets_T, columns)
    target_logit_T = pick(logits_TV, target_column_T[:, None])[:, 0]
    topk_logit_TK = None if topk_ids_TK is None else pick(logits_TV, call.shard.local(topk_ids_TK, columns))
    row_statistics_ = shard_operations(logits_TV.device.type).row_statistics_
    parts = row_statistics_(logits_TV, call.temperature, keep_logits=keep_logits)
    stats, scalars = merge(parts, target_logit_T, topk_logit_TK, targets_T, topk_ids_TK, call.shard, call.temperature)
    return _Measured(stats, logits_TV, scalars, target_column_T, call.temperature)


def _loss(stats: TokenStats, c_logprob: Tensor, c_entropy: Tensor | None) -> Tensor:
    # A blocked token may have become impossible: 0 times its log-prob of -inf is 0.
    loss = torch.where(c_logprob == 0, 0.0, c_logprob * stats.logprob).sum()
    return loss if c_entropy is None else loss + (c_entropy * stats.entropy).sum()


class _StoreLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, call: _Call, plan: _Plan) -> tuple[Tensor | None, ...]:
        hidden, weight = matmul.operands(hidden_TH, weight_VH[: call.columns(weight_VH)])
        tokens = slice(0, len(hidden))
        logits = matmul.logits(hidden, weight, _Buffer(weight, len(hidden)).rows(tokens))
        measured = _measure(logits, call, tokens, keep_logits=plan.entropy_gradient)
        coefficients = plan.coefficients(measured.stats, tokens)
        ctx.save_for_backward(hidden_TH, weight_VH)
        ctx.measured, ctx.coefficients, ctx.weight, ctx.call = measured, coefficients, weight_VH, call
        return _loss(measured.stats, *coefficients), *_outputs(ctx, measured.stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_retained_graph()
        hidden_TH, weight_VH = ctx.saved_tensors
        hidden, weight = matmul.operands(hidden_TH, weight_VH[: ctx.call.columns(weight_VH)])
        gradient = ctx.measured.gradient_(*ctx.coefficients, d_loss, weight.dtype)
        ctx.measured = None
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = matmul.hidden_gradient(gradient, weight, torch.empty_like(hidden_TH))
        if ctx.needs_input_grad[1]:
            total = weight_gradient.accumulator(ctx.weight)
            matmul.add_weight_gradient(total[: len(weight)], gradient, hidden)
            d_weight = weight_gradient.hand_over(ctx.weight, total)
        return d_hidden, d_weight, None, None


class _ChunkLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, call: _Call, plan: _Plan) -> tuple[Tensor | None, ...]:
        hidden, weight = matmul.operands(hidden_TH, weight_VH[: call.columns(weight_VH)])
        wants_hidden, wants_weight = (plan.with_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden_TH) if wants_hidden else None
        d_weight = weight_gradient.accumulator(weight_VH) if wants_weight else None
        buffer = _Buffer(weight, min(plan.chunk, len(hidden)))
        loss = hidden.new_zeros((), dtype=torch.float32)
        parts = []
        for tokens in buffer.chunks(len(hidden)):
            logits = matmul.logits(hidden[tokens], weight, buffer.rows(tokens))
            measured = _measure(logits, call, tokens, keep_logits=plan.entropy_gradient)
            coefficients = plan.coefficients(measured.stats, tokens)
            loss += _loss(measured.stats, *coefficients)
            parts.append(measured.stats)
            if d_hidden is None and d_weight is None:
                continue
            gradient = measured.gradient_(*coefficients, 1.0, weight.dtype)
            if d_hidden is not None:
                matmul.hidden_gradient(gradient, weight, d_hidden[tokens])
            if d_weight is not None:
                matmul.add_weight_gradient(d_weight[: len(weight)], gradient, hidden[tokens])
        ctx.save_for_backward(loss)  # nothing needs it; without it a second backward would find no one to refuse it
        ctx.d_hidden, ctx.d_weight, ctx.weight = d_hidden, d_weight, weight_VH
        return loss, *_outputs(ctx, _joined(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_retained_graph()
        _ = ctx.saved_tensors
        _expect_one(d_loss)
        d_weight = None if ctx.d_weight is None else weight_gradient.hand_over(ctx.weight, ctx.d_weight)
        d_hidden, ctx.d_hidden, ctx.d_weight = ctx.d_hidden, None, None
        return d_hidden, d_weight, None, None


def _outputs(ctx: Any, stats: TokenStats) -> list[Tensor | None]:
    parts = [getattr(stats, field.name) for field in fields(TokenStats)]
    ctx.mark_non_differentiable(*(part for part in parts if part is not None))
    return parts


def _joined(parts: list[TokenStats]) -> TokenStats:
    if len(parts) == 1:
        return parts[0]

    def column(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    return TokenStats(**{field.name: column(field.name) for field in fields(TokenStats)})


def _refuse_retained_graph() -> None:
    # The one place where torch tells; its own compiler asks there before it reuses a graph's memory.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        raise RuntimeError(
            "policy_loss: got backward with retain_graph or create_graph, expected neither: the gradient is written "
            "over the logits, so it can be taken once"
        )


def _expect_one(d_loss: Tensor) -> None:
    """On a GPU the comparison stays on the device: looking at it here would wait for the whole forward."""
    if d_loss.is_cuda:
        torch._assert_async(d_loss == 1, "policy_loss: the upstream gradient is not 1")
    elif d_loss.item() != 1:
        raise RuntimeError(
            f"policy_loss: got an upstream gradient of {d_loss.item()}, expected 1: on the chunk "
            "path the gradient is made in forward; divide the loss where gradients are finalised, or use the store path"
        )


def _check(hidden_TH: Tensor, weight_VH: Tensor, call: _Call) -> None:
    tokens = hidden_TH.shape[0]
    targets_T, topk_ids_TK, vocab_size = call.targets_T, call.topk_ids_TK, call.shard.vocab_size
    if not call.temperature > 0:
        raise ValueError(f"temperature: got {call.temperature}, expected a number above 0")
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden, weight: got {tuple(hidden_TH.shape)}, {tuple(weight_VH.shape)}, expected [T,H], [V,H]"
        )
    if targets_T.shape != (tokens,):
        raise ValueError(f"targets: got shape {tuple(targets_T.shape)}, expected ({tokens},)")
    if topk_ids_TK is not None and (topk_ids_TK.dim() != 2 or topk_ids_TK.shape[0] != tokens):
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids_TK.shape)}, expected ({tokens}, K)")
    _check_ids("targets", targets_T, 0, vocab_size)
    if topk_ids_TK is not None:
        _check_ids("topk_ids", topk_ids_TK, -1, vocab_size)


def _check_ids(name: str, ids: Tensor, least: int, vocab_size: int) -> None:
    if not ids.numel():
        return
    message = f"{name}: got an id outside of {least}..{vocab_size - 1}"
    if ids.is_cuda:  # compared there: a look at them here would wait for the device
        torch._assert_async(((ids >= least) & (ids < vocab_size)).all(), message)
    elif ids.min() < least or ids.max() >= vocab_size:
        raise ValueError(message)

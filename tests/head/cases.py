"""Problems for the policy head and their answers from a float64 softmax over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_dppo.algorithm.objectives import TokenStats

PADDED, H = 112, 16  # the shard borders at TP 2 and 4: 28, 56, 84
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One call of the head: the whole weight with its padding, and coefficients of log-prob and entropy."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [PADDED, H]
    targets: Tensor
    topk_ids: Tensor | None
    vocab_size: int
    temperature: float
    c_logprob: Tensor
    c_entropy: Tensor | None

    def to(self, device: str) -> Case:
        """The same there."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Case(**{n: part.to(device) if isinstance(part, Tensor) else part for n, part in parts.items()})

    def coefficients(self, stats: TokenStats, tokens: slice) -> tuple[Tensor, Tensor | None]:
        """What the head asks for a range of tokens."""
        assert stats.logprob.shape == self.c_logprob[tokens].shape
        return self.c_logprob[tokens], None if self.c_entropy is None else self.c_entropy[tokens]


def make_case(
    *,
    tokens: int = 13,
    vocab_size: int = 101,
    k: int = 6,
    temperature: float = 1.0,
    entropy: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random, with rows of ids at shard borders, absent, repeated and equal to the target where there are enough."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=g).to(dtype)
    weight = torch.randn(PADDED, H, generator=g).to(dtype)
    weight[vocab_size:] = 50.0  # garbage that must not be seen
    targets = torch.randint(0, vocab_size, (tokens,), generator=g)
    topk_ids = None
    if k:
        topk_ids = torch.stack([torch.randperm(vocab_size, generator=g)[:k] for _ in range(tokens)] or [targets])
        topk_ids = topk_ids.reshape(tokens, k)
    if topk_ids is not None and tokens >= 5:
        borders = torch.tensor([0, 27, 28, 55, 56, vocab_size - 1]).clamp(max=vocab_size - 1)
        topk_ids[0, : min(k, 6)] = borders[:k]
        topk_ids[1, k // 2 :] = -1
        topk_ids[2, 0] = targets[2]
        topk_ids[3, :] = topk_ids[3, 0]
        topk_ids[4, :] = -1
        targets[0], targets[1] = min(28, vocab_size - 1), vocab_size - 1
    c = torch.randn(tokens, generator=g)
    return Case(hidden, weight, targets, topk_ids, vocab_size, temperature, c, 0.3 * c.flip(0) if entropy else None)


def scaled(case: Case, factor: float) -> Case:
    """The same with logits `factor` times as large."""
    return replace(case, hidden=case.hidden * factor)


@dataclass(frozen=True)
class Answer:
    """In float64; `d_weight` has the vocabulary's rows only, as in the Hugging Face tensor."""

    logprob: Tensor
    entropy: Tensor
    topk_logprob: Tensor | None
    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def answer(case: Case) -> Answer:
    """By log_softmax and autograd."""
    hidden = case.hidden.double().requires_grad_()
    weight = case.weight[: case.vocab_size].double().requires_grad_()
    log_p = torch.log_softmax(hidden @ weight.t() / case.temperature, -1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    logprob = log_p.gather(1, case.targets[:, None])[:, 0]
    loss = (case.c_logprob * logprob).sum()
    if case.c_entropy is not None:
        loss = loss + (case.c_entropy * entropy).sum()
    loss.backward()
    topk = None
    if case.topk_ids is not None:
        of_ids = log_p.gather(1, case.topk_ids.clamp(min=0)).masked_fill(case.topk_ids < 0, -torch.inf)
        topk = torch.cat([of_ids, logprob[:, None]], 1).detach()
    return Answer(logprob.detach(), entropy.detach(), topk, loss.detach(), hidden.grad, weight.grad)


def tolerance(case: Case) -> float:
    """Absolute, for log-probs: the rounding of a float32 product of H terms (bound H u |h| |w|) and of its use."""
    product = case.hidden.double().abs() @ case.weight[: case.vocab_size].double().abs().t()
    return 1e-6 + float(product.max() if product.numel() else 0.0) * H * 2**-24 / case.temperature


def assert_equal(
    case: Case,
    expected: Answer,
    stats: TokenStats,
    loss: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    ranks: int = 1,
) -> None:
    """Values within `tolerance`, gradients within it relative to the largest one (bf16 ones to a rounding a rank)."""
    near = tolerance(case)
    close(stats.logprob, expected.logprob, near)
    close(stats.entropy, expected.entropy, near * 10)
    if expected.topk_logprob is None:
        assert stats.topk_logprob is None and stats.member is None
    else:
        assert stats.topk_logprob is not None
        close(stats.topk_logprob, expected.topk_logprob, near)
    magnitude = float((case.c_logprob * expected.logprob).abs().sum()) + 1
    close(loss, expected.loss, near * magnitude * 2)
    rounding = ranks * 2**-8 if case.hidden.dtype == torch.bfloat16 else 0.0
    for got, want in ((d_hidden, expected.d_hidden), (d_weight[: case.vocab_size], expected.d_weight)):
        largest = float(want.abs().max()) if want.numel() else 0.0
        close(got, want, (20 * near + rounding) * largest + 1e-7)
    assert not d_weight[case.vocab_size :].any()  # padding gets no gradient


def close(got: Tensor, want: Tensor, atol: float) -> None:
    """Equal within `atol`, infinities exactly."""
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol, check_device=False)


CASES: dict[str, Callable[[], Case]] = {
    "plain": make_case,
    "cold": lambda: make_case(temperature=0.3),
    "hot": lambda: make_case(temperature=2.0),
    "no_topk": lambda: make_case(k=0),
    "no_entropy": lambda: make_case(entropy=False, temperature=0.7),
    "bf16": lambda: make_case(dtype=torch.bfloat16),
    "bf16_no_entropy": lambda: make_case(dtype=torch.bfloat16, entropy=False),
    "no_tokens": lambda: make_case(tokens=0),
    "one_token": lambda: make_case(tokens=1),
    "whole_shards_of_padding": lambda: make_case(vocab_size=50),
    "no_padding": lambda: make_case(vocab_size=PADDED),
    "huge_logits": lambda: scaled(make_case(), 1e3),  # up to 1e4
    "k_of_100": lambda: make_case(k=100),
}

"""The policy head on one rank against a float64 full-vocabulary reference: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dppo.head.policy_head import VocabShard, policy_loss, token_stats

T, H, V, PADDED, K = 13, 16, 101, 112, 4


def inputs(
    seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [PADDED, H] with garbage in the padding, targets, topk_ids with borders and absences."""
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(T, H, generator=g)).to(dtype)
    weight = torch.randn(PADDED, H, generator=g).to(dtype)
    weight[V:] = 50.0
    targets = torch.randint(0, V, (T,), generator=g)
    topk_ids = torch.stack([torch.randperm(V, generator=g)[:K] for _ in range(T)])
    topk_ids[0] = torch.tensor([0, V - 1, 55, 56])
    topk_ids[1, 2:] = -1
    topk_ids[2, 1] = targets[2]
    return hidden, weight, targets, topk_ids


def reference(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(hidden.double() @ weight[:V].double().t() / temperature, -1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(temperature: float, dtype: torch.dtype) -> None:
    hidden, weight, targets, topk_ids = inputs(dtype=dtype)
    stats = token_stats(hidden, weight, targets, topk_ids, shard=VocabShard(0, V), temperature=temperature)
    log_p = reference(hidden, weight, temperature)
    torch.testing.assert_close(stats.logprob.double(), log_p.gather(1, targets[:, None])[:, 0], rtol=0, atol=3e-5)
    torch.testing.assert_close(stats.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=3e-5)
    expected = log_p.gather(1, torch.cat([topk_ids.clamp(min=0), targets[:, None]], 1))
    expected[:, :K][topk_ids < 0] = -torch.inf
    torch.testing.assert_close(stats.topk_logprob.double(), expected, rtol=0, atol=3e-5)
    assert stats.member[1].tolist() == [True, True, False, False, True]  # two absent; the target stands outside
    assert stats.member[2].tolist() == [True, True, True, True, False]  # the target is the second id


@pytest.mark.parametrize("entropy_too", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradient(temperature: float, entropy_too: bool) -> None:
    hidden, weight, targets, topk_ids = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    c = torch.linspace(-1, 2, T)

    def coefficients(stats: object, _: slice) -> tuple[Tensor, Tensor | None]:
        return c, 0.3 * c if entropy_too else None

    loss, stats = policy_loss(
        hidden, weight, targets, topk_ids, coefficients, shard=VocabShard(0, V), temperature=temperature
    )
    (3 * loss).backward()
    assert not stats.logprob.requires_grad

    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = reference(h, w, temperature)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = (c * log_p.gather(1, targets[:, None])[:, 0]).sum() + (0.3 * c * entropy).sum() * entropy_too
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=3e-5)
    assert not weight.grad[V:].any()  # padding gets no gradient


def test_huge_logits_and_impossible_columns_stay_finite() -> None:
    hidden = torch.zeros(2, H)
    hidden[:, 0] = 1.0
    weight = torch.zeros(V, H)
    weight[:, 0] = torch.linspace(-1e4, 1e4, V)
    weight[3, 0] = -torch.inf
    stats = token_stats(hidden, weight, torch.tensor([V - 1, 5]), None, shard=VocabShard(0, V))
    assert stats.logprob[0] == 0.0 and stats.logprob[1] < -1e4
    assert stats.entropy.tolist() == [0.0, 0.0]


def test_a_column_that_cannot_be_sampled_has_no_part_in_the_entropy() -> None:
    hidden = torch.zeros(1, H)
    hidden[0, 0] = 1.0
    hidden.requires_grad_()
    weight = torch.zeros(8, H)
    weight[3, 0] = -torch.inf
    loss, stats = policy_loss(
        hidden, weight, torch.tensor([0]), None, lambda s, _: (torch.ones(1), torch.ones(1)), shard=VocabShard(0, 8)
    )
    torch.testing.assert_close(stats.entropy, torch.tensor([7.0]).log())
    assert torch.isfinite(loss)


def test_no_tokens() -> None:
    hidden, weight, targets, topk_ids = inputs()
    hidden = hidden[:0].requires_grad_()
    loss, stats = policy_loss(
        hidden, weight, targets[:0], topk_ids[:0], lambda s, _: (s.logprob, None), shard=VocabShard(0, V)
    )
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, H) and stats.topk_logprob.shape == (0, K + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"targets": torch.full((T,), V)}, "targets: got an id outside of 0..100"),
        ({"topk_ids": torch.full((T, K), V)}, "topk_ids: got an id outside of -1..100"),
        ({"topk_ids": torch.zeros(T + 1, K, dtype=torch.long)}, r"topk_ids: got shape \(14, 4\), expected \(13, K\)"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets: got shape \(3,\)"),
        ({"hidden": torch.zeros(T, H + 1)}, "hidden, weight"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    hidden, weight, targets, topk_ids = inputs()
    given = {"hidden": hidden, "targets": targets, "topk_ids": topk_ids, "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        token_stats(
            given["hidden"], weight, given["targets"], given["topk_ids"],
            shard=VocabShard(0, V), temperature=given["temperature"],
        )  # fmt: skip


def test_second_derivative_is_refused() -> None:
    hidden, weight, targets, _ = inputs()
    hidden.requires_grad_()
    loss, _ = policy_loss(hidden, weight, targets, None, lambda s, _: (s.logprob, None), shard=VocabShard(0, V))
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()

"""The policy head on one rank against a float64 full-vocabulary reference: values and gradients on every path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dppo.algorithm.divergence import binary_kl, binary_tv, topk_kl, topk_tv
from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.head.policy_head import HeadMemory, VocabShard, policy_loss, token_stats
from tests.head import cases
from tests.head.cases import DEVICE, PADDED, Case, H, answer, assert_equal, close, tolerance

CHUNK_OF_4 = HeadMemory("chunk", 4 * 4 * PADDED)
CASES = {name: lambda make=make: make().to(DEVICE) for name, make in cases.CASES.items()}
PATHS = {
    "store": HeadMemory("store"),
    "chunk": CHUNK_OF_4,
    "auto": HeadMemory(),
    "chunk_of_1": HeadMemory("chunk", 4 * PADDED),
}


def make_case(**settings: Any) -> Case:
    return cases.make_case(**settings).to(DEVICE)


def loss_of(case: Case, memory: HeadMemory, weight: Tensor | None = None) -> tuple[Tensor, TokenStats, Tensor, Tensor]:
    """Loss, statistics, and the two leaves that backward fills."""
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_() if weight is None else weight
    loss, stats = policy_loss(
        hidden, weight, case.targets, case.topk_ids, case.coefficients,
        shard=VocabShard(0, case.vocab_size), temperature=case.temperature,
        entropy_gradient=case.c_entropy is not None, memory=memory,
    )  # fmt: skip
    return loss, stats, hidden, weight


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, path: str) -> None:
    case = CASES[name]()
    loss, stats, hidden, weight = loss_of(case, PATHS[path])
    loss.backward()
    assert not any(part.requires_grad for part in (stats.logprob, stats.entropy))
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == case.hidden.dtype
    assert_equal(case, answer(case), stats, loss.detach(), hidden.grad, weight.grad)


@pytest.mark.parametrize("name", CASES)
def test_statistics_alone_are_the_same_bits(name: str) -> None:
    case = CASES[name]()
    _, stored, _, _ = loss_of(case, PATHS["store"])
    alone = token_stats(
        case.hidden, case.weight, case.targets, case.topk_ids,
        shard=VocabShard(0, case.vocab_size), temperature=case.temperature, memory=HeadMemory("store"),
    )  # fmt: skip
    assert torch.equal(alone.logprob, stored.logprob) and torch.equal(alone.entropy, stored.entropy)
    if case.topk_ids is not None:
        assert alone.topk_logprob is not None and stored.topk_logprob is not None
        assert torch.equal(alone.topk_logprob, stored.topk_logprob)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocab_size=st.integers(2, PADDED),
    k=st.integers(0, 20),
    temperature=st.floats(0.3, 2.0),
    scale=st.floats(0.0, 30.0),
    entropy=st.booleans(),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 2**16),
)
# next to p = 1, where c - c p has lost its digits
@example(tokens=2, vocab_size=2, k=1, temperature=0.625, scale=1.75, entropy=False, chunk=1, seed=579)
def test_any_problem(
    tokens: int, vocab_size: int, k: int, temperature: float, scale: float, entropy: bool, chunk: int, seed: int
) -> None:
    case = make_case(
        tokens=tokens, vocab_size=vocab_size, k=min(k, vocab_size), temperature=temperature, entropy=entropy, seed=seed
    )
    case = replace(case, hidden=scale * case.hidden)
    expected = answer(case)
    for memory in (HeadMemory("store"), HeadMemory("chunk", chunk * 4 * PADDED)):
        loss, stats, hidden, weight = loss_of(case, memory)
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        assert_equal(case, expected, stats, loss.detach(), hidden.grad, weight.grad)


def test_membership_of_the_sampled_token() -> None:
    case = make_case(k=4)
    stats = token_stats(case.hidden, case.weight, case.targets, case.topk_ids, shard=VocabShard(0, case.vocab_size))
    assert stats.member is not None
    assert stats.member[1].tolist() == [True, True, False, False, True]  # two absent; the target stands outside
    assert stats.member[2].tolist() == [True, True, True, True, False]  # the target is the first id
    assert stats.member[3, :4].tolist() == [True, False, False, False]  # one id four times


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_divergences_of_identical_logits(temperature: float, seed: int) -> None:
    """The weight is the identity, so hidden states are the logits, exactly."""
    g = torch.Generator().manual_seed(seed)
    vocab, tokens, k = 64, 200, 8
    mu_logits = 2 * torch.randn(tokens, vocab, generator=g)
    pi_logits = mu_logits + 0.5 * torch.randn(tokens, vocab, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g).to(DEVICE)
    mu_logits, pi_logits = mu_logits.to(DEVICE), pi_logits.to(DEVICE)
    topk_ids = mu_logits.topk(k).indices
    log_mu, log_pi = (torch.log_softmax(x.double() / temperature, -1) for x in (mu_logits, pi_logits))
    columns = torch.cat([topk_ids, targets[:, None]], 1)
    mu = log_mu.gather(1, columns).float()
    stats = token_stats(
        pi_logits,
        torch.eye(vocab, device=DEVICE),
        targets,
        topk_ids,
        shard=VocabShard(0, vocab),
        temperature=temperature,
    )
    assert stats.topk_logprob is not None and stats.member is not None
    pi = log_pi.gather(1, columns)
    for divergence in (binary_tv, binary_kl):
        close(divergence(mu[:, -1], stats.logprob), divergence(mu[:, -1].double(), pi[:, -1]), 1e-6)
    for divergence in (topk_tv, topk_kl):
        got = divergence(mu, stats.topk_logprob, stats.member)
        close(got, divergence(mu.double(), pi, stats.member), 1e-6)


@pytest.mark.parametrize("path", ["store", "chunk"])
def test_a_column_that_cannot_be_sampled(path: str) -> None:
    hidden = torch.zeros(2, H)
    hidden[:, 0] = 1.0
    weight = torch.zeros(8, H)
    weight[3, 0] = -torch.inf
    case = Case(hidden, weight, torch.tensor([0, 7]), None, 8, 1.0, torch.ones(2), torch.ones(2)).to(DEVICE)
    loss, stats, _, weight = loss_of(case, PATHS[path])
    close(stats.entropy, torch.tensor([7.0, 7.0]).log(), 1e-6)
    close(loss.detach(), torch.zeros(()), 1e-6)  # log 1/7 + log 7, twice
    loss.backward()  # of the hidden states: 0 times -inf, by nature
    assert weight.grad is not None
    expected = torch.full((8,), -2 / 7)  # two tokens, p = 1/7; an even distribution's entropy has no slope
    expected[torch.tensor([0, 7])] += 1
    expected[3] = 0.0
    close(weight.grad[:, 0], expected, 1e-6)


def test_a_blocked_token_that_became_impossible_does_not_stop_the_run() -> None:
    hidden, weight = torch.ones(1, H), torch.zeros(4, H)
    weight[2, 0] = -torch.inf
    case = Case(hidden, weight, torch.tensor([2]), None, 4, 1.0, torch.zeros(1), None).to(DEVICE)
    loss, stats, _, _ = loss_of(case, PATHS["store"])
    assert stats.logprob.item() == -torch.inf and loss.item() == 0.0


def test_memory_decides_the_path() -> None:
    memory = HeadMemory("auto", budget_bytes=4 * 10 * 100)
    assert memory.chunk_tokens(100) == 10
    assert memory.stores(10, 100) and not memory.stores(11, 100)
    assert HeadMemory("store", 1).stores(11, 100) and not HeadMemory("chunk").stores(1, 100)
    with pytest.raises(ValueError, match=r"got 399 bytes, expected at least 400 \(one token's logits\)"):
        HeadMemory("chunk", 399).chunk_tokens(100)


def test_chunks_come_in_order_and_within_the_budget() -> None:
    case = make_case(tokens=13)
    seen = []

    def coefficients(stats: TokenStats, tokens: slice) -> tuple[Tensor, Tensor | None]:
        seen.append((tokens.start, tokens.stop))
        return case.coefficients(stats, tokens)

    policy_loss(
        case.hidden, case.weight, case.targets, case.topk_ids, coefficients,
        shard=VocabShard(0, case.vocab_size), entropy_gradient=True, memory=CHUNK_OF_4,
    )  # fmt: skip
    assert seen == [(0, 4), (4, 8), (8, 12), (12, 13)]


def with_main_grad(case: Case, **marks: bool) -> Tensor:
    weight = torch.nn.Parameter(case.weight.clone())
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # an earlier micro-batch's
    weight.grad_added_to_main_grad = False
    for name, value in marks.items():
        setattr(weight, name, value)
    return weight


@pytest.mark.parametrize("path", ["store", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_gradient_in_float32(path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    weight = with_main_grad(case)
    loss, _, _, _ = loss_of(case, PATHS[path], weight)
    loss.backward()
    added, expected = weight.main_grad[: case.vocab_size] - 1, answer(case).d_weight
    # Not rounded to bf16, also where the weight is; on a GPU the gradient of the logits is, before the product.
    rounding = 2**-8 * float(expected.abs().max()) if dtype == torch.bfloat16 and weight.is_cuda else 0.0
    close(added, expected, 1e-5 + rounding)
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None and weight.grad.shape == weight.shape  # the dummy that Megatron's hook wants


@pytest.mark.parametrize("path", ["store", "chunk"])
def test_a_tied_weight_keeps_the_embeddings_own_gradient(path: str) -> None:
    """On one stage Megatron adds the gradient it is handed: the embedding's, and zeros from the head."""
    case = make_case()
    weight = with_main_grad(case, zero_out_wgrad=True)
    loss, _, _, _ = loss_of(case, PATHS[path], weight)
    (loss + weight[5].sum()).backward()
    expected = torch.zeros_like(weight)
    expected[5] = 1.0
    assert weight.grad is not None and torch.equal(weight.grad, expected)


@pytest.mark.parametrize("path", ["store", "chunk"])
def test_nothing_accumulates_without_autograd(path: str) -> None:
    case = make_case()
    weight = with_main_grad(case)
    with torch.no_grad():
        loss, stats, _, _ = loss_of(case, PATHS[path], weight)
    close(stats.logprob, answer(case).logprob, tolerance(case))
    assert not loss.requires_grad
    assert torch.equal(weight.main_grad, torch.ones_like(weight)) and not weight.grad_added_to_main_grad


@pytest.mark.parametrize("path", ["store", "chunk"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(path: str, frozen: str) -> None:
    case = make_case()
    hidden = case.hidden.clone().requires_grad_(frozen != "hidden")
    weight = case.weight.clone().requires_grad_(frozen != "weight")
    loss, _ = policy_loss(
        hidden, weight, case.targets, case.topk_ids, case.coefficients,
        shard=VocabShard(0, case.vocab_size), entropy_gradient=True, memory=PATHS[path],
    )  # fmt: skip
    loss.backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_the_upstream_gradient() -> None:
    """The store path takes any; the chunk path made its gradient for 1."""
    case = make_case()
    loss, _, hidden, _ = loss_of(case, PATHS["store"])
    (3 * loss).backward()
    assert hidden.grad is not None
    close(hidden.grad, 3 * answer(case).d_hidden, 1e-4)

    loss, _, _, _ = loss_of(case.to("cpu"), PATHS["chunk"])  # a GPU's assertion ends the process
    with pytest.raises(RuntimeError, match=r"got an upstream gradient of 3.0, expected 1:"):
        (3 * loss).backward()


@pytest.mark.parametrize("path", ["store", "chunk"])
def test_a_graph_is_used_once(path: str) -> None:
    loss, _, hidden, _ = loss_of(make_case(), PATHS[path])
    with pytest.raises(RuntimeError, match="retain_graph or create_graph"):
        loss.backward(retain_graph=True)
    loss, _, hidden, _ = loss_of(make_case(), PATHS[path])
    with pytest.raises(RuntimeError, match="retain_graph or create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss, _, hidden, _ = loss_of(make_case(), PATHS[path])
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_entropy_coefficients_have_to_be_announced() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="expected none without entropy_gradient"):
        policy_loss(
            case.hidden, case.weight, case.targets, None, case.coefficients, shard=VocabShard(0, case.vocab_size)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"targets": torch.full((13,), 101)}, "targets: got an id outside of 0..100"),
        ({"targets": torch.full((13,), -1)}, "targets: got an id outside of 0..100"),
        ({"topk_ids": torch.full((13, 4), 101)}, "topk_ids: got an id outside of -1..100"),
        ({"topk_ids": torch.full((13, 4), -2)}, "topk_ids: got an id outside of -1..100"),
        ({"topk_ids": torch.zeros(14, 4, dtype=torch.long)}, r"topk_ids: got shape \(14, 4\), expected \(13, K\)"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets: got shape \(3,\)"),
        ({"hidden": torch.zeros(13, H + 1)}, "hidden, weight"),
    ],
)
@pytest.mark.parametrize("entry", ["stats", "loss"])
def test_refusals(entry: str, change: dict, message: str) -> None:
    case = replace(cases.make_case(k=4), **change)  # on the CPU: a GPU's assertions end the process
    shard = VocabShard(0, case.vocab_size)
    with pytest.raises(ValueError, match=message):
        if entry == "stats":
            token_stats(
                case.hidden, case.weight, case.targets, case.topk_ids, shard=shard, temperature=case.temperature
            )
        else:
            policy_loss(
                case.hidden, case.weight, case.targets, case.topk_ids, case.coefficients,
                shard=shard, temperature=case.temperature,
            )  # fmt: skip

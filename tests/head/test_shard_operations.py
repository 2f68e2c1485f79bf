"""Row statistics and gradients from given logits: plain torch, and Triton by its interpreter (on a GPU: compiled)."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_dppo.head import kernels, reference
from megatron_dppo.head.reference import RowParts, RowScalars

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by Triton's interpreter (tests/conftest.py)

T = 5


@pytest.fixture(params=[reference, kernels], ids=["torch", "triton"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(kernels, "BLOCK", 64)  # several blocks a row
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, "cpu", 256)  # several blocks of rows, or a row a block
    return request.param


def made_logits(kind: str, columns: int) -> Tensor:
    g = torch.Generator().manual_seed(columns)
    logits = 3 * torch.randn(T, columns, generator=g)
    if kind == "huge":
        logits = torch.rand(T, columns, generator=g) * 2e4 - 1e4
    if kind == "impossible_columns":
        logits[:, 2::3] = -torch.inf
        logits[1, 1:] = -torch.inf
    if kind == "growing":
        logits = logits.sort(1).values  # the maximum moves in every block
    return logits.to(DEVICE)


def expected_gradient(
    logits: Tensor, target: Tensor, c: Tensor, e: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Entropy and gradient by hand in float64, with p log p = 0 where p = 0."""
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0.0)
    entropy = -(p * log_p).sum(-1)
    slope = c[:, None].double().expand_as(p)
    if e is not None:
        slope = slope + e[:, None].double() * (log_p + entropy[:, None])
    gradient = -p * slope
    gradient[torch.arange(T), target] += c.double()
    return entropy, gradient / temperature


def scalars_of(parts: RowParts, logits: Tensor, target: Tensor, temperature: float) -> RowScalars:
    """Of a vocabulary that is this one shard."""
    log_sum = parts.excess.double().log1p()
    entropy = log_sum - parts.moment.double() / (1 + parts.excess.double())
    chosen = logits.gather(1, target[:, None])[:, 0].double()
    logprob = (chosen - parts.maximum.double()) / temperature - log_sum
    return RowScalars(parts.maximum, parts.maximum, log_sum.float(), entropy.float(), logprob.float())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("kind", ["normal", "huge", "impossible_columns", "growing"])
@pytest.mark.parametrize("columns", [1, 63, 300])
def test_statistics_and_gradient(
    operations: ModuleType, columns: int, kind: str, with_entropy: bool, temperature: float
) -> None:
    logits = made_logits(kind, columns)
    if kind == "impossible_columns" and columns == 1:
        logits = made_logits("normal", columns)
    target = torch.tensor([0, 1, 2, columns - 1, 1], device=DEVICE).clamp(max=columns - 1)
    c = torch.linspace(-1, 2, T, device=DEVICE)
    e = c.flip(0) if with_entropy else None
    entropy, gradient = expected_gradient(logits, target, c, e, temperature)

    buffer = logits.clone()
    parts = operations.row_statistics_(buffer, temperature, keep_logits=with_entropy)
    assert torch.equal(parts.maximum, logits.amax(1))
    log_sum = torch.logsumexp((logits.double() - logits.amax(1, keepdim=True)) / temperature, 1)
    got_log_sum = parts.excess.double().log1p()
    torch.testing.assert_close(got_log_sum, log_sum, rtol=1e-6, atol=1e-12)  # relative: also next to 0
    got_entropy = got_log_sum - parts.moment.double() / (1 + parts.excess.double())
    torch.testing.assert_close(got_entropy, entropy, rtol=2e-6, atol=1e-12)

    scalars = scalars_of(parts, logits, target, temperature)
    got = operations.row_gradient_(buffer, scalars, target, c, e, temperature, dtype=torch.float32)
    assert got.data_ptr() == buffer.data_ptr()  # in place
    torch.testing.assert_close(got.double(), gradient, rtol=0, atol=4e-6 / temperature)


def test_equal_maxima(operations: ModuleType) -> None:
    logits = torch.full((T, 300), -3.0, device=DEVICE)
    logits[:, ::100] = 2.0
    parts = operations.row_statistics_(logits, 1.0, keep_logits=True)
    expected = 2 + 297 * torch.tensor(-5.0).double().exp()
    torch.testing.assert_close(parts.excess.double().cpu(), expected.expand(T), rtol=1e-6, atol=0)


def test_a_gradient_in_bf16(operations: ModuleType) -> None:
    logits = made_logits("normal", 300)
    target = torch.zeros(T, dtype=torch.long, device=DEVICE)
    c = torch.ones(T, device=DEVICE)
    _, gradient = expected_gradient(logits, target, c, c, 1.0)
    original = logits.clone()
    parts = operations.row_statistics_(logits, 1.0, keep_logits=True)
    scalars = scalars_of(parts, original, target, 1.0)
    got = operations.row_gradient_(logits, scalars, target, c, c, 1.0, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.shape == gradient.shape
    torch.testing.assert_close(got.double(), gradient, rtol=2**-7, atol=1e-6)  # Triton's interpreter truncates


def test_rows_wider_than_a_block_are_overwritten_in_order() -> None:
    """With the block as it is used: on a GPU a narrow gradient must not land on logits that are still to be read."""
    logits = 3 * torch.randn(T, 3 * kernels.BLOCK + 100, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    target, c = torch.zeros(T, dtype=torch.long, device=DEVICE), torch.linspace(1, 2, T, device=DEVICE)
    _, gradient = expected_gradient(logits, target, c, None, 1.0)
    parts = kernels.row_statistics_(logits, 1.0, keep_logits=True)
    scalars = scalars_of(parts, logits, target, 1.0)
    got = kernels.row_gradient_(logits, scalars, target, c, None, 1.0, dtype=torch.bfloat16)
    torch.testing.assert_close(got.double(), gradient, rtol=2**-7, atol=1e-6)


def test_triton_takes_bf16_logits() -> None:
    logits = made_logits("normal", 300).bfloat16()
    parts = kernels.row_statistics_(logits, 1.0, keep_logits=True)
    expected = torch.logsumexp(logits.double(), 1)
    torch.testing.assert_close(parts.maximum.double() + parts.excess.double().log1p(), expected, rtol=1e-6, atol=1e-6)


def test_a_nan_stays(operations: ModuleType) -> None:
    logits = made_logits("normal", 300)
    logits[2, 100] = torch.nan
    parts = operations.row_statistics_(logits, 1.0, keep_logits=True)
    assert parts.excess.isnan().tolist() == [False, False, True, False, False]


def test_an_empty_shard_and_one_that_cannot_be_sampled(operations: ModuleType) -> None:
    empty = operations.row_statistics_(torch.empty(T, 0, device=DEVICE), 1.0, keep_logits=True)
    impossible = operations.row_statistics_(torch.full((T, 70), -torch.inf, device=DEVICE), 1.0, keep_logits=True)
    for parts in (empty, impossible):
        assert parts.maximum.tolist() == [pytest.approx(-1e30)] * T
        assert parts.excess.tolist() == [-1.0] * T and parts.moment.tolist() == [0.0] * T


def test_no_tokens(operations: ModuleType) -> None:
    none = torch.empty(0, 70, device=DEVICE)
    parts = operations.row_statistics_(none, 1.0, keep_logits=False)
    assert [part.shape for part in parts] == [(0,)] * 3
    ids, c = torch.empty(0, dtype=torch.long, device=DEVICE), torch.empty(0, device=DEVICE)
    scalars = RowScalars(c, c, c, c, c)
    assert operations.row_gradient_(none, scalars, ids, c, c, 1.0, dtype=torch.float32).shape == (0, 70)

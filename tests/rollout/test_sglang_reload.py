"""`sglang_reload.Reload` on models whose loaders do what SGLang's do; real ones are in tests/engines."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from megatron_dppo.rollout.sglang.reload import Reload
from megatron_dppo.weights.hub_files import TensorInfo

SHAPES = {"q": (2, 3), "k": (1, 3), "embed": (5, 2), "q_a": (2, 4), "kv_a": (1, 4), "dropped": (2,)}
TENSORS = {name: TensorInfo(torch.float32, shape) for name, shape in SHAPES.items()}


class Fused(nn.Module):
    """Two tensors in one parameter, a padded one, two that its loader joins when both are there, and one it drops."""

    def __init__(self, *, latent: bool = True, more: bool = False) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.randn(3, 3))
        self.embed = nn.Parameter(torch.randn(8, 2))
        if latent:
            self.a = nn.Parameter(torch.randn(3, 4))
        if more:
            self.more = nn.Parameter(torch.randn(2))
        self.finished = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        waiting: dict[str, Tensor] = {}
        for name, tensor in weights:
            if name == "q":
                self.qk.data[:2].copy_(tensor)
            elif name == "k":
                self.qk.data.narrow(0, 2, 1).copy_(tensor)
            elif name == "embed":
                self.embed.data[:5].copy_(tensor)
                self.embed.data[5:].fill_(0)
            elif name in ("q_a", "kv_a") and hasattr(self, "a"):
                waiting[name] = tensor
                if len(waiting) == 2:
                    self.a.data.copy_(torch.cat([waiting["q_a"], waiting["kv_a"]]))

    def post_load_weights(self) -> None:
        self.finished += 1


def place(reload: Reload, numbers: dict[str, Tensor], *, but: str = "") -> None:
    reload.begin()
    for name, start, stop in reload.boxes:
        if name != but:
            reload.place(name, start, stop, numbers[name][tuple(map(slice, start, stop))].contiguous())


def test_an_update_makes_what_the_loaders_make() -> None:
    model, expected = Fused(), Fused()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reload = Reload(model, TENSORS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # followed, not called
    assert reload.whole.keys() == {"q_a", "kv_a"} and {name for name, _, _ in reload.boxes} == set(SHAPES) - {"dropped"}

    numbers = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    expected.load_weights(numbers.items())
    place(reload, numbers)
    reload.finish()
    assert torch.equal(model.qk, expected.qk) and torch.equal(model.a, expected.a) and model.finished == 1
    assert torch.equal(model.embed[:5], expected.embed[:5]) and torch.equal(model.embed[5:], before["embed"][5:])


@pytest.mark.parametrize(
    ("missing", "message"), [("k", "3 elements of 19 and 0 whole"), ("kv_a", "0 elements of 19 and 1 whole")]
)
def test_an_update_with_parts_missing_is_refused(missing: str, message: str) -> None:
    reload = Reload(Fused(), TENSORS)
    place(reload, {name: torch.randn(shape) for name, shape in SHAPES.items()}, but=missing)
    with pytest.raises(RuntimeError, match=f"weight update: {message} tensors did not arrive"):
        reload.finish()


def test_a_parameter_that_no_tensor_reaches_is_known() -> None:
    assert Reload(Fused(latent=False, more=True), TENSORS).unreached == ["more"]
    assert Reload(Fused(latent=False), TENSORS).unreached == []

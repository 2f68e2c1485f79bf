"""Router replay: each MoE layer takes the experts that were recorded for its tokens, with scores of its own.

Megatron's routers ask `router_replay.get_replay_topk` for their top-k. Ours is handed its rows by the layer's forward,
from the description of the very micro-batch that the layer computes: so every schedule has the right rows, and a layer
that is computed again in backward has them too. Nothing depends on the order in which layers are built or called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_dppo.architecture import Architecture
from megatron_dppo.data.packing import MicroBatch
from megatron_dppo.head.rows import to_device


@dataclass
class LayerRoutes:
    """Of the tokens of one micro-batch on this rank, in the model's order, and one layer.

    `experts` u8|u16|i16[T, k], `valid` bool[T]: where False the router chooses itself. `experts` None: it does
    everywhere, and leaves in `native` i16[T, k] what it took. It leaves in `agreed` i64[] how many of the valid rows'
    experts it would have taken anyway.
    """

    experts: Tensor | None = None
    valid: Tensor | None = None
    native: Tensor | None = None
    agreed: Tensor | None = None


Routes = Mapping[int, LayerRoutes]  # by the layer's number in the model, from 0


def recorded_routes(batch: MicroBatch, moe_layers: Sequence[int], device: torch.device) -> Routes:
    """What a packed micro-batch's samples were recorded with, for the tokens and the MoE layers of this rank."""
    assert batch.routes is not None and batch.routes_valid is not None
    valid, experts = to_device(batch.routes_valid, device), to_device(batch.routes, device)
    return {layer: LayerRoutes(experts[:, i], valid) for i, layer in enumerate(moe_layers)}


def places_for(moe_layers: Sequence[int]) -> Routes:
    """Where the routers of this rank leave what they take in one micro-batch."""
    return {layer: LayerRoutes() for layer in moe_layers}


def as_taken(routes: Routes) -> Routes:
    """What routers left in places for it, to be replayed."""
    taken = {}
    for layer, found in routes.items():
        assert found.native is not None
        taken[layer] = LayerRoutes(found.native, torch.ones_like(found.native[:, 0], dtype=torch.bool))
    return taken


def compared_routes(native: Routes, recorded: Routes) -> Routes:
    """How far what routers left in places for it agrees with what was recorded."""
    compared = {}
    for layer, found in recorded.items():
        own = native[layer].native
        assert own is not None and found.experts is not None and found.valid is not None
        compared[layer] = LayerRoutes(valid=found.valid, agreed=num_agreed(found.experts.long(), own, found.valid))
    return compared


def agreement_sums(micro_batches: Sequence[Routes], arch: Architecture, device: torch.device) -> Tensor:
    """f64[2, layers of the model] of passes that have been on this rank: how many of the recorded experts the routers
    would have taken themselves, and how many are recorded."""
    total = torch.zeros(2, arch.num_layers, dtype=torch.float64, device=device)
    for layer, routes in (item for of_layers in micro_batches for item in of_layers.items()):
        assert routes.agreed is not None and routes.valid is not None
        total[0, layer] += routes.agreed
        total[1, layer] += routes.valid.sum() * arch.num_experts_per_tok
    return total


@dataclass
class Replay:
    """What one router asks for its top-k."""

    layer: int
    current: LayerRoutes | None = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores f[T, E] -> those of the experts that are taken [T, k], which the gradient flows through, and ids."""
        assert default_compute_topk is not None
        own_scores, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.current is None:
            return own_scores, own
        if self.current.experts is None or self.current.valid is None:
            self.current.native = own.to(torch.int16)
            return own_scores, own
        experts, valid = self.current.experts.long(), self.current.valid
        chosen = torch.where(valid[:, None], experts, own)
        self.current.agreed = num_agreed(chosen, own, valid)
        return scores.gather(1, chosen), chosen


def num_agreed(one: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    """i64[]: how many experts of [T, k] are among those of the other, in valid rows."""
    return ((one[:, :, None] == other[:, None, :]).any(-1) & valid[:, None]).sum()


def install_replay(chunks: Sequence[nn.Module]) -> None:
    """Gives every MoE layer of these chunks a `Replay`, which knows the layer's number in the model.

    Layers of multi-token prediction are none of the decoder's and stay as they are. Raises ValueError for routers that
    choose in a fused kernel or by Sinkhorn's iteration, where nobody asks `Replay`.
    """
    numbers: set[int] = set()
    for layer, router in _routers(chunks):
        config = router.config
        if config.moe_router_fusion:
            raise ValueError("routing.mode: got a fused router top-k, expected moe_router_fusion off to replay routes")
        if router.routing_type == "sinkhorn":
            raise ValueError("routing.mode: got sinkhorn routing, expected top-k to replay routes")
        number = layer.layer_number - 1
        assert number not in numbers, f"two layers are number {number}"
        numbers.add(number)
        replay = router.router_replay = Replay(number)
        layer.register_forward_pre_hook(partial(_hand_over, replay), with_kwargs=True)


def _routers(chunks: Sequence[nn.Module]) -> Iterator[tuple[TransformerLayer, TopKRouter]]:
    for chunk in chunks:
        for name, layer in chunk.named_modules():
            if isinstance(layer, TransformerLayer) and "mtp" not in name.split("."):
                router = getattr(layer.mlp, "router", None)
                if isinstance(router, TopKRouter):
                    yield layer, router


def _hand_over(replay: Replay, _: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
    routes = getattr(named.get("packed_seq_params"), "routes", None)
    replay.current = None if routes is None else routes.get(replay.layer)

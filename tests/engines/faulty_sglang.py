"""A loader for SGLang's workers that fails during an update when told to. For tests only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_dppo.rollout.sglang import worker as sglang_worker
from megatron_dppo.rollout.sglang.message import Call
from tests.engines.faults import at_box


def call(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Does what `kinds.Sglang.tell` says."""
    wanted = Call.from_json(named_tensors[0][0])
    globals()[wanted.method](*wanted.arguments["args"])


def mdppo_fail_next_load(after: int) -> None:
    """Let the next update take `after` boxes and then raise; the one after it is sound again."""

    def fail(*box: Any) -> None:
        raise RuntimeError(f"injected fault after {after} tensors")

    _at_box(after, fail)


def test_exit_next_load(after: int) -> None:
    """Let this process end in the next update, when `after` boxes are taken."""
    _at_box(after, lambda *box: os._exit(7))


def test_stall_next_load(after: int, seconds: float) -> None:
    """Let the next update stop for a while when `after` boxes are taken."""
    _at_box(after, lambda *box: time.sleep(seconds))


def test_damage_next_load(after: int) -> None:
    """Let the next update take other numbers than came."""
    _at_box(after, lambda *box: box[-1].add_(1.0))


def test_forget_routes(forget: bool) -> None:
    """Let routers' choices go unrecorded: zeros are returned for them; or record them again."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    capturer: Any = get_global_experts_capturer()
    if forget:
        capturer.device_cache.buffer.zero_()
        capturer.capture = lambda *_, **__: None
    else:
        del capturer.capture


def _at_box(after: int, what: Callable[..., Any]) -> None:
    (weights,) = sglang_worker._weights.values()
    at_box(weights.reload, after, what)

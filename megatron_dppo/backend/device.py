"""The device a rank computes on; without a GPU, the stand-in that lets Megatron-core run on the CPU.

Megatron-core calls `torch.cuda` by name in many places (streams, events, the random state, `device="cuda"`,
type-name checks in the optimizer). On a machine with a GPU this module changes nothing. On a machine without
one, `install_stand_in` replaces those calls once, for this process, by their CPU meaning. A rank calls it when it joins
its job (`parallel.initialise_parallel`); no other process should, since transformers' models do not load right under
it. Nothing else in the package patches torch or Megatron-core.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
    "rand",
    "randn",
)


def has_gpu() -> bool:
    """True when torch sees at least one CUDA device (the stand-in never makes this True)."""
    return torch.cuda.device_count() > 0


def communication_backend() -> str:
    """`nccl` with a GPU, `gloo` without."""
    return "nccl" if has_gpu() else "gloo"


def select_device() -> torch.device:
    """The device of this rank's parameters and activations: GPU number LOCAL_RANK, or the CPU."""
    if not has_gpu():
        return CPU
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def mend_without_transformer_engine() -> None:
    """Two places of megatron-core 0.16 that take Transformer Engine for granted.

    The router uses a name that it imports from there in a try block; multi-latent attention takes the placeholders it
    finds for classes. Needed on every machine that lacks Transformer Engine, with or without a GPU.
    """
    import megatron.core.extensions.transformer_engine as transformer_engine
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as latent_attention

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def install_stand_in() -> None:
    """Replaces what Megatron calls of `torch.cuda` by its CPU meaning. Nothing with a GPU, or when done before."""
    if has_gpu() or getattr(torch.cuda, "_megatron_dppo_stand_in", False):
        return
    _install()
    _mend_megatron()
    torch.cuda._megatron_dppo_stand_in = True  # type: ignore[attr-defined]


class _Stream:
    """Work is done when it was called, so every wait is over already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory with `device="cuda"` read as the CPU and page-locked memory (a GPU matter) left out."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _install() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *_: None
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor

    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda.default_generators = defaultdict(lambda: torch.default_generator)
    # Megatron's random-state tracker queues its work until CUDA is up; here it is up.
    cuda._lazy_call = lambda call, **_: call()

    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = lambda self, _: None
    tensor.type = _cuda_type_names(torch.Tensor.type)


def _cuda_type_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.type()` as on a GPU: the distributed optimizer sorts parameters by that name."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_


def _mend_megatron() -> None:
    """Places of megatron-core 0.16 that take a GPU for granted, or took a call's name early."""
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    megatron_random._lazy_call = torch.cuda._lazy_call

    def as_numpy_or_same(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The original converts only tensors that are on a GPU, its callers need numpy split sizes.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_numpy_or_same
    mappings._gather_along_first_dim = _gather_any_sizes(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _scatter_any_sizes(mappings._reduce_scatter_along_first_dim)


def _gather_any_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Experts under expert tensor parallelism gather as many tokens as each rank happens to have; gloo's all-gather
    wants the same number of each, its all-to-all does not."""

    def gather(input_: Any, group: Any, sizes: list[int] | None = None, *rest: Any, **named: Any) -> Any:
        if sizes is None or group.size() == 1:
            return original(input_, group, sizes, *rest, **named)
        output = input_.new_empty((sum(sizes), *input_.shape[1:]))
        copies = torch.cat([input_] * group.size())
        torch.distributed.all_to_all_single(output, copies, sizes, [len(input_)] * group.size(), group=group)
        return output

    return gather


def _scatter_any_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same way back."""

    def scatter(input_: Any, group: Any, sizes: list[int] | None = None, *rest: Any, **named: Any) -> Any:
        if sizes is None or group.size() == 1:
            return original(input_, group, sizes, *rest, **named)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].contiguous()

    return scatter

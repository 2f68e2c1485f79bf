"""In the place of SGLang's compiled kernels: the one that its CPU path calls, in torch; any other says its name."""

from __future__ import annotations

from typing import Any

import torch

__version__ = "0.4.10"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int | None = None,
) -> None:
    """Writes each request's new cache places, which follow each other in `out_cache_loc`, into its row of the table."""
    first = 0
    for row, begin, stop in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        places = out_cache_loc[first : first + stop - begin]
        req_to_token[row, begin:stop] = places.to(req_to_token.dtype)
        first += stop - begin


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name}: this stand-in for tests on the CPU does not have it")

    return missing

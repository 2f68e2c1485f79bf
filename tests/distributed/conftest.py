from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.rank_pool import RankPool

MOST_JOBS = 20  # Megatron's DDP never lets go of its process groups: some fifty threads stay with every job


class _Pools:
    """One pool of four ranks, replaced when a failed test left it broken, and now and then."""

    def __init__(self) -> None:
        self._pool: RankPool | None = None

    def get(self) -> RankPool:
        if self._pool is not None and self._pool.jobs_done >= MOST_JOBS:
            self._pool.close()
        if self._pool is None or not self._pool.alive:
            self._pool = RankPool(4)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


@pytest.fixture(scope="session")
def _pools() -> Iterator[_Pools]:
    pools = _Pools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(_pools: _Pools) -> RankPool:
    """Four real ranks over gloo."""
    return _pools.get()

"""Fair shares against brute force, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.weights.sharing import fair_quotas


def least_busiest(nbytes: dict[tuple[int, ...], int], ranks: int) -> float:
    """Hall's theorem: the largest, over sets of ranks, of what only these hold over their number."""
    subsets = ({rank for rank in range(ranks) if mask >> rank & 1} for mask in range(1, 1 << ranks))
    return max(sum(n for holders, n in nbytes.items() if subset >= set(holders)) / len(subset) for subset in subsets)


SETS = st.dictionaries(
    st.sets(st.integers(0, 5), min_size=1).map(lambda ranks: tuple(sorted(ranks))),
    st.integers(0, 10**9),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SETS)
def test_no_other_shares_make_the_busiest_rank_less_busy(nbytes: dict[tuple[int, ...], int]) -> None:
    """Any sets of holders: within a thousandth of brute force, and everything is given to a holder once."""
    quotas, loads = fair_quotas(list(nbytes), list(nbytes.values()), 6)
    assert [sum(quota) for quota in quotas] == list(nbytes.values())
    assert min(min(quota) for quota in quotas) >= 0
    assert loads == [
        sum(quota[holders.index(rank)] for holders, quota in zip(nbytes, quotas, strict=True) if rank in holders)
        for rank in range(6)
    ]
    least = least_busiest(nbytes, 6)
    assert least <= max(loads) <= least * 1.001 + 6


@pytest.mark.parametrize(
    ("nbytes", "loads"),
    [
        ({(0,): 10, (0, 1): 30}, [20, 20]),
        ({(0,): 50, (0, 1): 30}, [50, 30]),
        ({(0, 1): 30, (1, 2): 0, (2,): 7}, [15, 15, 7]),
        ({(0, 1): 31, (0, 1, 2, 3): 70}, [25, 25, 26, 25]),
        ({(0, 1): 90, (1, 2): 30, (2, 3): 0}, [45, 45, 30, 0]),
        ({(0, 1): 30, (1, 2): 30, (2,): 30}, [30, 30, 30]),  # at first 15, 37 and 38
    ],
)
def test_shares_by_hand(nbytes: dict[tuple[int, ...], int], loads: list[int]) -> None:
    assert fair_quotas(list(nbytes), list(nbytes.values()), len(loads))[1] == loads

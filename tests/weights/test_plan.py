"""Plans are executed on tensors of distinct numbers, at many layouts; what they cost is compared with brute force."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout
from megatron_dppo.weights.layout import Box, Parallel, Piece, megatron_layout
from megatron_dppo.weights.mapping import hub_dtypes, hub_shapes
from megatron_dppo.weights.plan import Plan, sync_plan
from tests.weights.architectures import ARCHITECTURES, KIMI_K2, LATENT, LAYOUTS, QWEN3_235B, SMALL
from tests.weights.plan_report import report_of

ENGINES = [
    EngineParallel(),
    EngineParallel(tensor=2),
    EngineParallel(tensor=4),
    EngineParallel(tensor=2, data=2),
    EngineParallel(data=3, expert_parallel=True),
    EngineParallel(tensor=2, data=2, expert_parallel=True, sequence_parallel_moe=True),
]
KIMI_TRAINER = Parallel(tensor=8, expert=32, pipeline=8, ranks=256, chunk_layers=(8, 8, 8, 8, 8, 8, 8, 5))
QWEN_TRAINER = Parallel(tensor=4, expert=16, pipeline=2, ranks=32)
NUMPY = {"bfloat16": np.dtype(np.uint16), "float32": np.dtype(np.uint32)}  # bits are all that is moved

Layouts = tuple[list[list[Piece]], list[list[Box]], dict[str, str]]


def layouts(arch: Architecture, trainer: Parallel, engine: EngineParallel) -> Layouts:
    senders = [list(megatron_layout(arch, trainer, rank)) for rank in range(trainer.ranks)]
    receivers = [list(engine_layout(arch, engine, worker)) for worker in range(engine.workers)]
    return senders, receivers, hub_dtypes(arch, "bfloat16")


def hub_tensors(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """No two elements are alike, and none is 0."""
    tensors, first = {}, 1
    for name, shape in shapes.items():
        tensors[name] = np.arange(first, first + prod(shape), dtype=NUMPY[dtypes[name]]).reshape(shape)
        first += prod(shape)
    assert first < 2**16
    return tensors


def local_parameters(pieces: Sequence[Piece], hub: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A rank's parameters, filled from its pieces; padding is 0."""
    extents: dict[str, list[int]] = {}
    for piece in pieces:
        ends = [s.stop for s in piece.local_index]
        extents[piece.param] = [max(a, b) for a, b in zip(ends, extents.get(piece.param, ends), strict=True)]
    parameters: dict[str, np.ndarray] = {}
    for piece in pieces:
        source = hub[piece.tensor]
        parameter = parameters.setdefault(piece.param, np.zeros(extents[piece.param], source.dtype))
        parameter[piece.local_index] = source[piece.hub_index]
    return parameters


def columns(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def box_of(plan: Plan, row: int, start: np.ndarray) -> tuple[slice, ...]:
    shape = plan.stop[row] - plan.start[row]
    return tuple(slice(a, a + n) for a, n in zip(start[row].tolist(), shape.tolist(), strict=True))


def received(plan: Plan, parameters: list[dict[str, np.ndarray]], shapes: dict[str, tuple[int, ...]]) -> Any:
    """Executes a plan bucket by bucket: what each worker has of each tensor, and how often it was written."""
    workers = range(len(plan.kept_bytes))
    values = [{n: np.zeros(s, NUMPY[plan.dtypes[plan.tensors.index(n)]]) for n, s in shapes.items()} for _ in workers]
    counts = [{n: np.zeros(s, int) for n, s in shapes.items()} for _ in workers]
    nbytes = plan.nbytes
    for bucket in range(plan.num_buckets):
        rows = range(*plan.rows(bucket).indices(len(nbytes)))
        assert len(rows) and {int(plan.bucket[row]) for row in rows} == {bucket}
        for row in rows:
            source = parameters[plan.src_rank[row]][plan.params[plan.src_param[row]]]
            data = columns(source)[box_of(plan, row, plan.src_offset)]
            assert data.nbytes == nbytes[row]
            dst, name, box = int(plan.dst[row]), plan.tensors[plan.tensor[row]], box_of(plan, row, plan.start)
            columns(values[dst][name])[box] = data
            columns(counts[dst][name])[box] += 1
    return values, counts


def assert_delivers(plan: Plan, given: Layouts, shapes: dict[str, tuple[int, ...]], bucket_bytes: int) -> None:
    """Every worker has every element of its boxes, bit for bit, once, and nothing else."""
    senders, receivers, dtypes = given
    hub = hub_tensors(shapes, dtypes)
    values, counts = received(plan, [local_parameters(pieces, hub) for pieces in senders], shapes)
    for bucket, worker in itertools.product(range(plan.num_buckets), range(len(receivers))):
        assert plan.nbytes[(plan.bucket == bucket) & (plan.dst == worker)].sum() <= bucket_bytes
    for worker, boxes in enumerate(receivers):
        expected = {name: np.zeros(shape, int) for name, shape in shapes.items()}
        for box in boxes:
            expected[box.tensor][box.hub_index] = 1
        for name in shapes:
            np.testing.assert_array_equal(counts[worker][name], expected[name], name)
            np.testing.assert_array_equal(values[worker][name], hub[name] * expected[name], name)


def assert_in_layer_order(plan: Plan, workers: int) -> None:
    """A worker's buckets rise with the tensors; every layer begins in the same bucket everywhere."""
    begins: dict[str, set[int]] = defaultdict(set)
    for worker in range(workers):
        mine = plan.dst == worker
        order = np.argsort(plan.tensor[mine], kind="stable")
        tensor, bucket = plan.tensor[mine][order], plan.bucket[mine][order]
        last = {int(t): int(bucket[tensor == t].max()) for t in np.unique(tensor)}
        first = {int(t): int(bucket[tensor == t].min()) for t in np.unique(tensor)}
        assert all(last[a] <= first[b] for a, b in itertools.pairwise(last))
        layers = {plan.tensors[t].split(".")[2] for t in first if plan.tensors[t].startswith("model.layers.")}
        for layer in layers:
            mine_of_layer = [first[t] for t in first if plan.tensors[t].startswith(f"model.layers.{layer}.")]
            begins[layer].add(min(mine_of_layer))
    assert begins and all(len(buckets) == 1 for buckets in begins.values())


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("trainer", LAYOUTS, ids=str)
def test_every_worker_gets_its_boxes_bit_for_bit(trainer: Parallel, family: str) -> None:
    """At every engine, with buckets from two of the longest rows (64 bytes) to everything at once."""
    arch = dataclasses.replace(ARCHITECTURES[family], vocab_size=70)
    shapes = hub_shapes(arch)
    for number, engine in enumerate(ENGINES):
        given = layouts(arch, trainer, engine)
        bucket_bytes = (64, 100, 1000, 333, 10**5)[(number + LAYOUTS.index(trainer)) % 5]
        plan = sync_plan(*given, bucket_bytes=bucket_bytes, min_cut_bytes=(1, 40, 1 << 20)[number % 3])
        assert_delivers(plan, given, shapes, bucket_bytes)
        assert_in_layer_order(plan, engine.workers)
        assert (plan.num_buckets == 1) is (bucket_bytes == 10**5)


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A tensor cut into boxes by a grid."""
    edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    spans = [list(itertools.pairwise(axis)) for axis in edges]
    return [tuple(zip(*box, strict=True)) for box in itertools.product(*spans)]  # type: ignore[misc]


@st.composite
def any_layouts(draw: st.DrawFn) -> Layouts:
    """Tensors cut by any grid, every box on any ranks; workers keep any boxes of another grid."""
    senders: list[list[Piece]] = [[] for _ in range(draw(st.integers(1, 5)))]
    receivers: list[list[Box]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for name, shape in ANY_SHAPES.items():
        for start, stop in draw(grids(shape)):
            holders = draw(st.sets(st.integers(0, len(senders) - 1), min_size=1))
            for replica, rank in enumerate(sorted(holders)):
                offset = tuple(draw(st.integers(0, 2)) for _ in shape)
                senders[rank].append(Piece(name, start, stop, f"p{len(senders[rank])}", offset, replica))
        for boxes in receivers:
            boxes += [Box(name, *box) for box in draw(grids(shape)) if draw(st.booleans())]
    receivers[0].append(Box("model.norm.weight", (0,), (5,)))
    senders[0].append(Piece("model.norm.weight", (0,), (5,), "norm", (1,), 0))
    return senders, receivers, dict.fromkeys(ANY_SHAPES, "bfloat16") | {"b": "float32", "model.norm.weight": "bfloat16"}


ANY_SHAPES: dict[str, tuple[int, ...]] = {"a": (7, 5), "model.layers.0.x": (3,), "b": (9,), "model.layers.1.x": (4, 9)}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(any_layouts(), st.integers(36, 200), st.integers(1, 60))
def test_any_boxes_are_delivered(given: Layouts, bucket_bytes: int, min_cut_bytes: int) -> None:
    plan = sync_plan(*given, bucket_bytes=bucket_bytes, min_cut_bytes=min_cut_bytes)
    assert_delivers(plan, given, ANY_SHAPES | {"model.norm.weight": (5,)}, bucket_bytes)


def least_busiest(given: Layouts) -> float:
    """Bytes that the busiest sender cannot do with less than, however it is shared out.

    By Hall's theorem the largest, over all sets of ranks, of the bytes that only these ranks hold, over their number.
    Holders are painted element by element.
    """
    senders, receivers, dtypes = given
    extent: dict[str, tuple[int, ...]] = {}
    for piece in itertools.chain.from_iterable(senders):
        known = extent.get(piece.tensor, piece.stop)
        extent[piece.tensor] = tuple(max(a, b) for a, b in zip(piece.stop, known, strict=True))
    holders = {name: np.zeros(shape, int) for name, shape in extent.items()}
    for rank, pieces in enumerate(senders):
        for piece in pieces:
            if piece.replica >= 0:
                holders[piece.tensor][piece.hub_index] |= 1 << rank
    wanted: Counter[int] = Counter()
    for box in itertools.chain.from_iterable(receivers):
        masks, counts = np.unique(holders[box.tensor][box.hub_index], return_counts=True)
        for mask, count in zip(masks.tolist(), counts.tolist(), strict=True):
            wanted[mask] += count * NUMPY[dtypes[box.tensor]].itemsize
    return max(
        sum(nbytes for mask, nbytes in wanted.items() if mask & ~ranks == 0) / ranks.bit_count()
        for ranks in range(1, 1 << len(senders))
    )


BALANCE = [
    *(t for t in LAYOUTS if t.ranks > 1),
    Parallel(tensor=2, expert=2, ranks=8),
    Parallel(tensor=4, expert=2, ranks=8),
    Parallel(expert=2, pipeline=2, ranks=8, chunk_layers=(3, 1)),
    Parallel(tensor=2, expert=3, ranks=6),  # who holds what is not nested
]


@pytest.mark.parametrize("trainer", BALANCE, ids=str)
@pytest.mark.parametrize("engine", ENGINES[1::2], ids=str)
def test_senders_are_as_even_as_the_layout_permits(engine: EngineParallel, trainer: Parallel) -> None:
    """The limit is brute force's to a byte; when single rows may be shared, the busiest rank is within 2 % of it."""
    arch = dataclasses.replace(LATENT, vocab_size=70, num_experts=12, hidden_size=16)
    given = layouts(arch, trainer, engine)
    least = least_busiest(given)
    plan = sync_plan(*given, bucket_bytes=4096, min_cut_bytes=1)
    assert least <= plan.fair_bytes.max() < least * 1.0001 + 1
    report = report_of(plan)
    assert max(report.sent_bytes) >= least
    assert max(report.sent_bytes) < 1.02 * least + 32
    assert report.sender_balance_limit == pytest.approx(
        plan.fair_bytes.max() * trainer.ranks / report.trainer_to_engine_bytes
    )


def test_four_replicas_share_in_every_bucket() -> None:
    """One box of 64 x 8 on four ranks, 16 bytes a row: each sends 16 rows, 4 of them in each of the 4 buckets."""
    senders = [[Piece("w", (0, 0), (64, 8), "p", (0, 0), rank)] for rank in range(4)]
    plan = sync_plan(senders, [[Box("w", (0, 0), (64, 8))]], {"w": "bfloat16"}, bucket_bytes=271, min_cut_bytes=1)
    assert [plan.stop[plan.rows(b)][:, 0].tolist() for b in range(4)] == [
        [4, 8, 12, 16], [20, 24, 28, 32], [36, 40, 44, 48], [52, 56, 60, 64],
    ]  # fmt: skip
    assert plan.src_rank.tolist() == [0, 1, 2, 3] * 4
    report = report_of(plan)
    assert (report.sent_bytes, report.sender_balance, report.num_messages) == ((256,) * 4, 1.0, 16)
    assert (report.sender_staging_bytes, report.worker_staging_bytes) == ((128,) * 4, (512,))
    whole = sync_plan(senders, [[Box("w", (0, 0), (64, 8))]], {"w": "bfloat16"}, bucket_bytes=271)
    assert sorted(whole.src_rank.tolist()) == [0, 1, 2, 3]  # nothing is cut: a bucket each


def test_a_box_that_a_rank_holds_twice_is_sent_from_one_place() -> None:
    """The second place is no second sender: rank 0 and rank 1 send half each."""
    places = [(0, "p"), (0, "q"), (1, "p")]
    senders: list[list[Piece]] = [[], []]
    for rank, param in places:
        senders[rank].append(Piece("w", (0,), (80,), param, (0,), rank))
    plan = sync_plan(senders, [[Box("w", (0,), (80,))]], {"w": "bfloat16"}, bucket_bytes=1000, min_cut_bytes=1)
    assert (report_of(plan).sent_bytes, plan.num_buckets, len(plan.dst)) == ((80, 80), 1, 2)


def test_a_rank_that_must_send_more_gets_no_share_of_the_rest() -> None:
    """Rank 0 alone holds 100 of 200 rows that it and rank 1 share: rank 1 sends 150 - 50, rank 0 100 + 50."""
    senders = [
        [Piece("a", (0,), (100,), "a", (0,), 0), Piece("b", (0,), (200,), "b", (0,), 0)],
        [Piece("b", (0,), (200,), "b", (7,), 1)],
        [Piece("a", (0,), (100,), "a", (0,), -1)],
    ]
    receivers = [[Box("a", (0,), (100,)), Box("b", (0,), (200,))]]
    plan = sync_plan(senders, receivers, {"a": "bfloat16", "b": "bfloat16"}, bucket_bytes=1000, min_cut_bytes=1)
    report = report_of(plan)
    assert report.sent_bytes == (300, 300, 0)
    assert plan.src_offset[plan.src_rank == 1].tolist() == [[7 + 50, 0]]
    assert report.sender_balance == report.sender_balance_limit == 1.5  # the copy of replica -1 is not sent


def test_report_of_a_relay_over_three_instances() -> None:
    """SMALL at TP2 x DP2 to engines of TP2: every byte by counting elements."""
    given = layouts(SMALL, Parallel(tensor=2, ranks=4), EngineParallel(tensor=2))
    plan = sync_plan(*given, bucket_bytes=512, instances=3)
    report = report_of(plan)
    kept = tuple(2 * sum(prod(np.subtract(b.stop, b.start)) for b in boxes) for boxes in given[1])
    # 11 rows of the vocabulary are all on worker 0 (11 x 8 elements of 2 bytes, embedding and head).
    assert report.received_bytes == kept and kept[0] - kept[1] == 2 * 2 * 11 * 8
    assert report.trainer_to_engine_bytes == report.trainer_to_engine_minimum == sum(kept) == sum(report.sent_bytes)
    assert report.engine_to_engine_bytes == report.engine_to_engine_minimum == 2 * sum(kept)
    assert report.wire_over_minimum == 1.0
    assert [plan.relay(bucket) for bucket in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert report.num_parts == len(plan.dst) and report.num_buckets == plan.num_buckets == plan.bucket.max() + 1
    assert report.num_messages == len(set(zip(plan.bucket, plan.dst, plan.src_rank, strict=True)))
    each = [
        [int(plan.nbytes[(plan.bucket == b) & (plan.dst == w)].sum()) for b in range(plan.num_buckets)] for w in (0, 1)
    ]
    assert report.worker_staging_bytes == tuple(max(a + b for a, b in itertools.pairwise(row)) for row in each)
    assert max(map(max, each)) <= 512


def test_parts_of_a_message_are_neighbours_for_both_sides() -> None:
    given = layouts(LATENT, Parallel(tensor=2, expert=2, ranks=8), EngineParallel(tensor=2, data=2))
    plan = sync_plan(*given, bucket_bytes=600, min_cut_bytes=1)
    itemsize = np.array([NUMPY[d].itemsize for d in plan.dtypes])[plan.tensor]
    message = list(zip(plan.bucket, -itemsize, plan.dst, plan.src_rank, strict=True))
    assert message == sorted(message) and 4 in itemsize
    sent: Counter[tuple[int, int]] = Counter()
    for row, nbytes in enumerate(plan.nbytes.tolist()):
        bucket, src = int(plan.bucket[row]), int(plan.src_rank[row])
        assert sent[bucket, src] % itemsize[row] == 0
        sent[bucket, src] += nbytes
    assert report_of(plan).num_messages == len(set(message))


def test_the_digest_changes_with_anything() -> None:
    given = layouts(SMALL, Parallel(tensor=2, ranks=4), EngineParallel(tensor=2))
    plan = sync_plan(*given, bucket_bytes=512, instances=2)
    assert plan.digest() == sync_plan(*given, bucket_bytes=512, instances=2).digest()
    digests = [plan.digest(), sync_plan(*given, bucket_bytes=511, instances=2).digest()]
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, np.ndarray):
            changed = value.copy()
            changed.flat[-1] += 1
        else:
            changed = 3 if isinstance(value, int) else (*value[:-1], value[-1] + "x")
        digests.append(dataclasses.replace(plan, **{field.name: changed}).digest())
    assert len(set(digests)) == len(digests) == 18


def test_the_digest_of_a_plan_is_known() -> None:
    """A machine with another byte order, or a later version, must say the same of the same plan."""
    plan = sync_plan(
        [[Piece("w", (0, 0), (6, 8), "p", (0, 0), rank)] for rank in range(2)],
        [[Box("w", (0, 0), (6, 8))]],
        {"w": "bfloat16"},
        bucket_bytes=64,
    )
    assert plan.digest() == "66bec08178581aff005752b1ea9813660b235e41a3217b05e41ce3d0a9c2a9d3"


DIGEST = """
from megatron_dppo.weights.engine_layout import EngineParallel
from megatron_dppo.weights.layout import Parallel
from megatron_dppo.weights.plan import sync_plan
from tests.weights.architectures import LATENT
from tests.weights.test_plan import layouts
given = layouts(LATENT, Parallel(tensor=2, expert=3, ranks=6), EngineParallel(tensor=2, data=2))
print(sync_plan(*given, bucket_bytes=512, min_cut_bytes=1).digest())
"""


def test_the_digest_is_the_same_in_every_process() -> None:
    arch = dataclasses.replace(LATENT, num_experts=12)
    code = DIGEST.replace("LATENT, Parallel", "dataclasses.replace(LATENT, num_experts=12), Parallel")
    given = layouts(arch, Parallel(tensor=2, expert=3, ranks=6), EngineParallel(tensor=2, data=2))
    here = sync_plan(*given, bucket_bytes=512, min_cut_bytes=1).digest()
    command = [sys.executable, "-c", "import dataclasses" + code]
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == here


def test_what_cannot_be_planned() -> None:
    a = [[Piece("a", (0, 0), (4, 8), "p", (0, 0), 0)]]
    kinds = {"a": "bfloat16"}
    whole = [[Box("a", (0, 0), (4, 8))]]
    with pytest.raises(ValueError, match=r"no rank that holds all of a\[2:5, 0:8\] of worker 1"):
        sync_plan(a, [*whole, [Box("a", (2, 0), (5, 8))]], kinds, bucket_bytes=99)
    with pytest.raises(ValueError, match=r"no rank that holds all of a\[0:4, 0:8\] of worker 0"):
        sync_plan([], whole, kinds, bucket_bytes=99)
    with pytest.raises(ValueError, match=r"a\[0:4, 0:8\] of rank 0 and a\[2:6, 0:8\] of rank 1, which overlap"):
        sync_plan([*a, [Piece("a", (2, 0), (6, 8), "p", (0, 0), 0)]], whole, kinds, bucket_bytes=99)
    with pytest.raises(ValueError, match=r"of worker 0 and a\[3:4, 0:8\] of worker 0, which overlap"):
        sync_plan(a, [[*whole[0], Box("a", (3, 0), (4, 8))]], kinds, bucket_bytes=99)
    with pytest.raises(ValueError, match="buckets of 31 bytes, expected room for two of the longest rows, 32"):
        sync_plan(a, whole, kinds, bucket_bytes=31)
    assert sync_plan(a, whole, kinds, bucket_bytes=32).stop[:, 0].tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="got b, expected a tensor of the model"):
        sync_plan(a, [[Box("b", (0,), (1,))]], kinds, bucket_bytes=99)
    with pytest.raises(ValueError, match="no boxes of any worker"):
        sync_plan(a, [], kinds, bucket_bytes=99)
    with pytest.raises(ValueError, match="got dtype int4, expected one of float32"):
        sync_plan(a, whole, {"a": "int4"}, bucket_bytes=99)
    with pytest.raises(ValueError, match="got 0 engine instances, expected at least 1"):
        sync_plan(a, whole, kinds, bucket_bytes=99, instances=0)


def assert_tiles(plan: Plan, given: Layouts) -> None:
    """Each worker's parts are disjoint, as large together as its boxes, and each inside a piece of its sender."""
    senders, receivers, _ = given
    by_place: dict[tuple[int, str, str], list[Piece]] = defaultdict(list)
    for rank, pieces in enumerate(senders):
        for piece in pieces:
            by_place[rank, piece.param, piece.tensor].append(piece)
    volume: Counter[tuple[int, str]] = Counter()
    parts: dict[tuple[int, str], list[tuple[list[int], list[int]]]] = defaultdict(list)
    rows = (
        c.tolist()
        for c in (plan.tensor, plan.src_rank, plan.src_param, plan.dst, plan.src_offset, plan.start, plan.stop)
    )
    for tensor, rank, param, dst, offset, start, stop in zip(*rows, strict=True):
        name = plan.tensors[tensor]
        assert any(
            all(
                a <= x < y <= b and o - p == x - a
                for a, b, p, x, y, o in zip(q.start, q.stop, q.offset, start, stop, offset, strict=False)
            )
            for q in by_place[rank, plan.params[param], name]
        )
        for other_start, other_stop in parts[dst, name]:
            assert any(max(a, c) >= min(b, d) for a, b, c, d in zip(start, stop, other_start, other_stop, strict=True))
        parts[dst, name].append((start, stop))
        volume[dst, name] += prod(b - a for a, b in zip(start, stop, strict=True))
    for worker, boxes in enumerate(receivers):
        for box in boxes:
            for part in parts[worker, box.tensor]:
                assert all(a <= x < y <= b for a, b, x, y in zip(box.start, box.stop, *part, strict=False))
            assert volume.pop((worker, box.tensor)) == prod(np.subtract(box.stop, box.start).tolist())
    assert not volume


def test_a_trillion_parameters_to_eight_engines() -> None:
    """Kimi-K2 from 256 ranks to 8 engines of TP8 x DP4 with EP: 2.18 TB to the first, in 128 buckets of half a GiB."""
    given = layouts(KIMI_K2, KIMI_TRAINER, EngineParallel(tensor=8, data=4, expert_parallel=True))
    plan = sync_plan(*given, bucket_bytes=1 << 29, instances=8)
    assert_tiles(plan, given)
    report = report_of(plan)
    each = 2 * 34_127_656_448 + 2 * 60 * 384  # elements by hand in test_engine_layout.py; the routers' bias is float32
    assert set(report.received_bytes) == {each}
    assert report.wire_over_minimum == 1.0 and report.num_buckets == 128
    assert report.engine_to_engine_bytes == 7 * 32 * each
    assert max(report.worker_staging_bytes) <= 1 << 30 and max(report.sender_staging_bytes) < 1.001 * 2**30
    assert report.sender_balance == pytest.approx(1.055, abs=5e-4)  # stages are uneven: the first of eight holds most
    assert report.sender_balance < 1.0001 * report.sender_balance_limit


def test_qwen3_235b_to_engines_of_tp8() -> None:
    """From TP4 x PP2 x EP16 on 32 ranks; 4 key/value heads are twice on the 8 workers."""
    given = layouts(QWEN3_235B, QWEN_TRAINER, EngineParallel(tensor=8))
    plan = sync_plan(*given, bucket_bytes=1 << 29, instances=4)
    assert_tiles(plan, given)
    report = report_of(plan)
    elements = sum(prod(shape) for shape in hub_shapes(QWEN3_235B).values())
    replicated = 94 * (2 * 4096 + 2 * 128 + 128 * 4096) + 4096
    assert report.trainer_to_engine_bytes == 2 * (elements + 7 * replicated + 94 * 2 * 512 * 4096)
    assert report.wire_over_minimum == 1.0 and report.num_buckets == 110
    assert report.sender_balance_limit < 1.00001 and report.sender_balance < 1.0002

"""Measures the policy head beside Megatron-core's loss and one that gathers the vocabulary.

    python tools/bench_policy_head.py [--json]

Two groups, each at TP 1 and TP 2 (real ranks, one thread each): the loss op alone, from given float32 logits to their
gradient, and the head with its loss, from hidden states to the gradients of hidden states and weight. Megatron-core's
yields the log-prob alone; ours also the entropy and K + 1 log-probs. Weight gradients end in a float32 `main_grad`, as
under Megatron's data parallelism. All contenders take turns in every round; a ratio is the median over the rounds of
the ratio within a round. Times are CPU seconds of a rank (without a GPU) or milliseconds (with one); the peak is what
is resident beyond inputs and `main_grad` (the ratio in the JSON leaves out the hidden states' gradient too).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_dppo.head.backends import shard_operations
from megatron_dppo.head.policy_head import HeadMemory, policy_loss, token_stats
from megatron_dppo.head.statistics import VocabShard, merge, pick
from megatron_dppo.job.processes import free_port

K = 20
CHUNK_SHARE = 1 / 10  # of the logits, for the chunk path
# Traffic that each algorithm asks of memory, in bytes for one float32 logit, if nothing but blocks stays in cache.
BYTES = {"mcore": 40, "ours": 16, "ours, entropy gradient": 12}
GPU_BYTES = {"mcore": 40, "ours": 12, "ours, entropy gradient": 12}  # its gradient in float32; 10 in bf16


@dataclass(frozen=True)
class Problem:
    """One rank's share: logits' rows for T tokens over `rows` of a vocabulary."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    topk_ids: Tensor  # [T, 128]
    coefficient: Tensor
    shard: VocabShard
    device: torch.device

    @property
    def elements(self) -> int:
        return len(self.hidden) * len(self.weight)


Run = Callable[[], dict[str, float]]  # -> seconds of "forward" and "backward"


def make_problem(tokens: int, hidden: int, vocabulary: int, group: dist.ProcessGroup, device: torch.device) -> Problem:
    size, at = dist.get_world_size(group), dist.get_rank(group)
    rows = vocabulary // size
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = torch.nn.Parameter((torch.randn(rows, hidden, generator=g) / hidden**0.5 * 3).to(device, dtype))
    weight.main_grad = torch.zeros(weight.shape, device=device)  # type: ignore[attr-defined]
    return Problem(
        torch.randn(tokens, hidden, generator=g).to(device, dtype),
        weight,
        torch.randint(0, vocabulary, (tokens,), generator=g).to(device),
        torch.randint(0, vocabulary, (tokens, 128), generator=g).to(device),
        torch.randn(tokens, generator=g).to(device),
        VocabShard(at * rows, vocabulary, group),
        device,
    )


def clock(device: torch.device) -> float:
    """CPU seconds of this process, all threads; on a GPU wall seconds once its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(device: torch.device, forward: Callable[[], Any], backward: Callable[[Any], Any]) -> dict[str, float]:
    start = clock(device)
    result = forward()
    middle = clock(device)
    backward(result)
    return {"forward": middle - start, "backward": clock(device) - middle}


def loss_ops(problem: Problem) -> dict[str, Run]:
    """From logits to their gradient. Each run starts from a fresh copy of the same logits."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    p = problem
    master = (p.hidden.float() @ p.weight.float().t()).detach()
    logits = torch.empty_like(master)
    operations = shard_operations(p.device.type)

    def fresh() -> Tensor:
        logits.requires_grad_(False).copy_(master)
        return logits

    def mcore() -> dict[str, float]:
        leaf = fresh().requires_grad_()
        return timed(
            p.device,
            lambda: vocab_parallel_cross_entropy(leaf, p.targets),
            lambda loss: torch.autograd.grad(loss, leaf, p.coefficient),
        )

    def ours(k: int, entropy_gradient: bool = False) -> dict[str, float]:
        leaf = fresh()
        ids = p.topk_ids[:, :k] if k else None

        def forward() -> Any:
            columns = p.shard.local(p.targets, leaf.shape[1])
            target = pick(leaf, columns[:, None])[:, 0]
            topk = None if ids is None else pick(leaf, p.shard.local(ids, leaf.shape[1]))
            parts = operations.row_statistics_(leaf, 1.0, keep_logits=entropy_gradient)
            return columns, merge(parts, target, topk, p.targets, ids, p.shard, 1.0)[1]

        def backward(measured: Any) -> None:
            columns, scalars = measured
            entropy = p.coefficient if entropy_gradient else None
            operations.row_gradient_(leaf, scalars, columns, p.coefficient, entropy, 1.0, dtype=torch.float32)

        return timed(p.device, forward, backward)

    def gathered() -> dict[str, float]:
        leaf = fresh().requires_grad_()

        def forward() -> Any:
            whole = gather_vocabulary(leaf, p.shard.group).requires_grad_()
            log_p = torch.log_softmax(whole, -1)
            with torch.no_grad():
                (log_p.exp() * log_p).sum(-1)
                log_p.gather(1, p.topk_ids[:, :K])
            return whole, log_p.gather(1, p.targets[:, None])[:, 0]

        return timed(p.device, forward, lambda out: torch.autograd.grad(out[1], out[0], p.coefficient))

    return {
        "mcore": mcore,
        "ours": lambda: ours(K),
        "ours, entropy gradient": lambda: ours(K, entropy_gradient=True),
        "ours, K=0": lambda: ours(0),
        "ours, K=128": lambda: ours(128),
        "gather the vocabulary": gathered,
    }


def gather_vocabulary(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    size = dist.get_world_size(group)
    if size == 1:
        return logits.detach()
    shards = logits.new_empty((size, *logits.shape))
    dist.all_gather_into_tensor(shards.flatten(0, 1), logits.detach(), group=group)
    return shards.transpose(0, 1).reshape(len(logits), -1)


def heads(problem: Problem) -> dict[str, Run]:
    """From hidden states to the gradients of hidden states and weight."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    p = problem
    main_grad = p.weight.main_grad  # type: ignore[attr-defined]
    chunk = HeadMemory("chunk", int(CHUNK_SHARE * 4 * p.elements))

    def mcore() -> dict[str, float]:
        hidden = p.hidden.clone().requires_grad_()

        def backward(loss: Tensor) -> None:
            _, d_weight = torch.autograd.grad(loss, (hidden, p.weight), p.coefficient)
            main_grad.add_(d_weight)

        return timed(
            p.device,
            lambda: vocab_parallel_cross_entropy((hidden @ p.weight.t()).float(), p.targets),
            backward,
        )

    def ours(memory: HeadMemory, k: int = K, entropy_gradient: bool = False) -> dict[str, float]:
        hidden = p.hidden.clone().requires_grad_()

        def coefficients(_: Any, tokens: slice) -> tuple[Tensor, Tensor | None]:
            return p.coefficient[tokens], p.coefficient[tokens] if entropy_gradient else None

        def forward() -> Tensor:
            ids = p.topk_ids[:, :k] if k else None
            return policy_loss(
                hidden, p.weight, p.targets, ids, coefficients,
                shard=p.shard, memory=memory, entropy_gradient=entropy_gradient,
            )[0]  # fmt: skip

        def backward(loss: Tensor) -> None:
            loss.backward()
            p.weight.grad = None

        return timed(p.device, forward, backward)

    def stats() -> dict[str, float]:
        run = lambda: token_stats(p.hidden, p.weight, p.targets, p.topk_ids[:, :K], shard=p.shard, memory=chunk)  # noqa: E731
        return timed(p.device, run, lambda _: None)

    store = HeadMemory("store")
    return {
        "mcore": mcore,
        "store": lambda: ours(store),
        "store, entropy gradient": lambda: ours(store, entropy_gradient=True),
        "store, K=0": lambda: ours(store, k=0),
        "store, K=128": lambda: ours(store, k=128),
        "chunk": lambda: ours(chunk),
        "stats": stats,
    }


def floors(problem: Problem) -> dict[str, float]:
    """Bytes a second of a large copy, read and written; floating-point operations a second of the head's product."""
    p = problem
    source, copy = torch.zeros(p.elements, device=p.device), torch.zeros(p.elements, device=p.device)

    def seconds(run: Callable[[], Any]) -> float:
        return statistics.median(sum(timed(p.device, run, lambda _: None).values()) for _ in range(3))

    product = copy.view(len(p.hidden), -1).to(p.hidden.dtype)
    flops = 2 * p.elements * p.hidden.shape[1]
    with torch.no_grad():
        return {
            "copy": 8 * p.elements / seconds(lambda: copy.copy_(source)),
            "matmul": flops / seconds(lambda: torch.mm(p.hidden, p.weight.t(), out=product)),
        }


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory alive during `run` beyond what was alive before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure(problem: Problem, runs: dict[str, Run], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every contender in every round, and its peak; means over the ranks."""
    results: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():  # also warms up
        dist.barrier()
        results[name] = {"peak": peak_bytes(run, problem.device), "forward": [], "backward": []}
    for _ in range(rounds):
        for name, run in runs.items():
            dist.barrier()
            for phase, seconds in run().items():
                results[name][phase].append(seconds)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    for name, result in results.items():
        for phase in ("forward", "backward"):
            result[phase] = [statistics.mean(x) for x in zip(*(one[name][phase] for one in everyone), strict=True)]
    return results


def rank_main(at: int, tensor: int, port: int, arguments: argparse.Namespace, out: Any) -> None:
    from megatron_dppo.backend.device import has_gpu
    from megatron_dppo.backend.parallel import finalise_parallel, initialise_parallel
    from megatron_dppo.weights.layout import Parallel

    torch.set_num_threads(1)
    os.environ.update(RANK=str(at), WORLD_SIZE=str(tensor), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    group = initialise_parallel(Parallel(tensor=tensor, ranks=tensor), seed=0).tensor_group
    device = torch.device("cuda" if has_gpu() else "cpu")
    problem = make_problem(arguments.tokens, arguments.hidden, arguments.vocabulary, group, device)
    result: dict[str, Any] = {"tensor": tensor, "elements": problem.elements, "floors": floors(problem)}
    for name, runs in (("loss op", loss_ops), ("head + loss", heads)):
        result[name] = measure(problem, runs(problem), arguments.rounds)
        gc.collect()
    if at == 0:
        out.put(result)
    finalise_parallel()


def total(result: dict[str, Any]) -> list[float]:
    return [f + b for f, b in zip(result["forward"], result["backward"], strict=True)]


def ratio(results: dict[str, Any], name: str, over: str) -> list[float]:
    """Within each round; sorted."""
    return sorted(a / b for a, b in zip(total(results[name]), total(results[over]), strict=True))


def table(result: dict[str, Any], hidden: int) -> Iterator[str]:
    gpu = torch.cuda.is_available()
    unit, scale, traffic = ("ms", 1e3, GPU_BYTES) if gpu else ("CPU s", 1.0, BYTES)
    elements, floor = result["elements"], result["floors"]
    yield (
        f"TP {result['tensor']}: copy {floor['copy'] / 1e9:.1f} GB/s, matmul {floor['matmul'] / 1e9:.0f} GFLOP/s, "
        f"one float32 logits tensor {4 * elements / 1e6:.0f} MB"
    )
    titles = (
        "forward",
        "backward",
        "over mcore",
        "spread",
        "peak MB",
        "peak/logits",
        "B/logit",
        "of copy",
        "of matmul",
    )
    for group, products in (("loss op", 0), ("head + loss", 3)):
        yield f"  {group + ' [' + unit + ']':28}" + "".join(f"{title:>12}" for title in titles)
        for name, one in result[group].items():
            ratios = ratio(result[group], name, "mcore")
            seconds = statistics.median(total(one))
            moved = traffic.get(name)
            count = 1 if name == "stats" else products
            cells = [
                *(f"{scale * statistics.median(one[phase]):.3f}" for phase in ("forward", "backward")),
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
                f"{one['peak'] / 1e6:.0f}",
                f"{one['peak'] / (4 * elements):.2f}",
                f"{moved}" if moved and not products else "",
                f"{moved * elements / seconds / floor['copy']:.0%}" if moved and not products else "",
                f"{count * 2 * elements * hidden / seconds / floor['matmul']:.0%}" if products else "",
            ]
            yield f"  {name:28}" + "".join(f"{cell:>12}" for cell in cells)


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The ratios that have bars, for each TP."""

    def medians(group: str, name: str, over: str) -> dict[str, float]:
        return {f"tp{r['tensor']}": round(statistics.median(ratio(r[group], name, over)), 3) for r in results}

    def peak(r: dict[str, Any]) -> float:
        return (r["head + loss"]["chunk"]["peak"] - r["d_hidden"]) / (4 * r["elements"])

    return {
        "loss_op_over_mcore": medians("loss op", "ours", "mcore"),
        "loss_op_entropy_gradient_over_mcore": medians("loss op", "ours, entropy gradient", "mcore"),
        "head_loss_over_mcore": medians("head + loss", "store", "mcore"),
        "head_loss_entropy_gradient_over_mcore": medians("head + loss", "store, entropy gradient", "mcore"),
        "chunk_over_store": medians("head + loss", "chunk", "store"),
        "chunk_peak_over_logits": {f"tp{r['tensor']}": round(peak(r), 3) for r in results},
        "k128_over_k0": medians("head + loss", "store, K=128", "store, K=0"),
        "k128_over_k0_loss_op": medians("loss op", "ours, K=128", "ours, K=0"),
    }


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192 if gpu else 2048)
    parser.add_argument("--hidden", type=int, default=2048 if gpu else 256)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--tensor", type=int, nargs="+", default=[1] if gpu else [1, 2], help="TP sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    results = []
    for tensor in arguments.tensor:
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(rank_main, (tensor, free_port(), arguments, queue), nprocs=tensor)
        result = queue.get()
        result["d_hidden"] = arguments.tokens * arguments.hidden * (2 if gpu else 4)
        print("\n".join(table(result, arguments.hidden)), flush=True)
        results.append(result)
    if arguments.json:
        print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()

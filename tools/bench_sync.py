"""Measures a weight sync from trainer ranks to a real vLLM, shard to shard, beside gather-then-broadcast and a memcpy.

    python tools/bench_sync.py [--gib 1] [--json]

Two ranks (TP 2 x EP 2, processes over gloo, parameters as Megatron's layout has them) and a vLLM server of two workers
(TP 2), on one machine. Every round syncs new numbers both ways, taking turns; a way's time is from the first byte until
the engine has put them in use. Gather-then-broadcast: rank 0 collects whole tensors bucket by bucket and broadcasts
them to the workers, which keep their share. At the end the parameters of the workers are compared with those that
vLLM's own loaders make of the same numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from torch import Tensor

from megatron_dppo.architecture import load_architecture
from megatron_dppo.control import connect_store
from megatron_dppo.job.engine_server import wait_ready
from megatron_dppo.job.processes import free_port, start
from megatron_dppo.rollout.vllm.server import server_command, server_env
from megatron_dppo.weights.hub_files import HubFiles, TensorInfo, header_bytes, typed
from megatron_dppo.weights.layout import Box, Parallel, megatron_layout, parameter_shapes
from megatron_dppo.weights.mapping import hub_dtypes, hub_shapes
from megatron_dppo.weights.plan import sync_plan
from megatron_dppo.weights.transfer import MOST_OVERHEAD_BYTES, Sender, join_as_rank, messages, publish
from megatron_dppo.weights.update import GroupUpdate

TRAINER = Parallel(tensor=2, expert=2, ranks=2)
WORKERS = 2
BUCKET_BYTES = 64 << 20
OVERHEAD_BYTES = MOST_OVERHEAD_BYTES * TRAINER.ranks  # of a bucket
GIB = 1 << 30
TIMEOUT = timedelta(seconds=120)
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def numbers(name: str, info: TensorInfo, seed: int) -> Tensor:
    """A tensor of the model after update number `seed`; every process makes the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.empty(info.shape, dtype=info.dtype).uniform_(-0.05, 0.05, generator=generator)


def buckets_of(tensors: Mapping[str, TensorInfo], nbytes: int) -> Iterator[list[tuple[str, int]]]:
    """Whole tensors by their place in a buffer, in buckets of about `nbytes`."""
    bucket: list[tuple[str, int]] = []
    end = 0
    for name, info in tensors.items():
        if bucket and end + info.nbytes > nbytes:
            yield bucket
            bucket, end = [], 0
        bucket.append((name, end))
        end += info.nbytes
    yield bucket


def write_model(path: Path, gib: float) -> None:
    """A model of about that size with the numbers of update 0, and a tokenizer that a server can load."""
    path.mkdir()
    for layers in range(1, 100):
        (path / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": layers}))
        shapes = hub_shapes(load_architecture(path))
        tensors = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
        if sum(info.nbytes for info in tensors.values()) >= gib * GIB:
            break
    with (path / "model.safetensors").open("wb") as out:
        out.write(header_bytes(tensors))
        for name, info in tensors.items():
            out.write(numbers(name, info, 0).numpy().data)
    Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>")).save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


class Rank:
    """A trainer rank: its parameters, and both ways of sending them."""

    def __init__(self, number: int, model: Path, address: str, update: GroupUpdate, boxes: list[list[Box]]) -> None:
        arch = load_architecture(model)
        self.number, self.tensors = number, dict(HubFiles(model).tensors)
        self.pieces = [list(megatron_layout(arch, TRAINER, rank)) for rank in range(TRAINER.ranks)]
        self.store, self.update = connect_store(address, TIMEOUT.total_seconds()), update
        self.plan = sync_plan(
            self.pieces, boxes, hub_dtypes(arch, "float32"), bucket_bytes=BUCKET_BYTES - OVERHEAD_BYTES
        )
        self.sender: Sender | None = None
        self.ranks: Any = None
        self.group: Any = None
        self.parameters: dict[str, Tensor] = {}

    def fill(self, seed: int) -> None:
        """The numbers of update `seed`."""
        for name, shape in parameter_shapes(self.pieces[self.number]).items():
            self.parameters.setdefault(name, torch.zeros(shape))
        last = ""
        for piece in sorted(self.pieces[self.number], key=lambda piece: piece.tensor):
            if piece.tensor != last:
                whole, last = numbers(piece.tensor, self.tensors[piece.tensor], seed), piece.tensor
            self.parameters[piece.param][piece.local_index] = whole[piece.hub_index]

    def shards(self) -> None:
        """Shard to shard."""
        if self.sender is None:
            channels = join_as_rank(self.store, self.update, self.number, WORKERS, torch.device("cpu"))
            self.sender = Sender(self.plan, self.number, channels, TRAINER.ranks)
        self.sender.send(self.parameters)

    def broadcast(self) -> None:
        """Gather to rank 0, broadcast from there; a bucket after the other."""
        if self.ranks is None:
            self.ranks = dist.ProcessGroupGloo(dist.PrefixStore("gather", self.store), self.number, 2, TIMEOUT)
            if self.number == 0:
                prefixed = dist.PrefixStore("broadcast", self.store)
                self.group = dist.ProcessGroupGloo(prefixed, 0, WORKERS + 1, TIMEOUT)
            self.of_tensor: list[dict[str, list[Any]]] = [{} for _ in range(TRAINER.ranks)]
            for rank, pieces in enumerate(self.pieces):
                for piece in pieces:
                    if piece.replica == 0:
                        self.of_tensor[rank].setdefault(piece.tensor, []).append(piece)
        for bucket in buckets_of(self.tensors, BUCKET_BYTES):
            last, start = bucket[-1]
            buffer = torch.empty(start + self.tensors[last].nbytes, dtype=torch.uint8)
            whole = {
                name: typed(buffer[at:], self.tensors[name].dtype, self.tensors[name].shape) for name, at in bucket
            }
            sent = [piece for name, _ in bucket for piece in self.of_tensor[1].get(name, ())]
            sizes = [whole[piece.tensor][piece.hub_index].numel() for piece in sent]
            message = torch.empty(sum(sizes))
            if self.number == 1:
                for piece, part in zip(sent, message.split(sizes), strict=True):
                    local = self.parameters[piece.param][piece.local_index]
                    part.view(local.shape).copy_(local)
                self.ranks.send([message], 0, 0).wait()
                continue
            arriving = self.ranks.recv([message], 1, 0)
            for name, _ in bucket:
                for piece in self.of_tensor[0].get(name, ()):
                    whole[name][piece.hub_index] = self.parameters[piece.param][piece.local_index]
            arriving.wait()
            for piece, part in zip(sent, message.split(sizes), strict=True):
                target = whole[piece.tensor][piece.hub_index]
                target.copy_(part.view(target.shape))
            self.group.broadcast(buffer, 0).wait()


def rank_main(pipe: Connection, *arguments: Any) -> None:
    """Does what it is told until there is no more."""
    torch.set_num_threads(1)
    rank = Rank(*arguments)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            way, *rest = pipe.recv()
            getattr(rank, way)(*rest)
            pipe.send(rank.sender.staging_bytes if rank.sender else 0)


class Engine:
    """The server, by HTTP."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=600.0, trust_env=False)

    def post(self, path: str, body: Any = None) -> Any:
        """Raises RuntimeError for an answer that is an error."""
        answer = self._http.post(path, json=body)
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(f"{path}: {answer.text:.300}")
        return answer.json() if answer.content else None

    def ask(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """What each worker answers."""
        results = self.post("/collective_rpc", {"method": method, "args": list(args)})["results"]
        if errors := [result["error"] for result in results if "error" in result]:
            raise RuntimeError(f"{method}: {errors}")
        return list(results)

    def update(self, update: GroupUpdate) -> None:
        """Shard to shard."""
        self.post("/start_weight_update")
        self.post("/update_weights", {"update_info": {"version": update.version, "group": update.as_json()}})
        self.ask("mdppo_fault")
        self.post("/finish_weight_update", {"weight_version": str(update.version)})
        self.ask("mdppo_fault")


def measure(gib: float, rounds: int, root: Path) -> dict[str, Any]:
    """Everything; the processes end with it."""
    model = root / "model"
    write_model(model, gib)
    port = free_port()
    argv = server_command(
        model, port=port, cpu=True, dtype="float32", max_num_seqs=8, max_model_len=64, tensor_parallel_size=WORKERS,
        extra=["--worker-extension-cls", "bench_sync_worker.BenchExtension"],
    )  # fmt: skip
    env = server_env(cpu=True, cache_root=root / "cache")
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    server = start("vllm", argv, env=env, log_path=root / "server.log")
    ranks: list[Any] = []
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, server, 600.0)
        engine = Engine(url)
        engine.post("/pause?mode=wait")
        answers = sorted(engine.ask("mdppo_boxes"), key=lambda answer: answer["worker"])
        boxes = [[*map(Box.from_json, answer["boxes"])] for answer in answers]
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        address = f"127.0.0.1:{store.port}"
        pieces = [list(megatron_layout(load_architecture(model), TRAINER, rank)) for rank in range(TRAINER.ranks)]
        dtypes = hub_dtypes(load_architecture(model), "float32")
        plan = sync_plan(pieces, boxes, dtypes, bucket_bytes=BUCKET_BYTES - OVERHEAD_BYTES)
        publish(store, plan)
        update = GroupUpdate(1, address, plan.digest(), 1, TRAINER.ranks, timeout_s=TIMEOUT.total_seconds())
        context = mp.get_context("spawn")
        for number in range(TRAINER.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_main, args=(theirs, number, model, address, update, boxes))
            process.start()
            ranks.append((process, ours))
        for _, pipe in ranks:
            pipe.recv()
        result = _rounds(engine, ranks, update, rounds, address)
    finally:
        for process, pipe in ranks:
            pipe.close()
            process.join(5.0)
            process.kill()
        server.stop()
    total = sum(info.nbytes for info in HubFiles(model).tensors.values())
    wire = sum(
        message.nbytes
        for worker in range(WORKERS)
        for bucket in messages(plan.select(dst=worker))
        for message in bucket
    )
    return result | {
        "gib": total / GIB,
        "memcpy": _memcpy(total, rounds),
        "wire_over_minimum": wire / int(plan.kept_bytes.sum()),
        "buckets": plan.num_buckets,
    }


def _rounds(engine: Engine, ranks: list[Any], update: GroupUpdate, rounds: int, address: str) -> dict[str, Any]:
    """Both ways in turns, after one round that is not counted (it opens channels)."""
    seconds: dict[str, list[float]] = {"shards": [], "broadcast": []}
    ways = {
        "shards": lambda: engine.update(update),
        "broadcast": lambda: engine.ask("bench_broadcast", address, "broadcast", BUCKET_BYTES),
    }

    def order(*what: Any) -> list[int]:
        for _, pipe in ranks:
            pipe.send(what)
        return [pipe.recv() for _, pipe in ranks]

    states: list[Any] = []
    staging = 0
    with ThreadPoolExecutor(1) as pool:
        for number in range(rounds + 1):
            for way, receive in ways.items():
                order("fill", number + 1)
                started = time.perf_counter()
                receiving = pool.submit(receive)
                staging = max(staging, *order(way))
                receiving.result()
                if number:
                    seconds[way].append(time.perf_counter() - started)
                state = engine.ask("bench_state")
                staging = max(staging, *(worker["staging_bytes"] for worker in state))
                states.append([worker["crc32"] for worker in state])
    engine.ask("bench_load", rounds + 1)
    loaded = [worker["crc32"] for worker in engine.ask("bench_state")]
    exact = all(a == b for a, b in zip(states[::2], states[1::2], strict=True)) and states[-1] == loaded
    exact &= len({tuple(state) for state in states}) == rounds + 1  # every round brought other numbers
    return {"seconds": seconds, "staging_buckets": staging / BUCKET_BYTES, "bit_exact": exact}


def _memcpy(nbytes: int, rounds: int) -> list[float]:
    """Seconds to copy the bytes of the model once, in one thread."""
    torch.set_num_threads(1)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(arguments.gib, arguments.rounds, Path(directory))
    seconds = found["seconds"]
    medians = {name: statistics.median(times) for name, times in seconds.items()} | {
        "memcpy": statistics.median(found["memcpy"])
    }
    ratios = [b / s for b, s in zip(seconds["broadcast"], seconds["shards"], strict=True)]
    print(
        f"{found['gib']:.2f} GiB, {found['buckets']} buckets of {BUCKET_BYTES >> 20} MiB, "
        f"bit-exact: {found['bit_exact']}"
    )
    for name, median in medians.items():
        spread = sorted(seconds.get(name, found["memcpy"]))
        print(f"  {name:10}{median:8.3f} s  ({spread[0]:.3f}-{spread[-1]:.3f})")
    print(f"  broadcast over shards {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    if arguments.json:
        result = {
            "wire_over_minimum": round(found["wire_over_minimum"], 5),
            "staging_buckets": round(found["staging_buckets"], 4),
            "speedup_over_gather_broadcast": round(statistics.median(ratios), 3),
            "seconds": {name: round(median, 4) for name, median in medians.items()},
            "bit_exact": found["bit_exact"],
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Measures conversion between a Hugging Face directory and a Megatron checkpoint, beside a plain copy.

    python tools/bench_convert.py --gib 6 [--json]

Makes a random checkpoint of Qwen3-30B-A3B's shape with as many layers as come nearest to the size, and converts it to
Megatron and back. Every measurement is a process of its own, which does its work alone and flushes it to the disk
(fsync); copy, import and export take turns, and a ratio is the median over the rounds of the ratio within a round. The
peak is VmHWM, the most memory resident at once, interpreter and torch included.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_dppo.architecture import load_architecture
from megatron_dppo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_dppo.weights.hub_files import INDEX_FILE, TensorInfo, header_bytes
from megatron_dppo.weights.mapping import hub_shapes
from megatron_dppo.weights.megatron_files import open_checkpoint
from megatron_dppo.weights.verify import differences

GIB = 1 << 30
SHARD_BYTES = 4 * GIB
COPY_BYTES = 16 << 20
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_random(path: Path, gib: float) -> None:
    """Random bits under the names of the model, in shards with an index, block by block."""
    path.mkdir()
    tensors: dict[str, TensorInfo] = {}
    for layers in range(1, 49):
        (path / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": layers}))
        candidate = {n: TensorInfo(torch.bfloat16, s) for n, s in hub_shapes(load_architecture(path)).items()}
        size, known = (sum(t.nbytes for t in some.values()) for some in (candidate, tensors))
        if tensors and abs(size - gib * GIB) > abs(known - gib * GIB):
            (path / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": layers - 1}))
            break
        tensors = candidate
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) + info.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = info
    noise = torch.randint(0, 256, (COPY_BYTES * 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (path / file).open("wb") as out:
            out.write(header_bytes(shard))
            for number, info in enumerate(shard.values()):
                for start in range(0, info.nbytes, COPY_BYTES):
                    shift = (number * 7919 + start // COPY_BYTES * 104729) % COPY_BYTES  # no two tensors are alike
                    out.write(noise[shift : shift + min(COPY_BYTES, info.nbytes - start)].numpy().data)
            os.fsync(out.fileno())
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def copy(source: Path, destination: Path) -> None:
    """Every file, through one buffer of 16 MiB, flushed."""
    destination.mkdir()
    buffer = memoryview(bytearray(COPY_BYTES))
    for file in sorted(p for p in source.iterdir() if p.is_file()):
        with file.open("rb", buffering=0) as read, (destination / file.name).open("wb", buffering=0) as write:
            while count := read.readinto(buffer):
                write.write(buffer[:count])
            os.fsync(write.fileno())


def import_(source: Path, destination: Path) -> None:
    """Hugging Face to Megatron."""
    hf_to_megatron(source, destination, say=lambda _: None)


def export(source: Path, destination: Path) -> None:
    """Megatron to Hugging Face."""
    megatron_to_hf(source, destination, say=lambda _: None)


def alone(work: Callable[[Path, Path], None], source: Path, destination: Path) -> tuple[float, float]:
    """Seconds and peak GiB of `work` in a process of its own."""
    if destination.exists():
        shutil.rmtree(destination)
    context = mp.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (work, source, destination))


def _measured(work: Callable[[Path, Path], None], source: Path, destination: Path) -> tuple[float, float]:
    torch.set_num_threads(1)
    start = time.perf_counter()
    work(source, destination)
    seconds = time.perf_counter() - start
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return seconds, int(line.split()[1]) / (1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=6.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, help="where to work (four times the size); a temporary directory if not given"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        root = Path(directory)
        source = root / "source"
        write_random(source, arguments.gib)
        size = sum(f.stat().st_size for f in source.glob("*.safetensors")) / GIB
        steps: dict[str, tuple[Callable[[Path, Path], None], Path, Path]] = {
            "copy": (copy, source, root / "copy"),
            "import": (import_, source, root / "megatron"),
            "export": (export, root / "megatron", root / "back"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        peaks: dict[str, float] = dict.fromkeys(steps, 0.0)
        for _ in range(arguments.rounds):
            for name, (work, start, goal) in steps.items():
                taken, peak = alone(work, start, goal)
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], peak)
        exact = not any(differences(open_checkpoint(source), open_checkpoint(root / "back")))

    layers = round((size * GIB - 2 * 151936 * 2048 * 2) / (128 * 3 * 768 * 2048 * 2))
    print(f"{size:.2f} GiB, {layers} layers of Qwen3-30B-A3B, bfloat16; bit-exact there and back: {exact}")
    print(f"  {'':8}{'seconds':>9}{'GiB/s':>8}{'over copy':>11}{'spread':>13}{'peak GiB':>10}")
    ratios = {}
    for name, of_rounds in seconds.items():
        over = sorted(c / t for c, t in zip(seconds["copy"], of_rounds, strict=True))
        ratios[name] = round(statistics.median(over), 3)
        middle = statistics.median(of_rounds)
        spread = f"{over[0]:.2f}-{over[-1]:.2f}"
        print(f"  {name:8}{middle:9.2f}{size / middle:8.2f}{ratios[name]:11.2f}{spread:>13}{peaks[name]:10.2f}")
    if arguments.json:
        result = {
            "gib": round(size, 3),
            "import_over_copy": ratios["import"],
            "export_over_copy": ratios["export"],
            "peak_rss_gib": round(max(peaks["import"], peaks["export"]), 3),
            "bit_exact": exact,
        }
        assert all(math.isfinite(v) for v in result.values())
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The command as a user runs it: launcher, vLLM server, client and two ranks; what it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_dppo.data.addition import sample_problems, write_problems
from megatron_dppo.job.engine_server import wait_ready
from megatron_dppo.job.processes import free_port, start, stop_on_exit
from tests.engines.kinds import KIND
from tests.tiny_models import randomize
from tools.make_quickstart_input import write_initial_model

DEADLINE_S = 400.0
RUN_NAME = f"job{os.getpid()}"  # so that another test run on this machine is not taken for ours


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that runs already, with a model that no run trains."""
    model = tmp_path_factory.mktemp("served") / "model"
    write_initial_model(model, seed=2)
    port = free_port()
    argv, env = KIND.server(request.config, model, port, max_model_len=64)
    with stop_on_exit() as children:
        children.append(start("engine", argv, env=env, log_path=model.parent / "engine.log"))
        wait_ready(f"http://127.0.0.1:{port}", children[0], DEADLINE_S)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A short job on the quickstart's model, untrained: four groups of four samples, two gradient steps each."""
    import random

    write_initial_model(tmp_path / "model", seed=1)
    rng = random.Random(0)
    write_problems(tmp_path / "train.jsonl", sample_problems(rng, 50, held_out=False))
    write_problems(tmp_path / "heldout.jsonl", sample_problems(rng, 8, held_out=True))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "größe", "answer": "1"}\n{"prompt": "", "answer": "1"}\nnot json\n')
    config = {
        "run": {"name": RUN_NAME, "dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "parallel": {"tensor": 2, "expert": 2, "ranks": 2},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": str(tmp_path / "heldout.jsonl"),
            "max_prompt_tokens": 16,
        },
        "reward": {"name": "final_answer"},
        "rollout": {
            "engine": KIND.name,
            "dtype": "float32",
            "max_response_tokens": 6,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "log_topk": 3,
            "max_retries": 1,
        },
        "training": {"steps": 2, "minibatches": 2, "micro_batch_tokens": 64, "lr": 1e-3},
        "evaluation": {"prompts": 8},
        # An untrained model earns no reward: it is the entropy that moves the weights.
        "loss": {"entropy_coefficient": 0.5},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "megatron_dppo.cli", "train", str(recipe), *overrides]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def descendants(pid: int) -> dict[int, str]:
    """Living descendants of `pid`, with their command lines."""
    found: dict[int, str] = {}
    queue = [pid]
    while queue:
        parent = queue.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                queue.append(child)
    return found


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert job.poll() is None, f"the job ended early:\n{job.stdout.read() if job.stdout else ''}"
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.2)


def steps_done(recipe: Path) -> int:
    path = recipe.parent / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def shared_directories() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"megatron_dppo-{RUN_NAME}-*")}


def assert_gone(pids: dict[int, str]) -> None:
    left = {pid: name for pid, name in pids.items() if Path(f"/proc/{pid}").exists()}
    assert not left, f"still running: {left}"


WAYS = [("group", "rollout"), *([("auto", "off")] if "MDPPO_ALL_PAIRS" in os.environ else [])]  # the quickstart is auto


@pytest.mark.parametrize(("transport", "mode"), WAYS)
def test_a_whole_run_and_what_it_leaves(recipe: Path, transport: str, mode: str) -> None:
    job = command(recipe, f"sync.transport={transport}", f"routing.mode={mode}")
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, output
    run = recipe.parent / "run"

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records[:2]:
        assert record["tokens"] > 0 and record["grad_norm"] > 0
        assert record["mismatch"] < 1e-5  # fp32 on both sides, same weights: the engine did take every version
        assert 0 <= record["topk_tv"] <= 1 and record["divergence"] <= record["topk_tv"] + 1e-6
        assert {"seconds/generate", "seconds/update_engines", "seconds/train"} <= record.keys()
        if mode == "rollout":  # what is replayed is what routers choose anyway
            assert record["route_agreement"] > 0.999 and record["routes_invalid_share"] == 0
            assert record["route_bytes_per_token"] == 4  # two of at most 256 experts in two layers
    assert {"eval/accuracy_greedy", "eval/accuracy_sampled"} <= records[0].keys() & records[2].keys()

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tp"], summary["ep"], summary["engine"]) == (2, 2, 2, KIND.name)
    assert summary["objective"] == "dppo_binary_tv" and summary["engine_version"] and summary["seconds"] > 0
    assert (run / "learning_curve.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir()) and (run / "resolved.yaml").is_file()
    assert "50 prompts taken, 3 refused: 1 cannot be tokenised (lines 51); 1 empty prompt (lines 52)" in output
    assert "trainer: cpu over gloo, layers of torch, Adam of torch" in output
    assert "held-out accuracy" in output and "mask A<0" in output

    trained, initial = (load_file(path / "model.safetensors") for path in (run / "model", recipe.parent / "model"))
    assert trained.keys() == initial.keys()
    assert all(not torch.equal(trained[name], initial[name]) for name in initial if "experts" not in name)
    assert records[1]["entropy"] > records[0]["entropy"]
    from transformers import AutoTokenizer, Qwen3MoeForCausalLM

    Qwen3MoeForCausalLM.from_pretrained(run / "model")
    AutoTokenizer.from_pretrained(run / "model")
    assert not shared_directories()


def test_ctrl_c_leaves_nothing_running(recipe: Path) -> None:
    job = command(recipe, "training.steps=1000")
    wait_until(lambda: steps_done(recipe) >= 1, job)
    family = descendants(job.pid)
    assert sum("megatron_dppo.trainer" in name for name in family.values()) >= 2
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 130 and "interrupted" in output
    assert_gone(family)
    assert not shared_directories()


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("megatron_dppo.trainer", r"failed: rank \d ended with code 137 \(SIGKILL\)"),
        ("megatron_dppo.rollout.client", r"failed: rollout client ended with code 137 \(SIGKILL\)"),
        # whichever is noticed first: the server's end, or that it does not answer
        (KIND.process, r"failed: engine ended with code 137|EngineUnreachable: engine http://127.0.0.1:\d+: "),
    ],
)
def test_a_process_that_dies_ends_the_job(recipe: Path, server: str, victim: str, message: str) -> None:
    engine = [] if victim == KIND.process else [f"rollout.urls=[{server}]"]
    job = command(recipe, "training.steps=1000", *engine)
    wait_until(lambda: steps_done(recipe) >= 1, job)
    family = descendants(job.pid)
    pids = [pid for pid, name in family.items() if victim in name and "job/processes.py" not in name]
    os.kill(pids[-1], signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1, output
    assert re.search(message, output), output
    assert_gone(family)
    assert not shared_directories()


def test_a_killed_run_goes_on_where_it_was(recipe: Path, server: str) -> None:
    """A rank is killed after a few steps; `resume=auto` goes on from the last checkpoint, at another layout. The engine
    outlives it, as it was left."""
    engine = f"rollout.urls=[{server}]"
    job = command(recipe, engine, "training.steps=1000", "checkpoint.every=2")
    run = recipe.parent / "run"
    wait_until(lambda: (run / "checkpoints" / "step-000004" / "training.json").is_file(), job)
    family = descendants(job.pid)
    ranks = [p for p, name in family.items() if "megatron_dppo.trainer" in name and "job/processes.py" not in name]
    os.kill(ranks[0], signal.SIGKILL)
    job.communicate(timeout=60)
    assert_gone(family)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    last = int(kept[-1].removeprefix("step-").removesuffix(".tmp"))
    layout = ["parallel.tensor=1", "parallel.pipeline=2", "parallel.expert=1"]
    steps = f"training.steps={last + 3}"
    job = command(recipe, engine, steps, "checkpoint.every=2", "resume=auto", *layout)
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(last + 4))
    assert all(record["mismatch"] < 1e-5 for record in records[:-1])
    assert not list(run.glob("previous-*"))
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(left) == 2 and all(not name.endswith(".tmp") for name in left)

    job = command(recipe, engine, steps, "resume=auto", "run.seed=5")
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 1 and "resume: run.seed: got 5, expected the checkpoint's 0" in output


def test_rollouts_ahead_of_training(recipe: Path, server: str) -> None:
    """With a staleness of one, responses are sampled while ranks train, and held over each update; a killed run goes on
    with the batches that had been waiting."""
    ahead = [
        f"rollout.urls=[{server}]",
        "rollout.max_staleness=1",
        "rollout.max_response_tokens=40",
        "checkpoint.every=1",
    ]
    sizes = ["training.micro_batch_tokens=256", "training.lr=1e-5"]
    run = recipe.parent / "run"
    job = command(recipe, "training.steps=1000", *ahead, *sizes)
    wait_until(lambda: steps_done(recipe) >= 3, job)
    family = descendants(job.pid)
    client = [p for p, name in family.items() if "rollout.client" in name and "job/processes.py" not in name]
    os.kill(client[0], signal.SIGKILL)
    job.communicate(timeout=60)
    assert_gone(family)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["staleness_max"] for record in records] == [0] + [1] * (len(records) - 1)
    assert all(record["too_old"] == 0 and record["mismatch"] < 0.01 for record in records)

    output, _ = command(recipe, f"training.steps={len(records) + 1}", "resume=auto", *ahead, *sizes).communicate()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(len(records))), output
    assert all(record["staleness_max"] <= 1 for record in records[:-1])


def test_experts_of_the_engine_are_replayed(recipe: Path) -> None:
    """In bf16 routers of engine and trainer do not agree on a model that decides badly: replay brings them nearer."""
    from transformers import Qwen3MoeForCausalLM

    write_initial_model(recipe.parent / "model", seed=1, num_layers=8)
    model = Qwen3MoeForCausalLM.from_pretrained(recipe.parent / "model")
    randomize(model, seed=1, logit_scale=5.0)
    model.save_pretrained(recipe.parent / "model")
    replay = ["routing.mode=rollout", "routing.measure_every=1", "rollout.max_response_tokens=40"]
    sizes = ["training.micro_batch_tokens=512", "model.dtype=bfloat16", "rollout.dtype=bfloat16"]
    sizes += ["rollout.samples_per_prompt=16"]
    job = command(recipe, *replay, *sizes)
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, output
    run = recipe.parent / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:2]
    for record in records:
        assert {f"route_agreement/{layer}" for layer in range(8)} <= record.keys()
        assert 0.9 < record["route_agreement"] < 1
    replayed, without = (sum(r[name] for r in records) for name in ("mismatch", "mismatch_without_replay"))
    assert 2 * replayed < without


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=dppo_topk_kl", "objective.top_k=4", "rollout.log_topk=0"],
        ["objective.name=minirl_tis", "parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=2"],
        ["objective.name=dppo_topk_tv_decoupled", "objective.top_k=4", "rollout.log_topk=0", "parallel.tensor=1"],
    ],
    ids=["topk_kl-tp2_ep2", "minirl_tis-pp2", "topk_tv_decoupled-dp2_ep2"],
)
def test_runs_one_after_another_on_a_server_of_ones_own(recipe: Path, server: str, overrides: list[str]) -> None:
    """The server has the last run's weights: each run first gives it its own."""
    job = command(recipe, f"rollout.urls=[{server}]", "rollout.temperature=1.3", *overrides)
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, output
    records = [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(record["mismatch"] < 1e-5 for record in records[:2])

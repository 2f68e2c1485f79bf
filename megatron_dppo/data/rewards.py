"""Rewards: from a response's text to numbers.

A reward returns `reward` (what the advantage is made of) and numbers beside it for the metrics, all in [0,
1]: `accuracy`, `format` (an answer was there to check) and, for `math`, `unchecked`. A response that did not
end by itself (`finish_reason` other than "stop") has no final answer and gets 0.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_dppo.config import FinalAnswerReward, MathReward

Reward = Callable[[str, str, str], dict[str, float]]
"""`(response text, answer, finish_reason) -> {"reward": ..., ...}`; safe to call from several threads.

The text is the response decoded without special tokens (`skip_special_tokens=True`)."""

WORKER_MODULE = "megatron_dppo.data.math_worker"
FINISHED = "stop"  # the engine's finish_reason of a response that ended with the end-of-text token


def make_reward(config: FinalAnswerReward | MathReward) -> Reward:
    """The reward that the config's `reward` section names."""
    if config.name == "final_answer":
        return FinalAnswer(config.marker)
    return MathAnswer(config.timeout_s, config.workers)


class FinalAnswer:
    """1 where the text after the last marker equals the answer, exactly."""

    def __init__(self, marker: str):
        self.marker = marker

    def __call__(self, response: str, answer: str, finish_reason: str) -> dict[str, float]:
        """See `Reward`."""
        _, marker, given = response.rpartition(self.marker)
        has_answer = bool(marker) and finish_reason == FINISHED
        correct = float(has_answer and given == answer)
        return {"reward": correct, "accuracy": correct, "format": float(has_answer)}


class MathAnswer:
    """1 where math-verify finds the response's answer equal to the expected one.

    Checks run in worker processes, started on first use, each ended by the kernel after `timeout_s` seconds
    of CPU on one answer (`math_worker.py`). A response that cannot be parsed is wrong. So is one that could
    not be checked within a worker's time and memory, or whose expected answer cannot be parsed: `unchecked`
    counts those. `close` ends the workers; so does the end of this process.
    """

    def __init__(self, timeout_s: float, workers: int):
        self.timeout_s = timeout_s
        self._idle: queue.SimpleQueue[subprocess.Popen[str] | None] = queue.SimpleQueue()
        self._num_workers = workers
        for _ in range(workers):
            self._idle.put(None)  # None: started when it is first needed

    def __call__(self, response: str, answer: str, finish_reason: str) -> dict[str, float]:
        """See `Reward`."""
        if finish_reason != FINISHED:
            return {"reward": 0.0, "accuracy": 0.0, "format": 0.0, "unchecked": 0.0}
        worker = self._idle.get()
        try:
            worker = worker or _start_worker()
            reply = _ask(worker, json.dumps([response, answer, self.timeout_s]))
        except BaseException:
            if worker is not None:
                worker.kill()  # or its late reply would be taken for the next answer's
            self._idle.put(None)
            raise
        self._idle.put(None if reply is None else worker)
        if reply is None:
            return {"reward": 0.0, "accuracy": 0.0, "format": 0.0, "unchecked": 1.0}
        correct, unchecked = float(reply["correct"]), float(not reply["checked"])
        return {
            "reward": correct,
            "accuracy": correct,
            "format": float(reply["parsed"]),
            "unchecked": unchecked,
        }

    def close(self) -> None:
        """Ends the workers, waiting for the answers they are at."""
        for _ in range(self._num_workers):
            worker = self._idle.get()
            if worker is not None:
                worker.communicate()
            self._idle.put(None)


def _start_worker() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", WORKER_MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # math-verify logs every answer it cannot parse
        text=True,
        encoding="utf-8",
    )


def _ask(worker: subprocess.Popen[str], question: str) -> dict[str, bool] | None:
    """The worker's reply, or None when the question ended it: the alarm, or no memory."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(question + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if line:
        return dict(json.loads(line))
    worker.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # what was left in its buffer
        worker.stdin.close()
    code = worker.wait()
    if code >= 0:  # not ended by a signal: it could not start, or gave up
        raise RuntimeError(f"math answer worker: ended with exit code {code}; try python -m {WORKER_MODULE}")
    return None

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_dppo.config import FinalAnswerReward, MathReward
from megatron_dppo.data.rewards import FinalAnswer, MathAnswer, make_reward


@pytest.fixture(scope="module")
def math_answer() -> Iterator[MathAnswer]:
    reward = MathAnswer(timeout_s=1.0, workers=2)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("response", "finish_reason", "reward", "has_answer"),
    [
        ("121306>0632", "stop", 1, 1),
        ("1>2>0632", "stop", 1, 1),  # the last marker counts
        ("121306>632", "stop", 0, 1),
        ("121306>0632 ", "stop", 0, 1),
        ("0632", "stop", 0, 0),
        ("", "stop", 0, 0),
        ("121306>0632", "length", 0, 0),  # not finished
    ],
)
def test_final_answer(response: str, finish_reason: str, reward: float, has_answer: float) -> None:
    scores = FinalAnswer(">")(response, "0632", finish_reason)
    assert scores == {"reward": reward, "accuracy": reward, "format": has_answer}


def test_the_config_names_the_reward() -> None:
    reward = make_reward(FinalAnswerReward(name="final_answer", marker="####"))
    assert reward("so #### 7", " 7", "stop")["reward"] == 1
    checked = make_reward(MathReward(name="math", timeout_s=2, workers=1))
    assert isinstance(checked, MathAnswer)
    assert checked("7", "7", "length")["reward"] == 0  # starts no worker
    checked.close()


@pytest.mark.parametrize(
    ("response", "answer", "reward", "parsed", "unchecked"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1, 1, 0),
        ("The answer is $1+x$.", "x+1", 1, 1, 0),
        ("Add both.\nAnswer: $34$", "34", 1, 1, 0),  # as DAPO-Math's prompts ask
        (r"so \boxed{34}.", "034", 1, 1, 0),  # AIME's
        (r"\boxed{7}", r"We find $x = \boxed{7}$.", 1, 1, 0),  # MATH's solutions
        (r"\boxed{8}", r"We find $x = \boxed{7}$.", 0, 1, 0),
        (r"\boxed{3}", "4", 0, 1, 0),
        ("I do not know.", "4", 0, 0, 0),
        (r"\boxed{3}", r"\text{}", 0, 1, 1),  # the expected answer is none
    ],
)
def test_math(
    math_answer: MathAnswer, response: str, answer: str, reward: float, parsed: float, unchecked: float
) -> None:
    scores = math_answer(response, answer, "stop")
    assert scores == {"reward": reward, "accuracy": reward, "format": parsed, "unchecked": unchecked}


def test_answers_that_never_end_are_wrong_in_time_and_threads_go_on(math_answer: MathAnswer) -> None:
    endless, sound = r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}"
    start = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        scores = list(threads.map(lambda r: math_answer(r, "4", "stop"), [endless, sound, endless, sound]))
    assert [s["reward"] for s in scores] == [0, 1, 0, 1]
    assert [s["unchecked"] for s in scores] == [1, 0, 1, 0]
    assert time.monotonic() - start < 60  # without a limit they would never end


def test_close_ends_the_workers_and_they_start_again_when_asked() -> None:
    reward = MathAnswer(timeout_s=5.0, workers=1)
    assert reward("4", "4", "stop")["reward"] == 1
    worker = reward._idle.get()
    assert isinstance(worker, subprocess.Popen) and worker.poll() is None
    reward._idle.put(worker)
    reward.close()
    assert worker.poll() == 0
    assert reward("4", "4", "stop")["reward"] == 1
    reward.close()

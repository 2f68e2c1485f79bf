from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_dppo.data import addition


def solution(a: int, b: int) -> str:
    return addition.teacher(a, b, forget=0.0, rng=random.Random(0))


def test_the_example_of_the_task() -> None:
    assert addition.prompt_text(347, 285) == "754832="
    assert solution(347, 285) == "121306>0632$"
    assert addition.answer(347, 285) == "0632"


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 0, "000000>0000$"), (999, 999, "181919>1998$")])
def test_solutions_at_the_edges(a: int, b: int, expected: str) -> None:
    assert solution(a, b) == expected


def test_a_teacher_that_forgets_every_carry_but_the_last() -> None:
    rng = random.Random(0)
    assert addition.teacher(347, 285, forget=1.0, rng=rng) == "121205>0522$"
    assert addition.teacher(947, 285, forget=1.0, rng=rng) == "121211>1122$"


def test_the_teacher_forgets_a_carry_with_the_given_probability() -> None:
    rng = random.Random(1)
    texts = [addition.teacher(5, 5, forget=0.7, rng=rng) for _ in range(2000)]  # one carry
    assert set(texts) == {"100100>0010$", "100000>0000$"}
    assert 0.67 < texts.count("100000>0000$") / 2000 < 0.73


def test_problems_outside_the_task_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1000, expected 0..999"):
        solution(1000, 1)


def test_a_tenth_is_held_out_and_never_sampled_for_training() -> None:
    rng = random.Random(0)
    held_out = sum(addition.is_held_out(rng.randrange(1000), rng.randrange(1000)) for _ in range(20_000))
    assert 0.094 < held_out / 20_000 < 0.106
    train = addition.sample_problems(random.Random(2), 1000, held_out=False)
    test = addition.sample_problems(random.Random(2), 1000, held_out=True)
    assert len(train) == len(test) == 1000
    assert not any(addition.is_held_out(a, b) for a, b in train)
    assert all(addition.is_held_out(a, b) for a, b in test)
    assert train == addition.sample_problems(random.Random(2), 1000, held_out=False)
    # The split must never change: runs and their warm starts are compared across versions.
    assert [b for b in range(40) if addition.is_held_out(0, b)] == [2, 17]


def test_problems_are_written_as_prompts_with_answers(tmp_path: Path) -> None:
    addition.write_problems(tmp_path / "train.jsonl", [(347, 285), (1, 2)])
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"prompt": "754832=", "answer": "0632"}
    assert json.loads(lines[1]) == {"prompt": "120000=", "answer": "0003"}


def test_the_tokenizer_loads_beside_a_model_and_a_token_is_a_character(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    addition.build_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    ids = tokenizer.encode("754832=121306>0632$")
    assert ids == [7, 5, 4, 8, 3, 2, 12, 1, 2, 1, 3, 0, 6, 13, 0, 6, 3, 2, 14]
    assert len(tokenizer) == 16
    assert tokenizer.eos_token_id == 14
    assert tokenizer.decode(ids[7:], skip_special_tokens=True) == "121306>0632"
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("7x")

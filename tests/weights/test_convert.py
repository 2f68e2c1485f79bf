"""Conversion in one process: bit-exact both ways, resumed after a kill, and every fault named before it does harm."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_dppo.cli import app
from megatron_dppo.weights import convert, global_tensors, hub_files
from megatron_dppo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_dppo.weights.megatron_files import open_checkpoint
from megatron_dppo.weights.verify import differences
from tests.tiny_models import (
    deepseek_config,
    hub_tensors,
    llama3_config,
    qwen2_config,
    tiny_config,
    tiny_model,
    write_checkpoint,
)


def quiet(_: str) -> None:
    pass


def written(path: Path, **config: object) -> Path:
    return write_checkpoint(path, tiny_model(tiny_config(**config), seed=4))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("source") / "hf", vocab_size=61)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several data files, several blocks a tensor."""
    monkeypatch.setattr(convert, "FILE_BYTES", 100_000)
    blocks = global_tensors.global_blocks
    monkeypatch.setattr(convert, "global_blocks", lambda arch, scheme, itemsize: blocks(arch, scheme, itemsize, 4000))


@pytest.mark.parametrize("scheme", ["stacked", "per_layer", "singleton"])
def test_a_round_trip_keeps_every_bit(source: Path, tmp_path: Path, scheme: str, small_files: None) -> None:
    hf_to_megatron(source, tmp_path / "megatron", scheme=scheme, say=quiet)  # type: ignore[arg-type]
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=quiet)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    for other in ("megatron", "back"):
        assert list(differences(open_checkpoint(source), open_checkpoint(tmp_path / other))) == []
    original = hub_tensors(source)
    back = hub_tensors(tmp_path / "back")  # by the safetensors package
    assert original.keys() == back.keys() and all(torch.equal(back[n], t) for n, t in original.items())
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    ids = torch.arange(12)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (source, tmp_path / "back")
    ]
    assert torch.equal(*logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "megatron"]  # nothing else is left


FAMILIES = {
    "qwen3_moe": tiny_config(num_layers=3, mlp_only_layers=(1,)),
    "qwen3": tiny_config(num_experts=4, mlp_only_layers=(0, 1)),
    "qwen2": qwen2_config(tie_word_embeddings=True),
    "llama": llama3_config(),
    "deepseek_v3": deepseek_config(),
    "kimi_k2": deepseek_config(q_lora_rank=None, n_shared_experts=1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_of_every_architecture(tmp_path: Path, small_files: None, family: str) -> None:
    model = tiny_model(FAMILIES[family], seed=4)
    source = write_checkpoint(tmp_path / "hf", model, "kimi_k2" if family == "kimi_k2" else None)
    for scheme in ("per_layer", "singleton"):
        hf_to_megatron(source, tmp_path / scheme, scheme=scheme, say=quiet)  # type: ignore[arg-type]
        megatron_to_hf(tmp_path / scheme, tmp_path / f"{scheme}_back", say=quiet)
        original, back = hub_tensors(source), hub_tensors(tmp_path / f"{scheme}_back")
        assert original.keys() == back.keys()
        for name, tensor in original.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_the_dtype_can_change_on_the_way(source: Path, tmp_path: Path) -> None:
    hf_to_megatron(source, tmp_path / "megatron", dtype=torch.bfloat16, say=quiet)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=torch.float32, say=quiet)
    back = hub_tensors(tmp_path / "back")
    for name, tensor in hub_tensors(source).items():
        assert back[name].dtype == torch.float32 and torch.equal(back[name], tensor.bfloat16().float())
    assert json.loads((tmp_path / "megatron" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def test_several_processes_split_the_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "FILE_BYTES", 300_000)
    hf_to_megatron(source, tmp_path / "megatron", workers=2, say=quiet)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", workers=2, say=quiet)
    assert list(differences(open_checkpoint(source), open_checkpoint(tmp_path / "back"))) == []


def test_float8_is_dequantised_on_the_way(tmp_path: Path) -> None:
    """Tiles of 128 x 128 with a factor each; here two by one, the second row of tiles not full."""
    path = written(tmp_path / "hf", intermediate_size=200, mlp_only_layers=(0,))
    tensors = hub_tensors(path)
    name = "model.layers.0.mlp.gate_proj.weight"
    quantised = (tensors[name] * 100).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.01], [0.02]])
    rewrite(path, {**tensors, name: quantised, f"{name}_scale_inv": scale})
    hf_to_megatron(path, tmp_path / "megatron", say=quiet)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=quiet)
    back = hub_tensors(tmp_path / "back")
    expected = quantised.float()
    expected[:128] *= scale[0, 0]
    expected[128:] *= scale[1, 0]
    assert torch.equal(back[name], expected.bfloat16())
    assert f"{name}_scale_inv" not in back


def test_dtypes_that_megatron_has_to_join_are_refused(source: Path, tmp_path: Path) -> None:
    path = shutil.copytree(source, tmp_path / "hf")
    tensors = hub_tensors(path)
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].bfloat16()
    rewrite(path, tensors)
    with pytest.raises(ValueError, match="k_proj.weight torch.bfloat16|k_proj.weight is torch.bfloat16"):
        hf_to_megatron(path, tmp_path / "megatron", say=quiet)
    hf_to_megatron(path, tmp_path / "megatron", dtype=torch.bfloat16, say=quiet)


def in_a_process(job: Callable[[], None]) -> int:
    """The exit code of a fork that does it."""
    if (pid := os.fork()) == 0:
        try:
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("end", ["full_disk", "kill"])
@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_job_that_stopped_goes_on(
    source: Path, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch, direction: str, end: str
) -> None:
    """The third file fails; the second try writes only what is missing, and the result is whole."""
    megatron = tmp_path / "megatron"
    if direction == "to_hf":
        hf_to_megatron(source, megatron, say=quiet)
    run = hf_to_megatron if direction == "to_megatron" else megatron_to_hf
    work = "_write_chunks" if direction == "to_megatron" else "_write_tensors"
    start, goal = (source, megatron) if direction == "to_megatron" else (megatron, tmp_path / "back")
    original, calls = getattr(convert, work), []

    def counted(checkpoint: object, path: Path, **rest: object) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.with_name(path.name + ".tmp").write_bytes(b"half of it")
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "cannot write it: No space left on device")
        original(checkpoint, path, **rest)

    monkeypatch.setattr(convert, work, counted)
    if end == "kill":
        assert in_a_process(lambda: run(start, goal, say=quiet)) == -signal.SIGKILL
    else:
        with pytest.raises(OSError, match="No space left"):
            run(start, goal, say=quiet)
    monkeypatch.setattr(convert, work, original)
    assert not goal.exists()
    said: list[str] = []
    run(start, goal, say=said.append)
    assert said[0] == "going on after 2 files of an earlier try"
    assert not list(goal.rglob("*.tmp"))
    assert list(differences(open_checkpoint(source), open_checkpoint(goal))) == []


def test_another_source_starts_anew(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "megatron.partial"
    partial.mkdir()
    (partial / "plan").write_text("of something else")
    (partial / "__0_0.distcp").write_bytes(b"stale")
    hf_to_megatron(source, tmp_path / "megatron", say=quiet)
    assert list(differences(open_checkpoint(source), open_checkpoint(tmp_path / "megatron"))) == []


def test_a_full_disk_names_the_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*__0_0.distcp: No space left on device"):
        hf_to_megatron(source, tmp_path / "megatron", say=quiet)


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for file in path.glob("*.safetensors"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def without(name: str) -> Callable[[Path], None]:
    def fault(path: Path) -> None:
        tensors = hub_tensors(path)
        del tensors[name]
        rewrite(path, tensors)

    return fault


def extra(path: Path) -> None:
    rewrite(path, {**hub_tensors(path), "model.layers.0.self_attn.sinks": torch.zeros(4)})


def misshapen(path: Path) -> None:
    rewrite(path, {**hub_tensors(path), "model.norm.weight": torch.zeros(7)})


def of_integers(path: Path) -> None:
    rewrite(path, {**hub_tensors(path), "model.norm.weight": torch.zeros(64, dtype=torch.int32)})


def without_its_factors(path: Path) -> None:
    rewrite(path, {**hub_tensors(path), "model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)})


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def not_safetensors(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"<html>404</html>" * 100)


def lying_index(path: Path) -> None:
    names = dict.fromkeys([*hub_tensors(path), "lm_head.bias"], "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def index_of_nothing(path: Path) -> None:
    names = dict.fromkeys(hub_tensors(path), "model-00001-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def index_that_leaves(path: Path) -> None:
    names = dict.fromkeys(hub_tensors(path), "../model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def unknown_architecture(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neo"}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without("model.norm.weight"), "got no tensor model.norm.weight, expected it for qwen3_moe"),
        (extra, "model.safetensors: got tensor model.layers.0.self_attn.sinks, which qwen3_moe does not have"),
        (misshapen, r"model.safetensors: model.norm.weight: got shape \(7,\), expected \(64,\)"),
        (of_integers, "model.norm.weight: got torch.int32, expected floating point"),
        (without_its_factors, "model.norm.weight is float8, expected model.norm.weight_scale_inv of shape"),
        (truncated, r"model.safetensors: truncated: got \d+ bytes, expected at least \d+"),
        (not_safetensors, "model.safetensors: got 1600 bytes, expected a safetensors file"),
        (lying_index, "it names tensor lm_head.bias in model.safetensors, which has no such tensor"),
        (index_of_nothing, "it names the file model-00001-of-00002.safetensors, which is not there"),
        (index_that_leaves, r"got the file '../model.safetensors', expected one of the same directory"),
        (unknown_architecture, "model_type: got 'gpt_neo'"),
    ],
)
def test_a_broken_source_is_named(source: Path, tmp_path: Path, fault: Callable[[Path], None], message: str) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    fault(broken)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(broken, tmp_path / "megatron", say=quiet)
    assert not (tmp_path / "megatron").exists()


def test_layers_beyond_the_models_own_are_reported_and_skipped(source: Path, tmp_path: Path) -> None:
    path = shutil.copytree(source, tmp_path / "hf")
    rewrite(path, {**hub_tensors(path), "model.layers.2.eh_proj.weight": torch.zeros(3, 3)})
    said: list[str] = []
    hf_to_megatron(path, tmp_path / "megatron", say=said.append)
    assert said[0].startswith("1 tensors are left out, model.layers.2.eh_proj.weight first")


def lost_data(path: Path) -> None:
    next(path.glob("__0_0.distcp")).unlink()


def short_data(path: Path) -> None:
    file = next(path.glob("__0_0.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def no_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def incomplete(path: Path) -> None:
    (path / "metadata.json").unlink()


def no_config(path: Path) -> None:
    shutil.rmtree(path / "hf")


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/should_never_exist_megatron_dppo",)


def evil(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(_Evil()))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lost_data, "lies in __0_0.distcp, which is not there"),
        (short_data, r"__0_0.distcp: \S+: the chunk at .* cannot be read"),
        (no_metadata, "got no .metadata, expected a torch_dist checkpoint"),
        (incomplete, "got no metadata.json, expected a complete torch_dist checkpoint"),
        (no_config, "name the model's Hugging Face directory with --config"),
        (evil, r"\.metadata: cannot be read: it asks for posix.system, which no checkpoint's metadata needs"),
    ],
)
def test_a_broken_megatron_checkpoint_is_named(
    source: Path, tmp_path: Path, fault: Callable[[Path], None], message: str
) -> None:
    hf_to_megatron(source, tmp_path / "megatron", say=quiet)
    fault(tmp_path / "megatron")
    with pytest.raises(ValueError, match=message):
        list(differences(open_checkpoint(tmp_path / "megatron"), open_checkpoint(source)))
    assert not Path("/tmp/should_never_exist_megatron_dppo").exists()


def test_the_model_has_to_be_the_one_described(source: Path, tmp_path: Path) -> None:
    hf_to_megatron(source, tmp_path / "megatron", say=quiet)
    wider = written(tmp_path / "wider", vocab_size=61, moe_intermediate_size=96)
    deeper = written(tmp_path / "deeper", vocab_size=61, num_layers=3)
    with pytest.raises(ValueError, match=r"linear_fc1.weight: got shape .*, expected"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", config=wider, say=quiet)
    with pytest.raises(ValueError, match="expected"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", config=deeper, say=quiet)
    assert not (tmp_path / "back").exists()


def test_verify_names_the_first_differences(source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    tensors = hub_tensors(other)
    tensors["model.norm.weight"][5] += 1
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    del tensors["model.layers.1.mlp.gate.weight"]
    rewrite(other, tensors)
    lines = list(differences(open_checkpoint(source), open_checkpoint(other)))
    assert len(lines) == 3
    assert lines[0] == "model.layers.1.mlp.gate.weight: only in the first"
    assert any(line.startswith("model.norm.weight: first differs at [5]: ") for line in lines)
    assert any(line.startswith("lm_head.weight: torch.float32 (61, 64) in the first, torch.bfloat16") for line in lines)


def test_a_difference_in_a_later_block_has_its_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    tensors = hub_tensors(other)
    tensors["lm_head.weight"][60, 3] = -0.0
    rewrite(other, tensors)
    monkeypatch.setattr(hub_files.row_blocks, "__defaults__", (5 * 64 * 4,))
    (line,) = differences(open_checkpoint(source), open_checkpoint(other))
    assert line.startswith("lm_head.weight: first differs at [60, 3]: ") and line.endswith(" and -0.0")


def test_commands(source: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    assert runner.invoke(app, ["convert", "hf-to-megatron", str(source), megatron]).exit_code == 0
    assert runner.invoke(app, ["convert", "megatron-to-hf", megatron, back]).exit_code == 0
    result = runner.invoke(app, ["verify", str(source), back])
    assert result.exit_code == 0 and "equal: 69 tensors, bit by bit" in result.output
    tensors = load_file(Path(back) / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, Path(back) / "model.safetensors")
    result = runner.invoke(app, ["verify", megatron, back])
    assert result.exit_code == 1 and "model.norm.weight: first differs" in result.output
    result = runner.invoke(app, ["convert", "hf-to-megatron", str(source), megatron])
    assert result.exit_code == 1 and "it is there already, expected a new directory" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf-to-megatron", "nowhere"], "no config.json in nowhere, expected a Hugging Face model directory"),
        (["megatron-to-hf", "nowhere"], "no directory nowhere in "),
        (["megatron-to-hf", "file"], "file is a file, expected a Megatron checkpoint"),
        (["megatron-to-hf", "source"], "source: got a Hugging Face directory, expected a Megatron checkpoint"),
    ],
)
def test_a_source_of_the_wrong_kind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("source").symlink_to(source)
    result = CliRunner().invoke(app, ["convert", *words, "out"])
    assert result.exit_code == 1 and message in result.stderr
    assert not list(tmp_path.glob("out*"))

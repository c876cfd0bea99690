"""vLLM where there is no GPU: what it is told, by the processor and by what is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.estimate.files import LLAMA_8B, GiB, model
from vllmd.config.types import ModelConfig
from vllmd.engines import vllm_cpu
from vllmd.engines.base import Place
from vllmd.engines.estimate import Estimate, estimate
from vllmd.engines.vllm import Vllm

HOST = 64 * GiB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, a processor with instructions for bfloat16, and a compiler."""
    monkeypatch.setattr(vllm_cpu, "has_accelerator", lambda: False)
    monkeypatch.setattr(vllm_cpu, "wide_by_default", lambda: False)
    monkeypatch.setattr(vllm_cpu, "lacks_for_compiling", lambda: "")


def told(**settings: object) -> list[str]:
    """The flags that are passed because there is no GPU, with 2 GiB for the cache."""
    config = ModelConfig("m", model="/m", **settings)  # type: ignore[arg-type]
    place = Place(Path("/run/x"), kv_cache=2 * GiB)
    alone, there = (Vllm(lambda gpu=gpu: gpu).launch(config, place).argv for gpu in (True, False))
    return [word for word in there if word not in alone]


def test_its_cache_is_as_large_as_was_estimated() -> None:
    """Not 0.92 of the host; and the context is what fits into it, where nothing else is said."""
    assert told() == ["--kv-cache-memory-bytes", str(2 * GiB), "--max-model-len", "auto"]
    assert told(max_model_len=4096) == ["--kv-cache-memory-bytes", str(2 * GiB)]


def test_what_the_model_says_itself_stays() -> None:
    """Each by its own words: options, variables, flags, a share of the host."""
    assert told(max_model_len=4096, env={"VLLM_CPU_KVCACHE_SPACE": "1"}) == []
    assert told(max_model_len=4096, options={"kv_cache_memory": "1GiB"}) == []
    assert told(extra_args=("--kv-cache-memory-bytes", "7", "--max-model-len=9")) == []
    assert told(max_model_len=4096, gpu_memory=0.3) == ["--gpu-memory-utilization", "0.3"]


def test_it_asks_the_cache_that_it_can_read() -> None:
    """What vLLM 0.32 compiles ahead of time on a CPU it never loads again; a GPU's does."""
    config = ModelConfig("m", model="/m")
    assert Vllm(lambda: False).launch(config, Place(Path("/run/x"))).env["VLLM_USE_AOT_COMPILE"] == "0"
    assert "VLLM_USE_AOT_COMPILE" not in Vllm(lambda: True).launch(config, Place(Path("/run/x"))).env


def test_it_compiles_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, or Python's headers, it would end after a minute."""
    monkeypatch.setattr(vllm_cpu, "lacks_for_compiling", lambda: "g++")
    assert told()[-1] == "--enforce-eager"
    assert told(extra_args=("--enforce-eager",))[-1] == "auto"


@pytest.mark.parametrize(
    ("cpuinfo", "wide"),
    [
        ("flags\t\t: fpu avx avx2 fma\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("flags\t\t: avx512f avx512_bf16 amx_bf16\n", False),
        ("Features\t: fp asimd aes\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", False),
        ("cpu\t\t: POWER9\n", False),
    ],
)
def test_float32_where_the_processor_has_no_bfloat16(
    cpuinfo: str, wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated, it takes four times as long; a processor that does not tell is left to vLLM."""
    monkeypatch.undo()
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{cpuinfo}\n")
    assert vllm_cpu.wide_by_default(file) is wide


def test_the_type_shows_in_flags_and_in_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and cache are twice as large."""
    monkeypatch.setattr(vllm_cpu, "wide_by_default", lambda: True)
    assert told()[-2:] == ["--dtype", "float32"]
    assert told(dtype="bfloat16", max_model_len=1)[2:] == []
    llama = model(tmp_path / "llama", LLAMA_8B, BF16=15 * GiB)
    assert on_cpu(llama).weights == 30 * GiB
    assert on_cpu(llama, dtype="bfloat16").weights == 15 * GiB


def on_cpu(path: Path, host: int = HOST, **settings: object) -> Estimate:
    config = ModelConfig("m", model=str(path), **settings)  # type: ignore[arg-type]
    return estimate(config, Path("/nowhere"), 0, host)


def test_its_cache_takes_a_quarter_of_the_host_at_most(tmp_path: Path) -> None:
    """A context that somebody asked for is not cut; all of it counts as host memory while it runs."""
    llama = model(tmp_path / "llama", LLAMA_8B, BF16=15 * GiB)
    assert on_cpu(llama).kv_cache == 4 * GiB  # 16 requests of 2,048 tokens
    assert on_cpu(llama, 8 * GiB).kv_cache == 2 * GiB
    assert on_cpu(llama, 2 * GiB).kv_cache == GiB // 2  # less than one of its longest, 8,192 tokens
    assert on_cpu(llama, 2 * GiB, max_model_len=8192).kv_cache == 4 * GiB
    found = on_cpu(llama)
    assert found.host_running == found.footprint.awake == 15 * GiB + 4 * GiB + vllm_cpu.OVERHEAD


def test_its_threads_do_not_spin_while_they_wait_for_each_other() -> None:
    """Several engines share the cores; also of one that is a fork, whose threads vLLM binds to none. On a GPU vLLM's
    own choice stands."""
    place, on_gpu = Place(Path("/run/x")), Place(Path("/run/x"), ("0",))
    assert Vllm(accelerator=lambda: False).launch(ModelConfig("m"), place).env["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in Vllm(accelerator=lambda: True).launch(ModelConfig("m"), on_gpu).env


def test_under_a_quota_it_has_a_thread_for_each_cpu_that_is_left() -> None:
    """By itself it takes each that it may be on; told what a model's env says, or nothing on a GPU."""
    place = Place(Path("/run/x"), cpus=2, quota=True)
    env = Vllm(accelerator=lambda: False).launch(ModelConfig("m"), place).env
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("nobind", "2")
    own_choice, on_gpu = Place(Path("/run/x"), cpus=2), Place(Path("/run/x"), ("0",), cpus=2, quota=True)
    for accelerator, other in ((False, own_choice), (True, on_gpu)):
        env = Vllm(accelerator=lambda here=accelerator: here).launch(ModelConfig("m"), other).env  # type: ignore[misc]
        assert {"VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"}.isdisjoint(env)

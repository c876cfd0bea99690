"""What each kind says of a model: argv, environment, devices, failures; pure, nothing runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of
from vllmd.engines.base import Launch, Listen, Place
from vllmd.errors import ConfigError
from vllmd.sizes import GiB

GPU = Place(Path("/run/x"), ("GPU-a", "GPU-b"), 40 * GiB, 80 * GiB, port=33301)
NO_GPU = Place(Path("/run/x"), port=33301)


def launch(engine: str, place: Place = NO_GPU, **settings: Any) -> Launch:
    model = ModelConfig("m", engine=engine, **settings)
    return engine_of(model).launch(model, place)


def has(argv: tuple[str, ...], *words: str) -> bool:
    """Whether the words stand there one after another."""
    return any(argv[at : at + len(words)] == words for at in range(len(argv)))


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        ("/srv/a.gguf", ("--model", "/srv/a.gguf")),
        ("a.gguf", ("--model", "a.gguf")),
        ("ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", ("--hf-repo", "ggml-org/gemma-3-1b-it-GGUF:Q4_K_M")),
        ("https://x.example/a.gguf", ("--model-url", "https://x.example/a.gguf")),
    ],
)
def test_llama_server_takes_a_file_a_repository_or_a_url(source: str, flags: tuple[str, str]) -> None:
    """As its users name models."""
    order = launch("llama.cpp", model=source)
    assert has(order.argv, *flags)
    assert has(order.argv, "--host", "/run/x/engine.sock", "--alias", "m")
    assert order.listen == Listen(uds="/run/x/engine.sock")


def test_llama_server_offloads_all_layers_to_its_devices_unless_told_otherwise() -> None:
    """Older versions would leave them on the CPU; with 0 it takes no device at all."""
    assert has(launch("llama.cpp", GPU).argv, "--n-gpu-layers", "999")
    assert "--n-gpu-layers" not in launch("llama.cpp").argv
    model = ModelConfig("m", engine="llama.cpp", options={"gpu_layers": 0})
    engine = engine_of(model)
    assert engine.device_count(model) == 0
    assert engine.launch(model, NO_GPU).env["CUDA_VISIBLE_DEVICES"] == ""


def test_llama_server_has_a_thread_for_each_cpu_that_it_may_use() -> None:
    """By itself it counts the machine's cores; what the model says goes before."""
    place = Place(Path("/run/x"), cpus=3)
    assert has(launch("llama.cpp", place).argv, "--threads", "3")
    assert launch("llama.cpp", place, extra_args=("--threads", "5")).argv.count("--threads") == 1
    assert "--threads" not in launch("llama.cpp").argv


def test_llama_servers_context_is_the_room_of_all_slots() -> None:
    """Each of four requests shall have what was configured."""
    assert has(launch("llama.cpp", max_model_len=4096, options={"parallel": 4}).argv, "--ctx-size", "16384")


def test_llama_servers_context_is_what_fits_where_nothing_is_said() -> None:
    """By itself it would take the model's longest, or what happens to be free at that moment."""
    place = Place(Path("/run/x"), context=6144)
    assert has(launch("llama.cpp", place).argv, "--ctx-size", "6144")
    assert has(launch("llama.cpp", place, max_model_len=2048).argv, "--ctx-size", "2048")
    assert "--ctx-size" not in launch("llama.cpp").argv


def test_llama_servers_extras_are_bounded_and_counted() -> None:
    """Metrics are on; prompts are kept in as much host memory as is booked for them; its threads do not spin."""
    order = launch(
        "llama.cpp", options={"lora": ["/a.gguf", "/b.gguf:0.5"], "mmproj": "/p.gguf", "prompt_cache": "2GiB"}
    )
    assert "--metrics" in order.argv
    assert has(order.argv, "--lora", "/a.gguf", "--lora-scaled", "/b.gguf:0.5")
    assert has(order.argv, "--mmproj", "/p.gguf")
    assert order.env["LLAMA_ARG_CACHE_RAM"] == "2048"
    assert order.env["OMP_WAIT_POLICY"] == "passive"
    assert launch("llama.cpp").env["LLAMA_ARG_CACHE_RAM"] == "512"


def test_who_idles_by_himself_is_never_measured() -> None:
    """What such an engine holds at one moment is not what it takes."""
    assert launch("llama.cpp", options={"sleep_idle": 60}).self_managed
    assert not launch("llama.cpp").self_managed
    assert launch("comfyui", options={"directory": "/opt/ComfyUI"}).self_managed


def test_comfyui_is_started_in_its_directory_and_ended_by_sigint() -> None:
    """SIGTERM would end it in the middle of a write."""
    order = launch("comfyui", GPU, options={"directory": "/opt/ComfyUI", "python": "/opt/venv/bin/python"})
    assert order.argv[:2] == ("/opt/venv/bin/python", "main.py")
    assert (order.cwd, order.stop_signal) == ("/opt/ComfyUI", signal.SIGINT)
    assert order.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


def test_transformers_serve_is_pinned_to_its_model() -> None:
    """The positional argument is the only name that it answers to."""
    model = ModelConfig("m", engine="transformers", model="Qwen/Qwen3-0.6B", options={"cpu": True})
    engine = engine_of(model)
    assert engine.launch(model, NO_GPU).argv[:3] == ("transformers", "serve", "Qwen/Qwen3-0.6B")
    assert engine.served_name(model) == "Qwen/Qwen3-0.6B"
    assert engine.device_count(model) == 0


def test_triton_loads_one_model_only() -> None:
    """Everything else in the repository would take memory that nobody counted."""
    argv = launch("triton", model="/srv/models/densenet", stop_timeout=20.0).argv
    assert {"--model-repository=/srv/models", "--load-model=densenet", "--model-control-mode=explicit"} <= set(argv)
    assert "--exit-timeout-secs=20" in argv


@pytest.mark.parametrize(
    ("engine", "settings", "what"),
    [
        ("comfyui", {}, "options.directory: is missing"),
        ("triton", {"model": "densenet"}, "options.repository: is missing"),
        ("tei", {"dtype": "bfloat16"}, "models.m.dtype: TEI has no bfloat16; right are"),
        ("tei", {"options": {"pooling": "max"}}, "right are , cls"),
        ("llama.cpp", {"options": {"parallel": "many"}}, "it must be a whole number"),
        ("llama.cpp", {"options": {"embedding": "yes"}}, "right are true and false"),
        ("sglang", {"options": {"weights_backups": True}}, "did you mean weights_backup?"),
        ("transformers", {"options": {"quantization": "int3"}}, "right are , bnb-4bit"),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(engine: str, settings: dict[str, Any], what: str) -> None:
    """With the place and what would be right."""
    with pytest.raises(ConfigError) as error:
        launch(engine, where="a.yaml:7", **settings)
    assert error.value.message.startswith("a.yaml:7: models.m.")
    assert what in error.value.message


ABSENT = [
    ("vllm", "there is no command 'vllm': looked in /usr/bin; install it, or give the full path"),
    ("vllm", "/usr/bin/python3: No module named vllm"),
    (
        "sglang",
        "/usr/bin/python3: Error while finding module specification (ModuleNotFoundError: No module named 'sglang')",
    ),
    ("llama.cpp", "there is no command 'llama-server': looked in /usr/bin; install it, or give the full path"),
    ("triton", "there is no command 'tritonserver': looked in /usr/bin"),
    ("tei", "there is no command /opt/text-embeddings-router"),
    ("transformers", "there is no command 'transformers': looked in /usr/bin"),
    ("comfyui", "python3 could not be started: No such file or directory: /opt/ComfyUI"),
    ("comfyui", "python3: can't open file '/opt/ComfyUI/main.py': [Errno 2] No such file or directory"),
]
NEEDED = {"triton": {"repository": "/models"}, "comfyui": {"directory": "/opt/ComfyUI"}}


@pytest.mark.parametrize(("engine", "line"), ABSENT)
def test_an_engine_that_is_not_installed_says_what_to_install(engine: str, line: str) -> None:
    """No retry helps; a command or an address does."""
    failure = engine_of(ModelConfig("m", engine=engine, options=NEEDED.get(engine, {}))).failure(["starting", line])
    assert failure.permanent
    assert failure.reason == line
    sources = ("vllmctl engine install ", "pip install ", "https://", "NVIDIA's container")
    assert any(word in failure.hint for word in sources)


@pytest.mark.parametrize(
    ("lines", "memory", "permanent"),
    [
        (
            ["ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory", "failed to load"],
            True,
            False,
        ),
        (["error: invalid argument: --nonsense"], False, True),
        (["E gguf_init_from_file: failed to open GGUF file 'x'", "srv exiting"], False, False),
    ],
)
def test_a_failed_start_is_told_by_its_error(lines: list[str], memory: bool, permanent: bool) -> None:
    """The last line that speaks of one; more memory or another attempt may help, or nothing."""
    failure = engine_of(ModelConfig("m", engine="llama.cpp")).failure(lines)
    assert (failure.memory, failure.permanent) == (memory, permanent)
    assert "fail" in failure.reason or "error" in failure.reason

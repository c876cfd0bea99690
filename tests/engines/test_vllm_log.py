"""Reading vLLM's log: phases, the root of a failure, the memory that was needed or taken."""

from __future__ import annotations

import pytest

from vllmd.core.types import Source
from vllmd.engines.vllm_log import clean, failure, footprint, progress
from vllmd.sizes import GiB

CORE = "(EngineCore pid=812) INFO 11-20 19:00:00 [gpu_model_runner.py:5150] "
ERROR = "(EngineCore pid=812) ERROR 11-20 19:00:00 [core.py:1268] "
CONSEQUENCE = "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above."


@pytest.mark.parametrize(
    "line",
    [
        f"{CORE}Loading",
        "\x1b[0;36m(EngineCore pid=812)\x1b[0;0m INFO 11-20 19:00:00 [a/.../b.py:1] Loading",
        "(APIServer pid=1) Loading",
        "Loading",
    ],
)
def test_the_prefix_and_the_colours_go(line: str) -> None:
    """A terminal's colours come along when somebody forces them."""
    assert clean(line) == "Loading"


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("Resolved architecture: Qwen3ForCausalLM", "configuring"),
        ("model-00001-of-00002.safetensors:  12%|█▏        | 1.2G/9.9G [00:10<01:12, 120MB/s]", "download"),
        ("Starting to load model Qwen/Qwen3-8B...", "weights"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01,  1.0s/it]", "weights"),
        ("Model loading took 15.27 GiB memory and 3.100000 seconds", "profiling"),
        ("Dynamo bytecode transform time: 7.50 s", "compile"),
        ("torch.compile took 43.00 s in total", "profiling"),
        ("GPU KV cache size: 81,920 tokens, Maximum concurrency for 32,768 tokens per request: 2.50x", "graphs"),
        ("CPU KV cache size: 524,288 tokens, Maximum concurrency for 512 tokens per request: 1024.00x", "warm-up"),
        ("Graph capturing finished in 17 secs, took 0.40 GiB", "warm-up"),
        ("Starting vLLM server on unix:/run/x/engine.sock", "serving"),
    ],
)
def test_phases(line: str, phase: str) -> None:
    """The lines of 0.32, each beginning what comes after it."""
    found = progress(CORE + line)
    assert found is not None
    assert (found.phase, found.detail) == (phase, line)


def test_most_lines_say_nothing_of_the_phase() -> None:
    """An access log line is no progress."""
    assert progress('(APIServer pid=1) INFO:     127.0.0.1:0 - "GET /health HTTP/1.1" 200') is None


def test_a_line_without_end_is_cut() -> None:
    """vLLM lists its whole configuration in one of them."""
    found = progress("Initializing a V1 LLM engine (v0.32.0) with config: " + "model=x, " * 500)
    assert found is not None
    assert len(found.detail) < 200


def test_a_path_that_is_none_is_told_in_our_words() -> None:
    """As seen of a real vLLM; whoever has the directory before his eyes must learn whose eyes count."""
    found = failure([
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'/home/ada/model'. Use `repo_type` argument if needed."
    ])  # fmt: skip
    assert found.permanent
    assert found.hint == "there is no directory /home/ada/model, or the engine's user may not look into it"


def test_the_check_of_free_memory_tells_what_was_needed() -> None:
    """Bytes per device, from vLLM's own arithmetic."""
    found = failure([
        f"{ERROR}ValueError: Free memory on device cuda:0 (4.00/79.25 GiB) on startup is less than desired GPU memory "
        "utilization (0.5, 39.63 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        CONSEQUENCE,
    ])  # fmt: skip
    assert found.memory
    assert found.needed == round(39.63 * GiB)
    assert found.reason.startswith("ValueError: Free memory on device cuda:0")


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: To serve at least one request with the model's max seq len (32768), (4.0 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (1.0 GiB).",
    ],
)
def test_other_shortages_of_memory(line: str) -> None:
    """How much would do, they do not say; but more may help, so they are not permanent."""
    found = failure([ERROR + line, CONSEQUENCE])
    assert (found.memory, found.needed, found.permanent) == (True, None, False)


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve: error: unrecognized arguments: --nonsense",
        "OSError: no/such is not a local folder and is not a valid model identifier listed on 'https://huggingface.co'",
        "ValueError: Sleep mode is not supported on current platform.",
        "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm",
    ],
)
def test_what_no_retry_mends_is_permanent(line: str) -> None:
    """Waiters get the reason at once."""
    found = failure([line])
    assert (found.permanent, found.reason) == (True, line)


def test_the_root_is_told_not_its_consequence() -> None:
    """vLLM's last error only says that there was one before."""
    found = failure([f"{ERROR}KeyError: 'model.layers'", f"{ERROR}EngineCore failed to start.", CONSEQUENCE])
    assert (found.reason, found.permanent, found.memory) == ("KeyError: 'model.layers'", False, False)


def test_a_process_that_ended_without_a_word_is_told() -> None:
    """As a real vLLM said it when its worker, or its core, was killed: what comes after is of those that are left."""
    died = "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor."
    dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for it."
    after = ["RuntimeError: cancelled", "INFO:     Finished server process [865]"]
    found = failure([f"{ERROR}{died}", f"{ERROR}{dead}", *after])
    assert (found.reason, found.hint.partition(" has ended")[0]) == (died, "signal 9")
    found = failure([f"{ERROR}{dead}", *after])
    assert (found.reason, found.hint.partition(" has ended")[0]) == (dead, "its engine core")


@pytest.mark.parametrize("said", ["died unexpectedly (exit code: 1)", "died unexpectedly (exit code: 0)"])
def test_a_process_that_exited_has_told_why(said: str) -> None:
    """That its parent misses it is the consequence; only where nothing else is told it is the reason."""
    died = f"Worker proc VllmWorker-0 {said}, shutting down executor."
    dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for it."
    root = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    found = failure([f"{ERROR}WorkerProc failed.", f"{ERROR}{root}", f"{ERROR}{died}", f"{ERROR}{dead}", "bye"])
    assert (found.reason, found.memory) == (root, True)
    assert failure([f"{ERROR}{died}", f"{ERROR}{dead}", "bye"]).reason == died


def test_pydantics_errors_are_unwrapped() -> None:
    """As seen of a real vLLM on a CPU: what matters stands in the second line of three."""
    found = failure([
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, Sleep mode is not supported on current platform. [type=value_error, input_value=ArgsKwargs(()]",
        "    For further information visit https://errors.pydantic.dev/2.14/v/value_error",
    ])  # fmt: skip
    assert (found.reason, found.permanent) == ("ValueError: Sleep mode is not supported on current platform.", True)


def test_a_silent_failure_says_so() -> None:
    """Never an empty reason."""
    assert failure([]).reason == "it said nothing"


def test_the_summary_line_gives_the_footprint() -> None:
    """Weights, activations, graphs and cache."""
    found = footprint([
        f"{CORE}Free memory on device (78.00/79.25 GiB) on startup. Desired GPU memory utilization is "
        "(0.9, 71.33 GiB). Actual usage is 16.00 GiB for consumed memory (weights + non-torch), 1.50 GiB for peak "
        "activation, and 0.50 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with "
        "`--kv-cache-memory=1` (0.0 GiB) to fit into requested memory, or `--kv-cache-memory=2` (0.0 GiB) to fully "
        "utilize gpu memory. Current kv cache memory in use is 50.00 GiB."
    ])  # fmt: skip
    assert found is not None
    assert (found.awake, found.source) == (68 * GiB, Source.MEASURED)


def test_a_start_on_a_cpu_tells_no_footprint() -> None:
    """Nothing of a device was taken."""
    assert footprint([f"{CORE}CPU KV cache size: 1,000 tokens", f"{CORE}Application startup complete."]) is None

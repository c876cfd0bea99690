# ruff: noqa: E501  (recorded lines are as long as they are)
"""The failures that operators meet most: the engine's own line is found, and what to do about it is told."""

from __future__ import annotations

import re

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of
from vllmd.engines.known_failures import TABLE, known

WORKER = "(Worker_TP1 pid=93) ERROR 11-20 19:00:00 [multiproc_executor.py:953] "
CORE = "(EngineCore pid=81) ERROR 11-20 19:00:00 [core.py:1510] "
SERVER = "(APIServer pid=1) "

# What each engine wrote, the words of the advice that matter, whether memory lacked, whether no retry can help.
# vLLM's are the wheels' own sentences with figures filled in, the others' as their issues have them.
RECORDED = [
    ("vllm", "ValueError: invalid literal for int() with base 10: 'GPU-336f5171-d808-d9e0-f3ce-45b66e3a83f3'",
             "a newer one takes ids", False, True),
    ("vllm", "ValueError: Available memory on node 0 (11.2/23.4 GiB) on startup is less than desired CPU memory "
             "utilization (0.92, 21.53 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the "
             "fraction of CPU memory reserved (despite its name).", "set it below 11.2/23.4", False, True),
    ("vllm", "ValueError: Available memory on node 0 (2.0/23.4 GiB) on kv cache allocation is less than requested memory "
             "for kv (4.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE", "KVCACHE_SPACE", False, True),
    ("vllm", "ValueError: Free memory on device cuda:0 (4.00/79.25 GiB) on startup is less than desired GPU memory "
             "utilization (0.5, 39.63 GiB). Decrease GPU memory utilization", "vllmctl gpus", True, False),
    ("vllm", "ValueError: To serve at least one request with the models's max seq len (32768), (4.0 GiB KV cache is "
             "needed, which is larger than the available KV cache memory (1.0 GiB). Based on the available memory, the "
             "estimated maximum model length is 8192.", "max_model_len to at most 8192", True, False),
    ("vllm", "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
             "smaller max_model_len", True, False),
    ("vllm", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "the device was full", True, False),
    ("vllm", "AssertionError: Error in memory profiling. Initial free memory 70.1 GiB, current free memory 75.2 GiB.",
             "the next start", True, False),
    ("vllm", "huggingface_hub.errors.GatedRepoError: 401 Client Error. Access to model meta-llama/X is restricted.",
             "hf_token", False, True),
    ("vllm", "OSError: no/such is not a local folder and is not a valid model identifier listed on the hub",
             "misspelt", False, True),
    ("vllm", "OSError: some/model does not appear to have a file named config.json. Checkout 'some/model'",
             "no config.json", False, True),
    ("vllm", "ValueError: Model architectures ['Qwen9ForCausalLM'] are not supported for now.", "newer version", False, True),
    ("vllm", "ValueError: User-specified max_model_len (40960) is greater than the derived max_model_len "
             "(max_position_embeddings=32768 or model_max_length=None in model's config.json).",
             "max_model_len to at most 32768", False, True),
    ("vllm", "ValueError: Total number of attention heads (28) must be divisible by tensor parallel size (8).",
             "a number that divides 28", False, True),
    ("vllm", "ValueError: The repository some/model contains custom code which must be executed. Please pass the argument "
             "`trust_remote_code=True` to allow custom code to be run.", "trust_remote_code: true", False, True),
    ("vllm", "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.",
             "dtype: half", False, True),
    ("vllm", "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge", "cut off", False, True),
    ("vllm", "RuntimeError: CUDA error: no kernel image is available for execution on the device",
             "built for other GPUs", False, True),
    ("vllm", "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)",
             "NCCL_DEBUG", False, False),
    ("vllm", "RuntimeError: Failed to infer device type, please set the environment variable", "sees no GPU", False, False),
    ("vllm", "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.", "signal 9", False, False),
    ("vllm", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the "
             "root cause.", "engine core has ended", False, False),
    ("vllm", "OSError: [Errno 28] No space left on device: '/var/lib/x'", "disk is full", False, False),
    ("vllm", "ImportError: libnuma.so.1: cannot open shared object file: No such file or directory",
             "library is missing", False, True),
    ("vllm", "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in "
             "torch._inductor.config.cpp.cxx: (None, 'g++')", "g++", False, True),
    ("llama.cpp", "llama_model_load: error loading model: unknown model architecture: 'mllama'", "older", False, True),
    ("llama.cpp", "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 45108.64 MiB on device 0: cudaMalloc failed: "
                  "out of memory", "the device was full", True, False),
    ("llama.cpp", "llama_model_load: error loading model: unable to allocate CUDA0 buffer", "was full", True, False),
    ("llama.cpp", "cmn  common_init_: failed to load lora adapter '/nowhere.gguf'", "no adapter for", False, True),
    ("llama.cpp", "srv    load_model: failed to load multimodal model, '/nowhere.gguf'", "no projector for", False,
     True),
    ("llama.cpp", "error: org/name is not in the cache of this user, and this server downloads nothing: download it first",
     "hf download org/name", False, False),
    ("llama.cpp", "gguf_init_from_reader: failed to read key-value pairs", "cut off", False, True),
    ("llama.cpp", "gguf_init_from_file: failed to open GGUF file '/srv/m.gguf'", "no such file", False, False),
    ("llama.cpp", "llama_model_load: error loading model: tensor 'blk.3.ffn' data is not within the file bounds, model "
                  "is corrupted or incomplete", "load it again", False, True),
    ("llama.cpp", "error: invalid argument: --nonsense", "does not know this flag", False, True),
    ("llama.cpp", "srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 33300", "port", False, False),
    ("sglang", "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "weights", True, False),
    ("sglang", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB.", "the device was full", True, False),
    ("sglang", "ValueError: Unrecognized model: does not recognize this architecture", "newer version", False, True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "line", "advice", "memory", "permanent"), RECORDED)
def test_the_line_and_what_would_help(kind: str, line: str, advice: str, memory: bool, permanent: bool) -> None:
    """The engine's own line is kept, since people search for it; the advice stands beside it."""
    prefix = WORKER if kind == "vllm" else ""
    after = (
        [f"{SERVER}RuntimeError: Engine core initialization failed. See root cause above."] if prefix else ["exiting"]
    )
    found = engine_of(ModelConfig("m", engine=kind)).failure(["loading", f"{prefix}{line}", *after])
    assert found.reason == line
    assert advice in found.hint
    assert (found.memory, found.permanent) == (memory, permanent)


def test_every_row_is_met_by_a_recorded_line_or_a_variant() -> None:
    """A row that nothing shows to work is no row: each pattern fits one of the lines here."""
    lines = [line for _, line, *_ in RECORDED] + [
        "huggingface_hub.errors.LocalEntryNotFoundError: outgoing traffic has been disabled",
        "PermissionError: [Errno 13] Permission denied: '/srv/models/a'",
        "OSError: [Errno 24] Too many open files",
        "ValueError: LoRA rank 64 is greater than max_lora_rank 16.",
        "ValueError: Quantization method specified in the model config (awq) does not match the quantization method",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
    ]
    unmet = [row.pattern for row in TABLE if not any(row.of(line) for line in lines)]
    assert unmet == []


def test_no_advice_shows_an_unfilled_place() -> None:
    """An operator is never shown a template."""
    for _, line, *_ in RECORDED:
        told = known([line])
        assert told is not None
        assert not re.search(r"\{\d\}", told[1])


def test_the_root_is_found_under_the_reports_of_every_process() -> None:
    """With worker processes vLLM's server and core only say that a worker failed; the worker's line is the cause."""
    root = RECORDED[0][1]
    found = engine_of(ModelConfig("m", engine="vllm")).failure([
        f"{WORKER}WorkerProc failed to start.",
        f"{WORKER}Traceback (most recent call last):",
        f"{WORKER}{root}",
        f"{CORE}EngineCore failed to start.",
        f"{CORE}Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace "
        "for root cause.",
        f"{SERVER}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}",
    ])  # fmt: skip
    assert found.reason == root

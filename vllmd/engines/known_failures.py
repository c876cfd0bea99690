"""Start-up failures that operators meet most, by the engines' own words, and what to do about each.

A row is matched against the lines of a failed start. Its advice is shown beside the engine's own line, never in its
place: that line is what people look for on the web. Words of vLLM 0.22 to 0.33 (its sources: ``v1/worker``,
``v1/core/kv_cache_utils.py``, ``config``, ``platforms``), of llama.cpp (``src/llama-model-loader.cpp``, ``ggml``,
``tools/server``) and of SGLang (``srt/model_executor``); the places where they differ are alternatives of one pattern.

``{1}`` in an advice stands for the pattern's first group. ``memory``: more room on the device may help, so the
scheduler makes some and tries again. ``permanent``: no further attempt can help before an operator changes something.
``port``: another process has the engine's port, so that another attempt with another port may help.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllmd.frozen import frozen


@frozen
class Known:
    """A failure, its meaning, and what would help."""

    pattern: str  # compiled at the first failed start: most daemons see none
    advice: str
    memory: bool = False
    permanent: bool = False
    port: bool = False

    def of(self, line: str) -> str:
        """The advice for a line of this failure; "" for any other line."""
        match = re.search(self.pattern, line, re.IGNORECASE)
        return re.sub(r"\{(\d)\}", lambda place: match[int(place[1])] or "?", self.advice) if match else ""


def _row(pattern: str, advice: str, **flags: bool) -> Known:
    return Known(pattern, advice, **flags)


TABLE: tuple[Known, ...] = (
    # -- files beside a llama.cpp model; a context that could not be made may follow from each, so these come first
    _row(
        r"(?:load|apply) lora adapter|llama_adapter_lora_init: failed to open",
        "lora under options names a file that is not there, or no adapter for this model",
        permanent=True,
    ),
    _row(
        r"Failed to load CLIP model|failed to load multimodal model",
        "mmproj under options names a file that is not there, or no projector for this model",
        permanent=True,
    ),
    # -- devices
    _row(
        r"invalid literal for int\(\) with base 10: '(?:GPU|MIG)-",
        "vLLM up to 0.23 takes devices by their numbers, which these do not have (docs/gpus.md): a newer one takes ids",
        permanent=True,
    ),
    # -- memory
    _row(
        r"Available memory on node \d+ \(([\d.]+)/([\d.]+) GiB\).*desired CPU memory utilization \(([\d.]+)",
        "on a CPU gpu_memory is the share of host memory that it takes: set it below {1}/{2} (it wanted {3})",
        permanent=True,
    ),
    _row(
        r"Available memory on node \d+ .*kv cache allocation is less than requested",
        "on a CPU its cache is host memory: give it less by gpu_memory, or by VLLM_CPU_KVCACHE_SPACE under env",
        permanent=True,
    ),
    _row(
        r"Free memory on device .*less than (?:desired GPU memory util|the engine's budget)",
        "something else holds the device (vllmctl gpus shows what), or gpu_memory asks for more than it has",
        memory=True,
    ),
    _row(
        r"estimated maximum model length is (\d+)",
        "set max_model_len to at most {1}, or give it more by gpu_memory",
        memory=True,
    ),
    _row(
        r"larger than the available KV cache memory|No available memory for the cache blocks",
        "its weights leave too little for the cache: a smaller max_model_len, a larger gpu_memory, or more devices "
        "(tensor_parallel_size)",
        memory=True,
    ),
    _row(
        r"Not enough memory\. Please try (?:to increase|increasing) --mem-fraction-static",
        "the weights leave too little of its share for the cache: a larger gpu_memory, or more devices",
        memory=True,
    ),
    _row(
        r"Error in memory profiling",
        "another process gave memory back while it measured; the next start does not meet it",
        memory=True,
    ),
    _row(
        r"failed to allocate buffer for kv cache|failed to (?:create|initialize) (?:the )?context"
        r"|failed to allocate CPU buffer|ggml_aligned_malloc: insufficient memory",
        "a smaller max_model_len takes less for the cache",
        memory=True,
    ),
    _row(
        r"unable to allocate (\S+) buffer|cudaMalloc failed: out of memory|CUDA out of memory|OutOfMemoryError"
        r"|HIP out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "the device was full: a smaller max_model_len, fewer layers on it, or more devices; vllmctl gpus shows who "
        "holds what",
        memory=True,
    ),
    # -- the model and its files
    _row(
        r"GatedRepoError|gated repo|Access to model .* is restricted|401 Client Error",
        "accept the model's licence on its page, then give the model a token by hf_token",
        permanent=True,
    ),
    _row(
        r"RepositoryNotFoundError|Repository Not Found|is not a local folder and is not a valid model identifier"
        r"|Invalid repository ID or local directory",
        "the model's name is misspelt, or it is private and needs hf_token",
        permanent=True,
    ),
    _row(
        r"LocalEntryNotFoundError|couldn't connect to .* to load (?:this|the) file|outgoing traffic has been disabled"
        r"|Max retries exceeded with url|Temporary failure in name resolution",
        "it is not in the cache and the hub cannot be reached: load it where there is a network, or set HF_ENDPOINT or "
        "a proxy under env",
    ),
    _row(
        r"Error while deserializing header|SafetensorError|data is not within the file bounds|invalid magic"
        r"|model is corrupted or incomplete|unexpectedly reached end of file|HeaderTooLarge|MetadataIncompleteBuffer"
        r"|gguf_init_from_\w+: failed to read",
        "a file of the model is cut off or damaged: delete it and load it again",
        permanent=True,
    ),
    _row(
        r"^error: (\S+) is not in the cache of this user, and this server downloads nothing",
        "hf download {1} as the engines' user (under /var/lib/vllmd-engine, with HF_HOME as it is there) brings it",
    ),
    _row(
        r"does not appear to have a file named (\S+?)[.,]?(?:\s|$)",
        "the folder has no {1}: it is not a whole model, or holds GGUF files, which the engine llama.cpp takes",
        permanent=True,
    ),
    _row(
        r"failed to open GGUF file|gguf_init_from_file: failed|error loading model: .*No such file",
        "there is no such file, or the engine's user may not read it",
    ),
    _row(
        r"unknown model architecture: '?([\w.-]+)|Model architectures \[(.*?)\] (?:are|is) not supported"
        r"|does not recognize this architecture|unknown (?:pre-tokenizer|model) type",
        "the engine is older than the model: a newer version of it may know it",
        permanent=True,
    ),
    _row(
        r"trust_remote_code=True|trust-remote-code",
        "the model brings Python code of its own; trust_remote_code: true runs it, as the engine's user",
        permanent=True,
    ),
    _row(
        r"quantization method .*does not match|Quantization method specified in the model config",
        "leave quantization out of the model's options: its own configuration says how it is quantised",
        permanent=True,
    ),
    # -- settings
    _row(
        r"greater than the derived max_model_len.*?(?:max_position_embeddings|model_max_length|max_seq_len)\S*?=(\d+)",
        "set max_model_len to at most {1}",
        permanent=True,
    ),
    _row(
        r"number of attention heads \((\d+)\) must be divisible by tensor parallel size",
        "set tensor_parallel_size to a number that divides {1}",
        permanent=True,
    ),
    _row(
        r"unrecognized arguments: (.+)|error: invalid argument: (\S+)|no such option: (\S+)",
        "the installed version does not know this flag; see extra_args and options",
        permanent=True,
    ),
    _row(
        r"Bfloat16 is only supported on GPUs with compute capability",
        "set dtype: half, which older GPUs have",
        permanent=True,
    ),
    _row(
        r"LoRA rank (\d+) is greater than max_lora_rank",
        "set max_lora_rank: {1} under options",
        permanent=True,
    ),
    # -- the machine
    _row(
        r"no kernel image is available for execution|is not compatible with the current PyTorch installation"
        r"|PTX .*unsupported toolchain",
        "the engine was built for other GPUs than this one: install a build for its compute capability",
        permanent=True,
    ),
    _row(
        r"driver version is insufficient|driver on your system is too old|NVML_ERROR_LIB_RM_VERSION_MISMATCH"
        r"|Driver/library version mismatch",
        "the NVIDIA driver does not fit: upgrade it, or reboot if it was upgraded just now",
    ),
    _row(
        r"no CUDA(?:-capable)? (?:GPUs are available|device is detected)|Failed to infer device type"
        r"|CUDA error: no CUDA-capable|cuInit.*(?:failed|999)",
        "it sees no GPU: nvidia-smi as the engine's user shows whether the driver does; vllmctl doctor says more",
    ),
    _row(
        r"NCCL error|ncclSystemError|ncclUnhandled",
        "its processes could not talk to each other: NCCL_DEBUG: INFO under env shows where; /dev/shm may be too small",
    ),
    _row(r"No space left on device|Errno 28", "the disk is full: df -h, and look at the engines' caches first"),
    _row(
        r"Too many open files|Errno 24",
        "it may open too few files: raise LimitNOFILE of vllmd-launcher.service",
    ),
    _row(
        r"cannot open shared object file",
        "a library is missing from the machine: install the package that has it",
        permanent=True,
    ),
    _row(
        r"InvalidCxxCompiler|No working C\+\+ compiler|Failed to find C compiler|Python\.h: No such file",
        "it compiles as it starts: install g++ and python3-dev, or set enforce_eager: true under options",
        permanent=True,
    ),
    _row(
        r"PermissionError.*?'([^']+)'|Permission denied: '([^']+)'",
        "the engine's user may not use that file or folder",
    ),
    _row(
        r"Address already in use|couldn't bind HTTP server socket|Errno 98",
        "another process has its port; engines.port_start and port_end move the range",
        port=True,
    ),
    # -- processes that ended without a word
    _row(
        r"died unexpectedly \(exit code: -(\d+)\)",
        "signal {1} has ended one of its processes: the kernel's log (journalctl -k) may tell why",
    ),
    _row(
        r"EngineDeadError: EngineCore encountered an issue",
        "its engine core has ended, perhaps without a word: then the kernel's log (journalctl -k) may tell why",
    ),
)


def known(lines: Iterable[str]) -> tuple[str, str, Known] | None:
    """The first row that one of ``lines`` fits: the line, the advice, the row. Rows come in the table's order."""
    texts = list(lines)
    for row in TABLE:
        for line in texts:
            if advice := row.of(line):
                return line, advice, row
    return None

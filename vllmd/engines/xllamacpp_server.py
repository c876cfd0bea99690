"""llama-server, from PyPI's package xllamacpp: llama.cpp's own HTTP server in a Python process.

usage: python -I xllamacpp_server.py --model FILE.gguf --host SOCKET [FLAG ...]

A program of its own. It runs in the environment that has xllamacpp, whose Python may be another one than vllmd's, as
the engine's user. It takes llama-server's flags by the same names, with the same meanings, and ends as that does: by
SIGTERM at once with status 0, by a model that cannot be loaded with 1, and by a flag that it does not know with 2. What
it logs is llama.cpp's own.

The package's server takes parameters, not a command line, so the flags are in a table here. It loads files only, and
downloads nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SLOTS = 4  # llama-server's default: so many share one cache


class Flag(NamedTuple):
    """A flag: its names, the parameter that it sets (a path of attributes), and the reader of its value.

    ``read`` None: the flag takes no value and sets ``value``.
    """

    names: str
    parameter: str
    read: Callable[[str], Any] | None = None
    value: Any = True


FLAGS = (
    Flag("-m --model", "model.path", str),
    Flag("-a --alias", "model_alias", lambda text: set(text.split(","))),
    Flag("--host", "hostnames", lambda text: [text]),
    Flag("--port", "port", int),
    Flag("--api-key", "api_keys", lambda text: text.split(",")),
    Flag("--api-prefix", "api_prefix", str),
    Flag("-c --ctx-size", "n_ctx", int),
    Flag("-np --parallel", "n_parallel", int),
    Flag("-b --batch-size", "n_batch", int),
    Flag("-ub --ubatch-size", "n_ubatch", int),
    Flag("-n --predict --n-predict", "n_predict", int),
    Flag("--keep", "n_keep", int),
    Flag("-t --threads", "cpuparams.n_threads", int),
    Flag("-tb --threads-batch", "cpuparams_batch.n_threads", int),
    Flag("--threads-http", "n_threads_http", int),
    Flag("-ngl --gpu-layers --n-gpu-layers", "n_gpu_layers", int),
    Flag("-mg --main-gpu", "main_gpu", int),
    Flag("-nkvo --no-kv-offload", "no_kv_offload"),
    Flag("-kvu --kv-unified", "kv_unified"),
    Flag("-no-kvu --no-kv-unified", "kv_unified", value=False),
    Flag("--swa-full", "swa_full"),
    Flag("--context-shift", "ctx_shift"),
    Flag("--no-context-shift", "ctx_shift", value=False),
    Flag("-nocb --no-cont-batching", "cont_batching", value=False),
    Flag("-cb --cont-batching", "cont_batching"),
    Flag("--embedding --embeddings", "embedding"),
    Flag("--metrics", "endpoint_metrics"),
    Flag("--props", "endpoint_props"),
    Flag("--slots", "endpoint_slots"),
    Flag("--no-slots", "endpoint_slots", value=False),
    Flag("-cram --cache-ram", "cache_ram_mib", int),
    Flag("--cache-prompt", "cache_prompt"),
    Flag("--no-cache-prompt", "cache_prompt", value=False),
    Flag("--cache-reuse", "n_cache_reuse", int),
    Flag("--slot-save-path", "slot_save_path", str),
    Flag("--sleep-idle-seconds", "sleep_idle_seconds", int),
    Flag("-mm --mmproj", "mmproj.path", str),
    Flag("--no-mmproj-offload", "mmproj_use_gpu", value=False),
    Flag("--chat-template", "chat_template", str),
    Flag("--chat-template-file", "chat_template", lambda text: Path(text).read_text()),
    Flag("--jinja", "use_jinja"),
    Flag("--no-jinja", "use_jinja", value=False),
    Flag("--no-prefill-assistant", "prefill_assistant", value=False),
    Flag("--reasoning-budget", "sampling.reasoning_budget_tokens", int),
    Flag("--rope-freq-base", "rope_freq_base", float),
    Flag("--rope-freq-scale", "rope_freq_scale", float),
    Flag("--rope-scale", "rope_freq_scale", lambda text: 1 / float(text)),
    Flag("--yarn-orig-ctx", "yarn_orig_ctx", int),
    Flag("--yarn-ext-factor", "yarn_ext_factor", float),
    Flag("--yarn-attn-factor", "yarn_attn_factor", float),
    Flag("--yarn-beta-slow", "yarn_beta_slow", float),
    Flag("--yarn-beta-fast", "yarn_beta_fast", float),
    Flag("-s --seed", "sampling.seed", int),
    Flag("--temp", "sampling.temp", float),
    Flag("--top-k", "sampling.top_k", int),
    Flag("--top-p", "sampling.top_p", float),
    Flag("--min-p", "sampling.min_p", float),
    Flag("--repeat-penalty", "sampling.penalty_repeat", float),
    Flag("--presence-penalty", "sampling.penalty_present", float),
    Flag("--frequency-penalty", "sampling.penalty_freq", float),
    Flag("--warmup", "warmup"),
    Flag("--no-warmup", "warmup", value=False),
    Flag("-to --timeout", "timeout_read", int),
    Flag("-lv --verbosity", "verbosity", int),
    Flag("-v --verbose", "verbosity", value=10),
    Flag("--offline", "offline"),
    Flag("--ui --webui", "ui"),
    Flag("--no-ui --no-webui", "ui", value=False),
)
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
# Flags whose values are members of an enumeration of the package: the parameter, the enumeration, and the words.
CHOICES = {
    "-fa --flash-attn": ("flash_attn_type", "llama_flash_attn_type", ("on", "off", "auto")),
    "-sm --split-mode": ("split_mode", "llama_split_mode", ("none", "layer", "row")),
    "--pooling": ("pooling_type", "llama_pooling_type", ("none", "mean", "cls", "last", "rank")),
    "-ctk --cache-type-k": ("cache_type_k", "ggml_type", CACHE_TYPES),
    "-ctv --cache-type-v": ("cache_type_v", "ggml_type", CACHE_TYPES),
    "--rope-scaling": ("rope_scaling_type", "llama_rope_scaling_type", ("none", "linear", "yarn")),
    "--reasoning-format": ("reasoning_format", "common_reasoning_format", ("none", "auto", "deepseek")),
    "--numa": ("numa", "ggml_numa_strategy", ("distribute", "isolate", "numactl")),
}
_MEMBERS = {"on": "enabled", "off": "disabled"}


def parser() -> argparse.ArgumentParser:
    """llama-server's flags, as far as the package has the parameters."""
    usage = "%(prog)s --model FILE.gguf --host SOCKET [FLAG ...]"
    result = argparse.ArgumentParser("llama-server (xllamacpp)", usage, allow_abbrev=False)
    for flag in FLAGS:
        if flag.read is None:
            result.add_argument(*flag.names.split(), dest=flag.parameter, action="store_const", const=flag.value)
        else:
            result.add_argument(*flag.names.split(), dest=flag.parameter, type=flag.read)
    for names, (parameter, _, words) in CHOICES.items():
        result.add_argument(*names.split(), dest=parameter, choices=words)
    result.add_argument("-hf", "-hfr", "--hf-repo", metavar="ORG/NAME[:QUANT]")
    result.add_argument("--reranking", "--rerank", action="store_true")
    result.add_argument("--lora", action="append", default=[], metavar="FILE[,FILE ...]")
    result.add_argument("--lora-scaled", action="append", default=[], metavar="FILE:SCALE[,FILE:SCALE ...]")
    result.add_argument("--no-mmap", action="store_true")
    result.add_argument("--version", action="store_true")
    result.add_argument("--mlock", action="store_true")
    return result


def parameters(given: argparse.Namespace, package: Any) -> Any:
    """The package's parameters for these flags. Raises FileNotFoundError where a repository is given and no file."""
    params = package.CommonParams()
    for parameter in {flag.parameter for flag in FLAGS}:
        _set(params, parameter, getattr(given, parameter))
    for parameter, enumeration, _ in CHOICES.values():
        word = getattr(given, parameter)
        _set(params, parameter, word and _member(getattr(package, enumeration), word))
    if given.n_parallel is None or given.n_parallel < 1:
        params.n_parallel, params.kv_unified = SLOTS, given.kv_unified is not False
    if given.reranking:
        params.embedding, params.pooling_type = True, package.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    if given.no_mmap or given.mlock:
        modes = package.llama_load_mode
        mapped = modes.LLAMA_LOAD_MODE_MLOCK if given.no_mmap else modes.LLAMA_LOAD_MODE_MMAP_MLOCK
        params.load_mode = mapped if given.mlock else modes.LLAMA_LOAD_MODE_NONE
    params.lora_adapters = [package.CommonAdapterLoraInfo(path, scale) for path, scale in adapters(given)]
    if given.hf_repo and not params.model.path:
        what = f"{given.hf_repo} is not in the cache of this user, and this server downloads nothing"
        raise FileNotFoundError(f"{what}: download it first, or say with model where its file is")
    if os.environ.get("LLAMA_ARG_CACHE_RAM") and given.cache_ram_mib is None:
        params.cache_ram_mib = int(os.environ["LLAMA_ARG_CACHE_RAM"])
    return params


def _set(parameters: Any, name: str, value: Any) -> None:
    """Set what a flag gave a value; without one the package's own default stays."""
    if value is None:
        return
    *path, last = name.split(".")
    for part in path:
        parameters = getattr(parameters, part)
    setattr(parameters, last, value)


def _member(enumeration: Any, word: str) -> Any:
    wanted = "_" + _MEMBERS.get(word, word).upper()
    return next(member for member in enumeration if member.name.endswith(wanted))


def adapters(given: argparse.Namespace) -> list[tuple[str, float]]:
    """LoRA adapters, each with its scale."""
    plain = [(path, 1.0) for entry in given.lora for path in entry.split(",")]
    scaled = [pair.rpartition(":") for entry in given.lora_scaled for pair in entry.split(",")]
    return [*plain, *((path, float(scale)) for path, _, scale in scaled)]


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT."""
    given = parser().parse_args(argv)
    try:
        import xllamacpp
    except ImportError as error:
        print(f"error: {error} ({sys.executable})", file=sys.stderr)
        return 1
    if given.version:
        print(f"xllamacpp {xllamacpp.__version__}, {xllamacpp.get_system_info()}")
        return 0
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        # Loading is one long call into C++, during which no handler of Python's would run: until it is over, a signal
        # simply ends the process, as it ends llama-server.
        server = xllamacpp.Server(parameters(given, xllamacpp))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    os.read(reader, 1)
    # The server's destructor waits for the last token of whatever is being answered. llama-server does not, and neither
    # do we: the daemon has drained an engine that it stops, or means it. The kernel frees the memory.
    os._exit(0 if server else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

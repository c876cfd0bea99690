"""vLLM: ``vllm serve`` on a private Unix socket, in development mode so that it can sleep.

Facts about 0.32 that shape this file:

- The socket's file must not exist before the start, and its path must fit a
  ``sockaddr_un``; so must those of the ``ipc://`` sockets in ``VLLM_RPC_BASE_PATH``.
- ``--enable-sleep-mode`` ends vLLM on a platform without it (a CPU); without the
  flag ``/sleep`` still pauses and answers 200 but frees nothing.
- The check of free memory at start uses the utilization even when
  ``--kv-cache-memory-bytes`` decides the size of the cache: both are passed.
- After level 2 a plain ``/wake_up`` serves garbage: the weights must be reloaded
  between the two tags.
- Devices: up to 0.23 it does ``int()`` on each word of CUDA_VISIBLE_DEVICES; from
  0.24 on it asks NVML for the number of what is none. For a MIG slice that is its
  place within its GPU, which it then takes for a GPU's number: so it works for
  the first slices only. On ROCm it copies HIP_VISIBLE_DEVICES to CUDA's variable,
  and on XPU it reads ZE_AFFINITY_MASK; of both it takes numbers alone. docs/gpus.md
  has the table.

Every flag, variable and route that is used here was found in the wheels of 0.22,
0.24, 0.32 and 0.33 (read, not run), also ``mode`` of ``/sleep``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.engines import adapters, environments, ray_cluster, vllm_cpu, vllm_log
from vllmd.engines.base import Adapter, Call, Failure, Launch, Listen, Place, Progress
from vllmd.engines.facts import argument
from vllmd.engines.loaders import Loader, there
from vllmd.engines.options import choice, size, unknown
from vllmd.engines.plain import PROBE, Plain, environment
from vllmd.engines.standby import Standby
from vllmd.engines.vllm_cpu import has_accelerator
from vllmd.errors import ConfigError

FIRST_WITH_IDS = [0, 24]
SUN_PATH = 107  # bytes of a Unix socket's path, the final NUL not counted
_IPC_NAME = 37  # "/" and a UUID: the names of vLLM's own sockets in VLLM_RPC_BASE_PATH
_SLEEP_TIMEOUT = 300.0  # seconds; offloading a large model's weights to host memory takes its time
_WAKE_TIMEOUT = 600.0  # level 2 reads the weights from disk again

INSTALL = "vllmctl engine install vllm, or name one that is installed in command, such as /opt/vllm/bin/vllm"
_NO_RAY = ("No module named 'ray'", "Failed to import Ray")
# Arguments that say how weights are loaded, or may: a file of arguments, and a second model with files of its own.
_LOADING = ("load-format", "model-loader-extra-config", "safetensors-load-strategy", "download-dir", "config",
            "speculative-config", "spec-model", "model-weights")  # fmt: skip
_OWN_LOADERS = ("bitsandbytes", "gguf", "torchao")  # quantizations that load in their own way
_ABSENT = ("no command 'vllm'", "No module named 'vllm'", "No module named vllm")

ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/realtime",
        "/v1/rerank",
        "/v1/score",
        "/v1/systemone",
        "/v1/decisions",
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/messages/render",
        "/v1/responses/render",
        "/cohere/v2/chat/render",
        "/tokenizer_info",
        "/v2/embed",
        "/v2/rerank",
        "/classify",
        "/cohere/v2/chat",
        "/detokenize",
        "/generative_scoring",
        "/invocations",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
    }
)
# Not /server_info (it shows the environment), /sleep, /collective_rpc and the like (vLLM's development mode).
OWN_API = frozenset(
    {
        *("GET /load", "GET /tokenizer_info", "POST /ping", "GET /static-offline-docs/{rest:path}"),
        *("GET /v1/responses/{id}", "DELETE /v1/responses/{id}", "POST /v1/responses/{id}/cancel"),
    }
)


class Vllm(Plain):
    """The contract of ``base.Engine`` for vLLM 0.32.

    ``/health`` is refused until it listens and 200 from then on, asleep too: it only asks whether the engine's
    process lives. Which of the routes there are depends on the model's task, and vLLM says.
    """

    kind = "vllm"
    ROUTES = ROUTES
    OWN_API = OWN_API
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "sleep_flag": "auto, always or never: whether --enable-sleep-mode is passed (auto: where there is a GPU)",
        "kv_cache_memory": "size of the KV cache per device, such as 8GiB, instead of what profiling leaves",
        "rpc_dir": "directory of vLLM's own sockets, instead of the run directory",
        **ray_cluster.OPTIONS,
    }

    def __init__(self, accelerator: Callable[[], bool] = has_accelerator) -> None:
        self._accelerator = accelerator

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """Both, unless ``sleep_mode`` is false, or is not set and there is no GPU to free."""
        wanted = self._accelerator() if model.sleep_mode is None else model.sleep_mode
        return frozenset({1, 2}) if wanted else frozenset()

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """argv and environment. Raises ConfigError for a path that is too long or an option that is wrong."""
        unknown(model, self.OPTIONS)
        socket = place.run_dir / "engine.sock"
        check_path(socket, model)
        check_ids(model, place)
        on_cpu = not place.device_ids and not self._accelerator()
        # 1. The command. One that is configured in full names the subcommand, or runs the server as a module.
        command = model.command or (environments.program(model, "vllm"),)
        is_module = "-m" in command and "serve" not in command
        if not is_module and "serve" not in command:
            command = (*command, "serve")
        # 2. The flags. Those of the model's own arguments come later, and of a flag given twice vLLM takes the last.
        flags = ["--model", model.source] if is_module else [model.source]
        flags += ["--uds", str(socket), "--served-model-name", self.served_name(model)]
        for kind, ranks in (("tensor", model.tensor_parallel_size), ("pipeline", model.pipeline_parallel_size)):
            flags += [f"--{kind}-parallel-size", str(ranks)] if ranks > 1 else []
        flags += ["--dtype", model.dtype] if model.dtype else []
        flags += ["--max-model-len", str(model.max_model_len)] if model.max_model_len else []
        flags += ["--trust-remote-code"] if model.trust_remote_code else []
        flags += [*self._memory_flags(model, place), *self._sleep_flag(model)]
        flags += vllm_cpu.flags(model, place.kv_cache) if on_cpu else []
        argv = (*command, *flags, *model.extra_args, *adapters.vllm_flags(model, place.hub))
        # 3. The environment, and a cluster of Ray where the model is split over machines.
        env, cluster = self._env(model, place, on_cpu=on_cpu), ray_cluster.cluster_of(model)
        if cluster:
            argv, env = cluster.start(argv), env | cluster.env()
        return Launch(argv, Listen(uds=str(socket)), env)

    def _memory_flags(self, model: ModelConfig, place: Place) -> list[str]:
        """The share of the device, and the size of the cache, unless the model's own arguments have them."""
        given = {argument.partition("=")[0] for argument in model.extra_args}
        share, cache = memory_share(model, place), size(model, "kv_cache_memory")
        if cache is None and place.device_ids and "--kv-cache-memory-bytes" not in given:
            cache = place.kv_cache or None
        flags = []
        if share is not None and "--gpu-memory-utilization" not in given:
            flags += ["--gpu-memory-utilization", f"{share:g}"]
        return flags if cache is None else [*flags, "--kv-cache-memory-bytes", str(cache)]

    def _sleep_flag(self, model: ModelConfig) -> list[str]:
        when = choice(model, "sleep_flag", ("auto", "always", "never"))
        auto = bool(self.sleep_levels(model)) and self._accelerator()
        return ["--enable-sleep-mode"] if when == "always" or (when == "auto" and auto) else []

    def _env(self, model: ModelConfig, place: Place, *, on_cpu: bool) -> dict[str, str]:
        rpc = Path(str(model.options.get("rpc_dir", place.run_dir)))
        check_path(rpc / ("x" * (_IPC_NAME - 1)), model)
        env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_RPC_BASE_PATH": str(rpc), "VLLM_NO_USAGE_STATS": "1"}
        if adapters.takes_adapters(model) and adapters.loads_late(model):
            env[adapters.RUNTIME] = "1"
        if on_cpu and place.quota:
            env[vllm_cpu.BIND] = "nobind"  # else it begins a thread for each CPU that it may run on, whatever the quota
        return env | (vllm_cpu.COMPILING if on_cpu else {}) | environment(model, place)

    def adapters(self, model: ModelConfig) -> Mapping[str, Adapter]:
        """The adapters of the setting ``adapters``, loaded at their first request, and those of ``--lora-modules``."""
        return adapters.vllm_adapters(model)

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """One call. Requests in flight finish first, or (``freeze``) stay as they are and go on after the wake."""
        mode = "keep" if freeze else "wait"
        return (Call("POST", f"/sleep?level={level}&mode={mode}", timeout=_SLEEP_TIMEOUT),)

    def wake(self, level: int) -> Sequence[Call]:
        """One call from level 1; from level 2 the weights are mapped, read again, and only then the rest."""
        if level != 2:
            return (Call("POST", "/wake_up", timeout=_WAKE_TIMEOUT),)
        return (
            Call("POST", "/wake_up?tags=weights", timeout=_WAKE_TIMEOUT),
            Call("POST", "/collective_rpc", json={"method": "reload_weights"}, timeout=_WAKE_TIMEOUT),
            Call("POST", "/wake_up?tags=kv_cache", timeout=_WAKE_TIMEOUT),
            Call("POST", "/reset_prefix_cache", timeout=30.0, optional=True),
        )

    def standby(self, model: ModelConfig, launch: Launch) -> Standby | None:
        """See ``vllm_standby``; none for a cluster, which is started by another program."""
        from vllmd.engines import vllm_standby  # not before the first start

        return vllm_standby.standby(model, launch, accelerator=self._accelerator())

    def loaders(self, model: ModelConfig, argv: Sequence[str]) -> Sequence[Loader]:
        """See ``loaders``; none where the arguments say how weights are loaded, or another program starts vLLM."""
        if argument(model, *_LOADING) or argument(model, "quantization", "q") in _OWN_LOADERS:
            return ()
        python = environments.interpreter(model, argv)
        return there(python, nvidia=vllm_cpu.has_nvidia()) if python else ()

    def load_with(self, argv: Sequence[str], load_format: str) -> tuple[str, ...]:
        """The same command with ``--load-format``."""
        return (*argv, "--load-format", load_format)

    def asleep(self) -> Call | None:
        """``/is_sleeping``, which does not tell the level."""
        return Call("GET", "/is_sleeping", timeout=PROBE)

    def progress(self, line: str) -> Progress | None:
        return vllm_log.progress(line)

    def failure(self, lines: Sequence[str]) -> Failure:
        """What its log says; where there is no vLLM or no Ray, what to do."""
        failure = vllm_log.failure(lines)
        if any(words in failure.reason for words in _NO_RAY):
            return dataclasses.replace(failure, permanent=True, hint=ray_cluster.INSTALL)
        absent = any(words in failure.reason for words in _ABSENT)
        return dataclasses.replace(failure, permanent=True, hint=INSTALL) if absent else failure

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        return vllm_log.footprint(lines)


def memory_share(model: ModelConfig, place: Place) -> float | None:
    """The share of a device to claim: as configured, else what was promised; None for vLLM's own default.

    Rounded down to four digits, so that it never claims more than was promised.
    """
    if not place.device_ids:
        return None  # on a CPU the flag means host memory, see vllm_cpu
    if isinstance(model.gpu_memory, float):
        return model.gpu_memory
    if not place.memory or not place.device_memory:
        return None
    return max(0.0001, math.floor(place.memory / place.device_memory * 10000) / 10000)


def check_ids(model: ModelConfig, place: Place) -> None:
    """Raise ConfigError where devices have only ids, and the vLLM that is used takes only numbers."""
    devices = place.visible.get("CUDA_VISIBLE_DEVICES", "")
    if not devices or all(word.isdecimal() for word in devices.split(",")):
        return
    used = environments.chosen(model)
    release = [int(part) for part in re.findall(r"\d+", used.version)[:2]] if used else []
    if used and len(release) == 2 and release < FIRST_WITH_IDS:
        what = f"vLLM {used.version} takes devices by their numbers alone, and here they have only ids ({devices})"
        raise ConfigError(f"{model.where}: models.{model.name}: {what}; vllmctl engine install 'vllm>=0.24'"
                          .removeprefix(": "))  # fmt: skip


def check_path(path: Path, model: ModelConfig) -> None:
    """Raise ConfigError if a Unix socket cannot have this path."""
    length = len(os.fsencode(path))
    if length > SUN_PATH:
        what = f"the socket path {path} has {length} bytes, at most {SUN_PATH} are possible"
        raise ConfigError(f"{model.where}: {what}; choose a shorter engines.run_dir".removeprefix(": "))

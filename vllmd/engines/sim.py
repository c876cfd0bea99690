"""The stand-in as an engine kind: ``engine: sim``, for rehearsals, the demonstration and tests.

Its ``options`` are the flags of ``python -m vllmd.simengine`` with underscores
(``load_time: 3s``, ``wake_time: "1,4"``, ``fail: [crash-after=3]``). Its memory is
held in the ``file`` of each of its devices where they are declared with one, or in
``device_dir``: a directory of such files, one per device id. They are made when missing.
It sleeps, logs and fails as vLLM does, so this kind shares all of that with vLLM's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.engines import adapters
from vllmd.engines.base import Launch, Listen, Place
from vllmd.engines.options import text, unknown, words
from vllmd.engines.plain import environment
from vllmd.engines.vllm import Vllm, check_path

FLAGS = (
    "load_time",
    "sleep_time",
    "wake_time",
    "tokens_per_second",
    "prompt_overhead",
    "prompt_tokens_per_second",
    "max_num_seqs",
    "memory",
    "memory_starting",
    "memory_asleep",
    "weights",
    "device_memory",
    "dimensions",
    "keep_alive",
    "created",
    "fail_file",
)
LISTS = ("device_file", "cuda")
SWITCHES = ("quiet", "read_weights", "enable_request_id_headers")


class Sim(Vllm):
    """The stand-in engine, which speaks vLLM's protocol: another program, the same calls."""

    kind = "sim"
    OPTIONS = dict.fromkeys((*FLAGS, *LISTS, *SWITCHES, "fail", "device_dir"), "see python3 -m vllmd.simengine --help")

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """Both levels, unless ``sleep_mode`` is false."""
        return frozenset() if model.sleep_mode is False else frozenset({1, 2})

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """argv with every option as its flag. Raises ConfigError for an unknown one."""
        options = model.options
        unknown(model, self.OPTIONS)
        socket = place.run_dir / "engine.sock"
        check_path(socket, model)
        argv = [*(model.command or (sys.executable, "-m", "vllmd.simengine")), "--model", model.source]
        argv += ["--served-model-name", self.served_name(model), "--uds", str(socket)]
        # 1. Memory: what was promised, unless the options set another size.
        if place.memory and "memory" not in options:
            argv += ["--memory", str(place.memory)]
        if model.memory_asleep is not None and "memory_asleep" not in options:
            argv += ["--memory-asleep", str(model.memory_asleep)]
        argv += ["--max-model-len", str(model.max_model_len)] if model.max_model_len else []
        # 2. The options.
        argv += _options(model)
        # 3. The files in which it writes how much it holds of declared devices.
        directory = text(model, "device_dir")
        files = [str(Path(directory) / name) for name in place.device_ids] if directory else list(place.device_files)
        if files and "device_file" not in options:
            argv += ["--device-file", *files]
            argv += ["--device-memory", str(place.device_memory)] if "device_memory" not in options else []
        argv += [*model.extra_args, *adapters.vllm_flags(model, place.hub)]
        # 4. The environment: where this Python finds vllmd in a source tree; with real memory to hold its own devices,
        #    so that the numbers after --cuda count among those.
        env = {} if model.command else {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        env |= environment(model, place) if "cuda" in options else {}
        env |= {adapters.RUNTIME: "1"} if adapters.takes_adapters(model) and adapters.loads_late(model) else {}
        return Launch(tuple(argv), Listen(uds=str(socket)), env)


def _options(model: ModelConfig) -> list[str]:
    flags = []
    for name in FLAGS:
        if name in model.options:
            value = model.options[name]  # a list is written with commas, as --wake-time wants its two times
            flags += [_flag(name), ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    for name in LISTS:
        if values := words(model, name):
            flags += [_flag(name), *values]
    flags += [_flag(name) for name in SWITCHES if model.options.get(name)]
    return flags + [part for failure in words(model, "fail") for part in ("--fail", failure)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

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
        unknown(model, self.OPTIONS)
        socket = place.run_dir / "engine.sock"
        check_path(socket, model)
        command = model.command or (sys.executable, "-m", "vllmd.simengine")
        flags = ["--model", model.source, "--served-model-name", self.served_name(model), "--uds", str(socket)]
        lora = adapters.vllm_flags(model, place.hub)
        sized = (*_memory(model, place), *_options(model), *_devices(model, place))
        argv = (*command, *flags, *sized, *model.extra_args, *lora)
        return Launch(argv, Listen(uds=str(socket)), _env(model, place))


def _memory(model: ModelConfig, place: Place) -> list[str]:
    """The memory that was promised, unless the options set another size."""
    flags = []
    if place.memory and "memory" not in model.options:
        flags += ["--memory", str(place.memory)]
    if model.memory_asleep is not None and "memory_asleep" not in model.options:
        flags += ["--memory-asleep", str(model.memory_asleep)]
    return flags + (["--max-model-len", str(model.max_model_len)] if model.max_model_len else [])


def _options(model: ModelConfig) -> list[str]:
    flags = []
    for name in FLAGS:
        if name in model.options:
            flags += [_flag(name), _value(model.options[name])]
    for name in LISTS:
        if values := words(model, name):
            flags += [_flag(name), *values]
    flags += [_flag(name) for name in SWITCHES if model.options.get(name)]
    return flags + [part for failure in words(model, "fail") for part in ("--fail", failure)]


def _value(value: object) -> str:
    """A list is written with commas, as ``--wake-time`` wants its two times."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _devices(model: ModelConfig, place: Place) -> list[str]:
    directory = text(model, "device_dir")
    paths = [str(Path(directory) / name) for name in place.device_ids] if directory else list(place.device_files)
    if not paths or "device_file" in model.options:
        return []
    files = ["--device-file", *paths]
    made = ["--device-memory", str(place.device_memory)] if "device_memory" not in model.options else []
    return [*files, *made]


def _env(model: ModelConfig, place: Place) -> dict[str, str]:
    """Where this Python finds us, should we run from a source tree; with real memory to hold, its own devices.

    So the numbers after ``--cuda`` count among those.
    """
    root = str(Path(__file__).resolve().parents[2])
    devices = environment(model, place) if "cuda" in model.options else {}
    late = {adapters.RUNTIME: "1"} if adapters.takes_adapters(model) and adapters.loads_late(model) else {}
    return {**({} if model.command else {"PYTHONPATH": root}), **devices, **late}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

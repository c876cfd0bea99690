"""The command line as one frozen object. Sizes in bytes, times in seconds.

Two ways to call it. Its own: ``python -m vllmd.simengine --model M --uds PATH ...``.
And in vLLM's place: ``python -m vllmd.simengine serve M <vLLM's flags>``, where
unknown flags are passed over, the development routes need
``VLLM_SERVER_DEV_MODE=1``, sleeping frees memory only with
``--enable-sleep-mode``, and the stand-in's own flags come from ``$VLLMD_SIM_ARGS``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllmd.simengine.failures import FAILURES, Failures, parse

LONGEST = 32768  # tokens
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TIMES = {"": 1.0, "s": 1.0, "ms": 0.001, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Options:
    """What the stand-in was told to be."""

    model: str = "sim"
    served_model_name: tuple[str, ...] = ()
    uds: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    load_time: float = 0.0
    sleep_time: tuple[float, float] = (0.0, 0.0)  # by level, 1 and 2
    wake_time: tuple[float, float] = (0.0, 0.0)
    memory: int = 0
    memory_starting: int | None = None
    memory_asleep: int = 0
    weights: int | None = None
    device_file: tuple[str, ...] = ()
    device_memory: int = 0
    cuda: tuple[int, ...] = ()
    gpu_memory_utilization: float | None = None
    tokens_per_second: float = 0.0  # of each request; 0: as fast as it can
    prompt_overhead: float = 0.0
    prompt_tokens_per_second: float = 0.0
    max_num_seqs: int = 256
    max_model_len: int = LONGEST
    dimensions: int = 8
    keep_alive: float = 5.0
    created: int | None = None
    enable_request_id_headers: bool = False
    enable_sleep_mode: bool = True
    enable_lora: bool = False
    lora_modules: tuple[str, ...] = ()
    late_lora: bool = False  # adapters can be loaded while it runs
    dev_mode: bool = True
    read_weights: bool = False  # the file, or the folder, that the model is called by
    quiet: bool = False
    fail: tuple[str, ...] = ()
    fail_file: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names it answers to; the first is the one it gives."""
        return self.served_model_name or (self.model,)

    @property
    def failures(self) -> Failures:
        return Failures(self.fail, self.fail_file)


def parse_options(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Options:
    """Options from a command line; ends the process with a message where it is wrong, as argparse does."""
    if argv and argv[0] == "serve":
        return _parse_as_vllm(argv[1:], env)
    return _options(_parser().parse_args(argv), env)


def size(text: str) -> int:
    """A size in bytes from ``20GiB``, ``512M`` or ``1000``. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not match or match[2] == "i":
        raise argparse.ArgumentTypeError(f"{text!r} is no size; right are 20GiB, 512MiB, 1000")
    return round(float(match[1]) * _UNITS[match[2]])


def duration(text: str) -> float:
    """``2``, ``1.5s``, ``200ms``, ``2min``: seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|)", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; right are 2, 1.5s, 200ms, 2min")
    return float(match[1]) * _TIMES[match[2]]


def by_level(text: str) -> tuple[float, float]:
    """``2`` for both sleep levels, ``1,3`` for level 1 and level 2: seconds."""
    times = [duration(part) for part in text.split(",")]
    if len(times) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}: one time, or one for level 1 and one for level 2")
    return times[0], times[-1]


def context(text: str) -> int:
    """``4096``, or vLLM's ``auto``, as long as fits: tokens. To a model that is none, all of its own length fits."""
    if text == "auto":
        return LONGEST
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; right are 4096, auto") from None


def _failure(text: str) -> str:
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllmd.simengine",
        description="The stand-in engine: vLLM's HTTP surface without a model.",
        epilog="failures: " + "; ".join(f"{name}: {kind.meaning}" for name, kind in FAILURES.items()),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help="what it pretends to load")
    add("--served-model-name", nargs="+", help="the names it answers to")
    add("--uds", help="listen on this Unix socket, whose file it does not unlink (nor does vLLM)")
    add("--host")
    add("--port", type=int)
    add("--max-model-len", type=context, help="tokens, or auto; longer prompts are refused")
    add("--max-num-seqs", type=int, help="requests that run at a time; the others queue")
    add("--enable-lora", action="store_true", help="serve adapters; what they say is in capitals")
    add("--lora-modules", nargs="+", help="adapters from the start on, as JSON or NAME=PATH")
    for flag in ("--max-loras", "--max-lora-rank", "--max-cpu-loras"):
        add(flag, type=int, help="taken, and nothing else")
    add("--keep-alive", type=duration, help="seconds an idle connection is kept")
    add("--enable-request-id-headers", action="store_true", help="echo X-Request-Id")
    add("--quiet", action="store_true", help="no access log")

    add("--load-time", type=duration, help="from the start until it listens")
    add("--read-weights", action="store_true", help="read the model's files, which --load-time comes on top of")
    add("--sleep-time", type=by_level, help="to fall asleep: one time, or LEVEL1,LEVEL2")
    add("--wake-time", type=by_level, help="to wake: one time, or LEVEL1,LEVEL2 (level 2: in reload_weights)")
    add("--tokens-per-second", type=float, help="of each request; 0: as fast as it can")
    add("--prompt-overhead", type=duration, help="from admission to the first token")
    add("--prompt-tokens-per-second", type=float, help="added to the overhead by the prompt's length")

    add("--memory", type=size, help="bytes per device held when awake (20GiB)")
    add("--memory-starting", type=size, help="bytes held while loading; default: as awake")
    add("--memory-asleep", type=size, help="bytes held while asleep")
    add("--weights", type=size, help="the part of --memory that wake_up?tags=weights brings back; default: half")
    add("--device-file", nargs="+", help="pretended GPUs to hold the memory on (see vllmd.simengine.device)")
    add("--device-memory", type=size, help="make missing device files with so many bytes")
    add("--cuda", type=int, nargs="*", help="hold real memory on these CUDA devices (default 0) through torch")
    add("--gpu-memory-utilization", type=float, help="--memory as a fraction of the device")

    add("--dimensions", type=int, help="length of embeddings")
    add("--created", type=int, help="a fixed value for every 'created', to compare bytes")
    add("--fail", type=_failure, action="append", metavar="NAME[=VALUE]", help="see below; repeatable")
    add("--fail-file", help="a file whose lines are failures, read anew each time they matter")
    return parser


def _parse_as_vllm(argv: Sequence[str], env: Mapping[str, str]) -> Options:
    parser = _parser()
    parser.add_argument("--enable-sleep-mode", action="store_true", default=False)
    if argv and not argv[0].startswith("-"):  # the model's tag, vLLM's one positional argument
        argv = ["--model", *argv]
    given, _passed_over = parser.parse_known_args([*argv, *shlex.split(env.get("VLLMD_SIM_ARGS", ""))])
    given.dev_mode = env.get("VLLM_SERVER_DEV_MODE") == "1"
    return _options(given, env)


def _options(given: argparse.Namespace, env: Mapping[str, str]) -> Options:
    known = {field.name for field in fields(Options)}
    values: dict[str, Any] = {name: value for name, value in vars(given).items() if name in known}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    if values.get("cuda") == ():
        values["cuda"] = (0,)
    late = bool(values.get("enable_lora")) and env.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") in ("1", "true")
    return Options(**values, late_lora=late)


def main_options() -> Options:
    """The options of this process."""
    return parse_options(sys.argv[1:])

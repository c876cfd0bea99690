"""vLLM's log (0.32) of a start: its phases, why it failed, the memory that it took.

The lines are those of the wheel (``v1/worker/gpu_worker.py``, ``v1/worker/utils.py``,
``v1/core/kv_cache_utils.py``, ``compilation/monitor.py``, ...), with the prefix
``(EngineCore pid=12) INFO 11-20 19:00:00 [file.py:1]`` and perhaps colours.

Patterns are compiled, and kept, by ``re`` when the first engine starts: a tenth of what a daemon does before it
answers its first client was to compile them here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllmd.core.types import Footprint, Source
from vllmd.engines.base import Failure, Progress
from vllmd.engines.known_failures import known
from vllmd.sizes import GiB

_COLOURS = r"\x1b\[[0-9;]*m"
_PREFIX = r"^\([^)]*pid=\d+\)\s*(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (?:\.\d+ )?\[[^\]]*\]\s?)?"
_DETAIL = 160  # characters of a line that are worth showing: one lists vLLM's whole configuration
_NO_PATH = r"Repo id must be in the form.*?'(/[^']*)'"  # of a path: vLLM saw no directory there
_CONTEXT = GiB  # what CUDA's context and the allocator keep beside what vLLM lists, roughly

# Phase -> the log lines that show that it has begun. The first match counts.
PHASES: tuple[tuple[str, str], ...] = (
    ("nodes", r"^Waiting for Ray:"),
    ("configuring", r"non-default args:|Resolved architecture"),
    ("imports", r"^Using max model len"),  # the engine core is a process of its own, and imports anew
    ("workers", r"Initializing a V1 LLM engine"),  # likewise, where there are several devices, or none
    ("download", r"Downloading|Fetching \d+ files|\.(?:safetensors|bin|gguf)[^|]{0,80}:\s{1,9}\d+%\|"),
    ("weights", r"Starting to load model|Time spent downloading weights|Loading safetensors"),
    ("profiling", r"Model loading took ([\d.]+) GiB"),
    (
        "compile",
        r"Dynamo bytecode transform|Compiling a graph|Using cache directory|Starting torch\.comp"
        r"|Warming up model for the compilation|Compiling model again due to a load failure",
    ),
    ("profiling", r"torch\.compile took|Directly load |^Warming up done|saved AOT compiled function"),
    ("graphs", r"GPU KV cache size:|Capturing CUDA graphs"),
    ("warm-up", r"KV cache size:|Graph capturing finished"),
    ("serving", r"init engine \(profile|Starting vLLM server on|Application startup complete"),
)

_ERROR = r"^(?:[\w.]*\.)?(\w*(?:Error|Exception|Interrupt)): (.+)"
_VALUE_ERROR = r"^\s*Value error, (.+?)(?: \[type=.*)?$"  # in pydantic's words, under its own error
# Errors that only say that there was one before: vLLM's worker processes report to the core, the core to the server.
_CONSEQUENCE = (
    r"Engine core initialization failed|Engine process failed to start|See root cause above"
    r"|WorkerProc initialization failed|WorkerProc failed to start|EngineCore encountered an issue"
    r"|[Ss]ee (?:the )?stack trace|check the stack trace above|Connection closed by peer|Broken ?[Pp]ipe"
    r"|ConnectionResetError|EOFError|DistBackendError: .*\[Rank|KeyboardInterrupt|CancelledError"
    r"|^RuntimeError: cancelled$"
)
# What is said of a process that ended: by the core of a worker, by the server of the core. One that ended by a signal
# did so without a word; one that exited has told why before.
_KILLED = r"died unexpectedly \(exit code: -"
_ENDED = r"died unexpectedly|EngineDeadError: "
_FREE_MEMORY = r"less than (?:desired GPU memory util|the engine's budget).*?\([\d.]+, ([\d.]+) GiB\)"
_MEMORY = (
    r"(?i)less than desired GPU memory utilization|less than the engine's budget|out of memory|OutOfMemoryError"
    r"|No available memory for the cache blocks|larger than the available KV cache|not enough GPU memory"
    r"|Error in memory profiling"
)
_PERMANENT = (
    r"unrecognized arguments|error: argument|the following arguments are required|invalid choice"
    r"|Sleep mode is not supported|is not a local folder|is not a valid model identifier|Repo id must be"
    r"|RepositoryNotFoundError|GatedRepoError|Repository Not Found|gated repo|trust_remote_code"
    r"|does not appear to have a file named|Unrecognized model|are not supported for now|ModuleNotFoundError"
    r"|LocalEntryNotFoundError"
    r"|PackageNotFoundError|Invalid repository ID or local directory|No module named|validation errors? for"
    r"|greater than the derived max_model_len|is not divisible by|must be divisible by"
)

_SIZES = {
    "weights": r"Model loading took ([\d.]+) GiB",
    "graphs": r"Graph capturing finished in [\d.]+ secs, took (-?[\d.]+) GiB",
    "cache": r"Available KV cache memory: ([\d.]+) GiB",
}
_ACTUAL = (
    r"Actual usage is ([\d.]+) GiB for consumed memory \(weights \+ non-torch\), ([\d.]+) GiB for peak activation, "
    r"and ([\d.]+) GiB for CUDAGraph memory\..*Current kv cache memory in use is ([\d.]+) GiB"
)


def clean(line: str) -> str:
    """A line without colours and vLLM's prefix."""
    return re.sub(_PREFIX, "", re.sub(_COLOURS, "", line)).rstrip()


def progress(line: str) -> Progress | None:
    """The phase that a line begins, with the line itself, or its beginning, as the detail."""
    text = clean(line)
    for phase, pattern in PHASES:
        if re.search(pattern, text):
            detail = text if len(text) <= _DETAIL else f"{text[:_DETAIL]}..."
            return Progress(phase, detail, once=phase == "compile")
    return None


def failure(lines: Sequence[str]) -> Failure:
    """The root of a failed start: the last error that is not the consequence of another, and what would help."""
    texts = [text for text in map(clean, lines) if text]
    # 1. The reason: an error, else a complaint of the command line, else the first process to end, else the last line.
    errors = [error for text in texts if (error := _error(text))]
    usage = [text for text in texts if ": error: " in text]
    ended = [text for text in texts if re.search(_ENDED, text)][:1]
    reason = (errors or usage or ended or texts or ["it said nothing"])[-1]
    # 2. What is known of it. A row for the reason itself goes before one for an earlier error.
    match = known([reason]) or known(text for text in reversed(texts) if _error(text) or ": error: " in text)
    advice, row = (match[1], match[2]) if match else ("", None)
    if no_path := re.search(_NO_PATH, reason):  # Hugging Face takes a path that is none for a repository's name
        advice = f"there is no directory {no_path[1]}, or the engine's user may not look into it"
    # 3. Whether more memory would help, and how much: vLLM's check of free memory tells.
    wanted = next((each for text in texts if (each := re.search(_FREE_MEMORY, text))), None)
    needed = round(float(wanted[1]) * GiB) if wanted else None
    memory = needed is not None or re.search(_MEMORY, reason) is not None or (row is not None and row.memory)
    wrong = any(re.search(_PERMANENT, text) for text in (reason, *texts[-3:])) or (row is not None and row.permanent)
    return Failure(reason, memory, wrong and not memory, needed, advice)


def _error(text: str) -> str:
    """The error that a line contains, "" if none, or only that there was one."""
    if match := re.match(_VALUE_ERROR, text):
        return f"ValueError: {match[1]}"
    is_error = re.match(_ERROR, text) or re.search(_KILLED, text)
    return text if is_error and not re.search(_CONSEQUENCE, text) else ""


def footprint(lines: Sequence[str]) -> Footprint | None:
    """The memory per device that a successful start reports; None where it does not (on a CPU, say).

    One line has all of it; without that line weights, cache and graphs are added up. Only a start that captured graphs
    ran on a GPU.
    """
    texts = [clean(line) for line in lines]
    whole = next((match for text in texts if (match := re.search(_ACTUAL, text))), None)
    if whole:
        awake = round(sum(map(float, whole.groups())) * GiB)
    else:
        sizes = []
        for name in ("weights", "cache", "graphs"):
            matches = [match for text in texts if (match := re.search(_SIZES[name], text))]
            if not matches:
                return None
            sizes.append(round(float(matches[-1][1]) * GiB))
        awake = sizes[0] + sizes[1] + max(sizes[2], 0) + _CONTEXT
    return Footprint(starting=awake, awake=awake, source=Source.MEASURED) if awake else None

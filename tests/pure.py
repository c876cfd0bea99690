"""Which tests are pure: no process, no socket, so that no load of the machine can fail them. `make unit` runs these.

The list is held to its word: in a pure test whatever starts a process or binds or connects a socket raises.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from pathlib import Path

PURE = (
    "admin/test_counters.py",
    "admin/test_relabel.py",
    "config/test_config_edit.py",
    "config/test_config_errors.py",
    "config/test_config_present.py",
    "core/*",
    "daemon/test_admission_gate.py",
    "daemon/test_dispatcher.py",
    "daemon/test_failure_text.py",
    "daemon/test_idle_exit.py",
    "daemon/test_learnt.py",
    "api/test_names.py",
    "daemon/test_preflight.py",
    "daemon/test_request_log.py",
    "engines/test_command.py",
    "engines/test_kinds.py",
    "engines/test_known_failures.py",
    "engines/test_loaders.py",
    "engines/test_looks.py",
    "engines/test_registry.py",
    "engines/test_vllm.py",
    "engines/test_vllm_log.py",
    "estimate/*",
    "gpu/test_declared.py",
    "launcher/test_protocol.py",
    "ollama/test_answers.py",
    "ollama/test_files.py",
    "ollama/test_requests.py",
    "store/test_names.py",
    "proxy/test_framing.py",
    "test_bench_check.py",
    "test_sizes.py",
    "proxy/test_heads.py",
    "proxy/test_peek.py",
    "simengine/test_options.py",
    "simulate/test_engine.py",
    "simulate/test_trace.py",
)
# Pure as well, but they try thousands of cases and take longer than one wants to wait at each save.
SLOW = ("core/test_moves.py", "core/test_random.py", "proxy/test_peek.py")
FORBIDDEN = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "socket.bind", "socket.connect"})

_TESTS = Path(__file__).parent
_running = ""  # the pure test that runs


@functools.cache
def is_pure(path: Path) -> bool:
    """Whether a file's tests are."""
    name = path.relative_to(_TESTS).as_posix() if path.is_relative_to(_TESTS) else ""
    return any(fnmatch.fnmatch(name, each) for each in PURE) and name not in SLOW


def begin(test: str) -> None:
    """Hold this test to its word; "" for one that promised nothing."""
    global _running
    _running = test


def _watch(event: str, _: object) -> None:
    if _running and event in FORBIDDEN:
        raise AssertionError(f"{_running} is listed as pure in tests/pure.py, and did {event}")


sys.addaudithook(_watch)


def main() -> None:
    """Print the pure files, for ``make unit``: collecting all others takes longer than running these."""
    found = sorted(path for path in _TESTS.rglob("test_*.py") if is_pure(path))
    print(*(path.relative_to(_TESTS.parent) for path in found))


if __name__ == "__main__":
    main()

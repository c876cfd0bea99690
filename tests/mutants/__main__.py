"""Deliberate mutations: each breaks a promise, and some test must notice. ``make mutants`` lists survivors.

A mutation is a line of the program and what it becomes; it is applied to a copy
of the repository, and the tests named beside it are run there until the first fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("vllmd", "tests", "pyproject.toml")
PASSED, FAILED = 0, 1  # pytest's exit statuses
LIMIT = 600.0  # seconds for the tests of one mutation; one that hangs has been noticed


class Mutation(NamedTuple):
    """``old`` is found exactly once in ``file``, which is in ``vllmd/``; ``tests`` are relative to ``tests/``."""

    promise: str
    file: str
    old: str
    new: str
    tests: str = "core/test_survivors.py"


REPLICAS, JOBS, ALL_CORE = "core/test_replicas.py", "core/test_jobs.py", "core"
MUTATIONS = (
    Mutation("nothing starts on a wedged device", "core/policy_input.py", "if account.avoided:", "if False:"),
    Mutation("a swap starts nothing there", "core/fit.py", "-1 if a.avoided else a.free + held", "a.free + held"),
    Mutation("frozen requests are regretted", "core/pricing.py", "+ left * (away + 0.5)", "+ 0.0 * left"),
    Mutation("sets of victims are searched", "core/eviction.py", "if len(chosen) + 1 < most:", "if False:"),
    Mutation(
        "preloading waits for a device",
        "core/planner.py",
        "elif not any(supply.until or supply.claimed for supply in self.look().supplies.values()):",
        "else:",
    ),
    Mutation(
        "Retry-After of a model that serves",
        "core/admission.py",
        'return max(1.0, r.costs.seconds("service"))',
        "return 1.0",
    ),
    Mutation(
        "Retry-After of one that does not",
        "core/admission.py",
        "return max(1.0, r.load_time)",
        "return 1.0",
    ),
    Mutation(
        "one command at a time on a device",
        "core/engine_table.py",
        "return not any(self._busy.get(index, r) is not r for index in r.placement.devices)",
        "return True",
    ),
    Mutation(
        "one more replica is asked for once",
        "core/operator_commands.py",
        "if not asks:",
        "if True:",
        REPLICAS,
    ),
    Mutation(
        "two at once for a pool go to two models",
        "core/admission.py",
        "model.promised = (*model.promised, core.now)",
        "pass",
        "core/test_answers.py",
    ),
    Mutation(
        "what is used is not changed",
        "core/operator_commands.py",
        "if used:",
        "if False:",
        "core/test_answers.py",
    ),
    Mutation(
        "a model that gets replicas keeps its engine",
        "core/types.py",
        "return before[0], after[0]",
        "return None",
        REPLICAS,
    ),
    Mutation(
        "a load does not call off what must leave",
        "core/lifecycle.py",
        "Current.MUST: (_A,",
        "Current.MUST: (_T,",
        JOBS,
    ),
    Mutation(
        "who is made to leave comes back if it was wanted",
        "core/jobs.py",
        "requested.then = requested.then or wanted_start(job)",
        "pass",
        JOBS,
    ),
    Mutation(
        "a swap ends when a victim stays",
        "core/swaps.py",
        "if stays and t not in why:",
        "if False:",
        JOBS,
    ),
    Mutation(
        "an engine with frozen requests wakes before it stops",
        "core/engine_table.py",
        "job = merge(r.job, moving or frozen, new)",
        "job = merge(r.job, moving, new)",
        JOBS,
    ),
    Mutation(
        "a start for lack of memory is tried once more only",
        "core/engine_table.py",
        "r.job.retried = True",
        "pass",
        JOBS,
    ),
    Mutation(
        "a request calls off what a sleeper does for itself",
        "core/scheduler.py",
        "if r.demand and r.job and (",
        "if False and (",
        JOBS,
    ),
    Mutation(
        "a request that was answered in part is not sent again",
        "proxy/forward.py",
        "self._resend = untouched and",
        "self._resend =",
        "proxy/test_relay.py",
    ),
    Mutation(
        "a paused connection is read again when it is kept",
        "proxy/upstream.py",
        "        if self._paused:\n            self.resume()",
        "        pass",
        "proxy/test_upstream.py",
    ),
    Mutation(
        "heads are remembered up to a size", "proxy/heads.py", "len(raw) <= MEMO_SIZE", "True", "proxy/test_heads.py"
    ),
    Mutation(
        "a failed command takes no other along",
        "daemon/dispatcher.py",
        'log.exception("could not carry out %s", command)',
        "break",
        "daemon/test_dispatcher.py",
    ),
    Mutation(
        "no idle exit while clients are connected",
        "daemon/chores.py",
        "or front.listeners.connections",
        "or False",
        "daemon/test_idle_exit.py",
    ),
    Mutation(
        "a crash is a failure",
        "daemon/changes.py",
        'events.EngineExited: ("exit", True)',
        'events.EngineExited: ("exit", False)',
        "daemon/test_changes.py",
    ),
    Mutation(
        "a timer that was put off rings no earlier",
        "core/timers.py",
        "while heap and heap[0][0] != heap[0][2].due:",
        "while False:",
        "core/test_timers.py",
    ),
    Mutation(
        "a lease on an unused model is shown",
        "core/scheduler.py",
        "model.unused_view = None",
        "pass",
        "core/test_views.py",
    ),
    Mutation(
        "sleepers that may stop are looked at",
        "core/policies.py",
        "return not there.light or not if_the_light_left(supply, there, w)",
        "return True",
        "core/test_shortcuts.py",
    ),
    Mutation(
        "what starts slowly is not stopped for room",
        "core/policies.py",
        "if anew >= min([s.knobs.deadline",
        "if False and min([s.knobs.deadline",
        "core/test_policies.py",
    ),
    Mutation("the policy sees each request", "core/common.py", "self.used[r] = None", "pass", ALL_CORE),
    Mutation("one late answer is no outlier", "core/health.py", "if h.late >= ENOUGH_ANSWERS and", "if", REPLICAS),
    Mutation(
        "two choices weigh what runs",
        "core/balancing.py",
        "slowness(r, now) * (len(r.running) + 1)",
        "slowness(r, now)",
        REPLICAS,
    ),
    Mutation(
        "what an operator took down stays down",
        "core/balancing.py",
        "if r.removed or r.disabled_because or (r.health and r.health.halted):",
        "if r.removed or r.disabled_because:",
        ALL_CORE,
    ),
    Mutation(
        "nobody waits for a disabled replica",
        "core/balancing.py",
        "if r.removed or r.disabled_because or (r.health and r.health.halted):",
        "if r.removed or (r.health and r.health.halted):",
        "core/test_disabled.py",
    ),
    Mutation(
        "a disabled replica is not one of those that are missing",
        "core/scaling.py",
        "if not r.disabled_because and not (r.health",
        "if not (r.health",
        "core/test_disabled.py",
    ),
    Mutation(
        "keys take turns in a queue",
        "core/queues.py",
        "self._keys[key] = self._keys.pop(key)",
        "pass",
        "core/test_requests.py",
    ),
    Mutation(
        "a failed sleep is stopped in full",
        "core/engine_events.py",
        "r.sleep_failures += 1",
        "pass",
        "core/test_failures.py",
    ),
    Mutation(
        "an operator's pin outlives a reload",
        "core/operator_commands.py",
        "if r.pinned == r.spec.pinned:",
        "if True:",
        "core/test_wishes.py",
    ),
    Mutation(
        "the last lease stops the model",
        "core/operator_commands.py",
        "if stop and not r.kept:",
        "if False:",
        "core/test_wishes.py",
    ),
    Mutation(
        "requests are cut at the drain limit once", "core/engine_table.py", "r.job.cut_at = INFINITY", "pass", ALL_CORE
    ),
    Mutation(
        "host memory stays booked after a wake",
        "core/engine_table.py",
        "keeps = r.level == 1 or (r.slept_shallow and r.spec.keeps_host)",
        "keeps = r.level == 1",
        ALL_CORE,
    ),
    Mutation(
        "a measured footprint replaces the booking",
        "core/engine_table.py",
        "settled = self.now - r.changed >= SETTLED_AFTER",
        "settled = True",
        "core/test_failures.py",
    ),
)


def noticed(mutation: Mutation, copy: Path) -> bool:
    """Whether a test fails with the mutation in ``copy``, which is left as it was."""
    path = copy / "vllmd" / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutation.tests}"]
    try:
        # Without bytecode: by that of the mutation before, one of the same size in the same second would not be seen.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(argv, cwd=copy, env=environment, capture_output=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text)
    if done.returncode not in (PASSED, FAILED):  # neither: the tests were not run to their end
        raise RuntimeError(f"{mutation.promise}: pytest ended with {done.returncode}: {done.stdout[-500:]!r}")
    return done.returncode == FAILED


def main() -> int:
    """Try all, or those whose promise has one of the words given; 1 if any survives."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.promise for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source = REPOSITORY / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, Path(folder) / name)
        for mutation in chosen:
            killed = noticed(mutation, Path(folder))
            survivors += [] if killed else [mutation.promise]
            print(f"{'noticed ' if killed else 'SURVIVED'}  {mutation.promise} ({mutation.file})", flush=True)
    print(f"{len(survivors)} of {len(chosen)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

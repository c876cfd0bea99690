"""How failures are told: the cause first; the log to operators, one line to clients."""

from __future__ import annotations

from vllmd.daemon.failure_text import for_clients, tells_error, with_last_lines, without_leaks

LONG = ["loading", "ValueError: the root", *[f"traceback {number}" for number in range(60)], "RuntimeError: see above"]


def test_the_root_is_shown_with_what_stands_around_it() -> None:
    """Sixty lines of other processes' tracebacks come after it."""
    told = with_last_lines("it failed", LONG, "ValueError: the root").splitlines()
    assert told[1:4] == ["loading", "ValueError: the root", "traceback 0"]
    assert told[-1] == "RuntimeError: see above"
    assert "[...]" in told


def test_a_root_among_the_last_lines_is_not_told_twice() -> None:
    """The usual case stays short."""
    told = with_last_lines("it failed", ["a", "ValueError: the root", "b"], "ValueError: the root")
    assert told.count("the root") == 1


def test_a_client_gets_the_cause_in_one_line_without_the_machines_folders() -> None:
    """Logs and paths are the operator's; a URL is no path."""
    reason = with_last_lines("m exited: no file /home/ada/models/x.gguf; see http://a.example/b/c", LONG)
    assert for_clients(reason) == "m exited: no file \N{HORIZONTAL ELLIPSIS}/x.gguf; see http://a.example/b/c"


def test_what_leaked_at_the_exit_hides_no_reason() -> None:
    """A real vLLM's last lines: three processes list what Triton leaked, and the reason is further above."""
    died = "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor."
    leaks = [
        "nanobind: leaked 514 functions!",
        ' - leaked function "create_unsplat"',
        ' - leaked type "triton._C.libtriton.ir.location"',
        " - ... skipped remainder",
        "nanobind: this is likely caused by a reference counting issue in the binding code.",
        "See https://nanobind.readthedocs.io/en/latest/refleaks.html",
    ]
    assert without_leaks([died, *leaks, " - another"]) == [died, " - another"]
    assert tells_error(died)

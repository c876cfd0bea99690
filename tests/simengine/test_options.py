"""The command line: what is accepted, and what is said of the rest."""

from __future__ import annotations

import pytest

from vllmd.simengine.failures import FAILURES, Failures, parse
from vllmd.simengine.options import Options, by_level, duration, parse_options, size

GiB = 1 << 30


@pytest.mark.parametrize(
    ("text", "value"), [("20GiB", 20 * GiB), ("1.5Gi", 3 * GiB // 2), ("2GB", 2 * 10**9), ("7", 7), ("1kib", 1024)]
)
def test_sizes(text: str, value: int) -> None:
    """As in the configuration."""
    assert size(text) == value


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("200ms", 0.2), ("1.5s", 1.5), ("2min", 120), ("1h", 3600)])
def test_durations(text: str, value: float) -> None:
    """As in the configuration."""
    assert duration(text) == value


def test_a_context_as_long_as_fits() -> None:
    """vLLM's word for it; to a model that is none, its own length fits."""
    assert parse_options(["--max-model-len", "auto"], {}).max_model_len == Options().max_model_len
    assert parse_options(["--max-model-len", "77"], {}).max_model_len == 77


def test_times_by_level() -> None:
    """One for both levels, or one for each."""
    assert by_level("2") == (2, 2)
    assert by_level("100ms,3") == (0.1, 3)


def test_in_vllms_place_it_takes_vllms_command_line() -> None:
    """So that the vllm engine kind's own argv can be run without a GPU."""
    argv = ["serve", "org/model", "--uds", "/s", "--served-model-name", "m", "--tensor-parallel-size", "2", "--async"]
    options = parse_options(argv, {"VLLMD_SIM_ARGS": "--load-time 2s --fail hang"})
    assert (options.model, options.names, options.uds) == ("org/model", ("m",), "/s")
    assert (options.load_time, options.fail) == (2.0, ("hang",))
    assert (options.dev_mode, options.enable_sleep_mode) == (False, False)


def test_in_vllms_place_sleep_needs_vllms_switches() -> None:
    """Development mode by the environment, sleep mode by the flag."""
    options = parse_options(["serve", "m", "--enable-sleep-mode"], {"VLLM_SERVER_DEV_MODE": "1"})
    assert (options.dev_mode, options.enable_sleep_mode) == (True, True)


def test_by_itself_it_can_sleep() -> None:
    """The stand-in's own command line needs no switches."""
    options = parse_options(["--model", "m", "--cuda"], {})
    assert (options.dev_mode, options.enable_sleep_mode, options.cuda) == (True, True, (0,))
    assert options == Options(model="m", cuda=(0,))


@pytest.mark.parametrize(
    "argv",
    [["--nonsense"], ["--max-model-len", "long"], ["--memory", "lots"], ["--fail", "odd"], ["--load-time", "soon"]],
)
def test_what_is_wrong_is_said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """argparse's way: the flag, the reason, status 2."""
    with pytest.raises(SystemExit) as end:
        parse_options(argv, {})
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_every_failure_is_explained() -> None:
    """The help is made from the table."""
    assert all(kind.meaning for kind in FAILURES.values())


@pytest.mark.parametrize(
    ("text", "what"), [("crash", "known: never-ready"), ("hang=1", "takes no value"), ("slow-exit=x", "takes a number")]
)
def test_a_wrong_failure_names_what_is_right(text: str, what: str) -> None:
    """A misspelt rehearsal must not rehearse nothing."""
    with pytest.raises(ValueError, match=what):
        parse(text)


def test_a_failures_value() -> None:
    """Given, by default, or not in force."""
    failures = Failures(("slow-exit=2", "crash-after", "hang"))
    assert (failures.get("slow-exit"), failures.get("crash-after"), failures.get("hang")) == (2, 1, 1)
    assert failures.get("dead") is None
    assert "dead" not in failures

"""What is known before anything runs: sizes that cannot be, engines that do not exist, and that nobody else suffers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vllmd.config.types import Config, DeviceConfig, ModelConfig
from vllmd.core.types import Device
from vllmd.daemon.check import EX_CONFIG, check
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.homes import Homes
from vllmd.daemon.preflight import MOST_TOLD, Machine, ModelCheck, doubtful, look, say, wrong
from vllmd.daemon.specs import replica_spec
from vllmd.engines import engine_kind
from vllmd.engines.base import Place
from vllmd.engines.unusable import Unusable
from vllmd.engines.vllm import ROUTES, Vllm
from vllmd.errors import ConfigError
from vllmd.sizes import GiB

MACHINE = Machine((Device(0, "0", 80 * GiB, GiB // 2),), Homes(Path("/nowhere")), Path("/run/vllmd-engine"))


def sim(name: str, size: int = 10 * GiB, **more: object) -> ModelConfig:
    return ModelConfig(name, engine="sim", gpu_memory=size, **more)  # type: ignore[arg-type]


def prospects(*models: ModelConfig) -> list[ModelCheck]:
    return look(models, MACHINE, EngineResolver(quiet=True))


def test_what_fits_is_not_spoken_of() -> None:
    """Neither wrong nor doubtful."""
    found = prospects(sim("a"), sim("b", 79 * GiB))
    assert (wrong(found), doubtful(found, MACHINE)) == ([], [])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (sim("large", 90 * GiB), ["large needs 90 GiB on 1 device", "79.5 GiB"]),
        (sim("wide", tensor_parallel_size=2), ["wide needs 2 devices, and there is 1 for it"]),
        (sim("elsewhere", devices=(3,)), ["elsewhere needs 1 device, and there are none for it"]),
        (
            sim("odd", options={"lod_time": "1s"}),
            ["models.odd.options.lod_time: unknown option; did you mean load_time?"],
        ),
        (ModelConfig("none", engine="nonesuch", where="f.yaml:3"), ["f.yaml:3: models.none.engine: unknown engine"]),
    ],
)
def test_what_can_never_work_is_found_with_the_reason(model: ModelConfig, words: list[str]) -> None:
    """Before the first client has to hear it."""
    (mistake,) = wrong(prospects(model, sim("good")))
    assert all(word in mistake for word in words)


def test_pins_that_fill_the_device_are_doubtful() -> None:
    """It works, but nobody else will be served."""
    found = prospects(sim("a", 40 * GiB, pin=True), sim("b", 39 * GiB, pin=True), sim("c"))
    assert wrong(found) == []
    assert doubtful(found, MACHINE) == [
        "the pinned models fill the devices: a 40 GiB + b 39 GiB = 79 GiB of 79.5 GiB; no other model can be loaded"
    ]


def test_the_log_has_the_arithmetic(caplog: pytest.LogCaptureFixture) -> None:
    """Where a figure came from is asked more often than what it is."""
    caplog.set_level(logging.INFO)
    say(prospects(sim("a"), sim("large", 90 * GiB)), MACHINE)
    assert "a: expected to take 10 GiB per device: 10 GiB: as a stand-in is configured" in caplog.text
    assert [record.levelname for record in caplog.records if "large needs" in record.message] == ["ERROR"]


def test_of_many_models_the_log_has_what_is_wrong_and_the_arithmetic_of_some(caplog: pytest.LogCaptureFixture) -> None:
    """journald would lose lines of ten thousand at once, among them those that somebody needs."""
    caplog.set_level(logging.INFO)
    say(prospects(*(sim(f"m{n}") for n in range(2 * MOST_TOLD)), sim("large", 90 * GiB)), MACHINE)
    first, *others, last = caplog.messages
    assert "large needs 90 GiB" in first
    assert len(others) == MOST_TOLD and all(": expected to take" in line for line in others)
    assert last == f"`vllmd --check` tells what {MOST_TOLD + 1} more models are expected to take"


def test_the_core_is_told_sizes_and_settings() -> None:
    """What was measured under other settings will not be taken for these."""
    (a, b) = prospects(sim("a"), sim("a", max_model_len=100))
    first, second = replica_spec(a.model, a.engine, a.estimate), replica_spec(b.model, b.engine, b.estimate)
    assert first.footprint == second.footprint
    assert first.settings != second.settings


class Defective(Vllm):
    """A kind of our own with a defect."""

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        raise ZeroDivisionError("oops")


def test_a_defect_in_an_engine_kind_fails_its_model_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon opens, and every start of that model says why not."""
    kind = engine_kind("sim")
    monkeypatch.setattr("vllmd.engines.engine_kind", lambda name: Defective() if name == "bad" else kind)
    engines = EngineResolver()
    engine = engines(ModelConfig("m", engine="bad"))
    assert isinstance(engine, Unusable)
    assert "ZeroDivisionError: oops" in caplog.text
    assert engine.routes(ModelConfig("m")) == ROUTES
    with pytest.raises(ConfigError, match="the engine 'bad' failed: ZeroDivisionError: oops"):
        engine.launch(ModelConfig("m"), Place(Path("/r")))
    assert engines(sim("a")) is kind


def test_an_engine_is_looked_for_once_per_configuration(caplog: pytest.LogCaptureFixture) -> None:
    """The model list asks at every call; the log should not hear of it each time."""
    engines, model = EngineResolver(), ModelConfig("m", engine="nonesuch")
    assert engines(model) is engines(model)
    assert caplog.text.count("unknown engine") == 1
    assert engines(ModelConfig("m", engine="sim")) is engine_kind("sim")


def test_the_check_fails_with_everything_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """``vllmd --check``: one line per mistake on stderr, and sysexits' EX_CONFIG."""
    models = {model.name: model for model in (sim("a"), sim("large", 90 * GiB), ModelConfig("odd", engine="nonesuch"))}
    config = Config(devices=(DeviceConfig(80 * GiB),), models=models)
    assert check(config, {}) == EX_CONFIG
    told = capsys.readouterr()
    assert "large needs 90 GiB" in told.err
    assert "unknown engine 'nonesuch'" in told.err
    assert told.out == ""


def test_the_check_shows_what_each_model_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    """What is right is shown as well: it may still not be what was meant."""
    assert check(Config(devices=(DeviceConfig(80 * GiB),), models={"a": sim("a")}), {}) == 0
    told = capsys.readouterr()
    assert "valid: 1 models (a)" in told.out
    assert "a: 10 GiB per device: 10 GiB: as a stand-in is configured" in told.out

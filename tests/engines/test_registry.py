"""Finding an engine kind: built in, from a plug-in, or not at all; and never at the daemon's expense."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllmd.config.engine_kinds import ALSO, ENGINE_KINDS
from vllmd.config.types import ModelConfig
from vllmd.engines import BUILT_IN, engine_kind, engine_names, engine_of
from vllmd.engines.base import Engine, Place
from vllmd.engines.guard import missing_methods
from vllmd.errors import ConfigError

PLUG_INS = """
from vllmd.engines.vllm import Vllm

class Good(Vllm):
    kind = "good"

class Rotten(Vllm):
    def launch(self, model, place):
        raise RuntimeError("no disk")
    def progress(self, line):
        raise RuntimeError("no eyes")
    def failure(self, lines):
        raise RuntimeError("no ears")

class Half:
    def launch(self, model, place): ...

class Explodes:
    def __init__(self):
        raise OSError("no licence")
"""
ENTRIES = """
[vllmd.engines]
good = plugged:Good
rotten = plugged:Rotten
half = plugged:Half
explodes = plugged:Explodes
absent = nowhere:Nothing
"""


@pytest.fixture
def _plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution installed beside us that brings engines."""
    (tmp_path / "plugged.py").write_text(PLUG_INS)
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    engine_kind.cache_clear()
    yield
    engine_kind.cache_clear()
    sys.modules.pop("plugged", None)


NEEDED = {"triton": {"repository": "/models"}, "remote": {"url": "http://127.0.0.1:1"}}


def test_the_configuration_knows_the_kinds_by_name() -> None:
    """``defaults`` has settings by kind, and must not need the kinds themselves for that."""
    assert {*ENGINE_KINDS, *ALSO} == set(BUILT_IN)
    assert all(BUILT_IN[name] == BUILT_IN[one] for name, one in ALSO.items())


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_kind_keeps_the_contract(name: str) -> None:
    """Named in the table, importable, complete, with what plug-ins may leave out."""
    model = ModelConfig("m", engine=name, options=NEEDED.get(name, {}))
    engine = engine_of(model)
    assert missing_methods(engine) == []
    assert (engine.alive(model).method, engine.device_count(model)) == ("GET", 0 if name == "remote" else 1)
    assert engine.busy() is None or name == "comfyui"


def test_an_unknown_engine_names_the_nearest() -> None:
    """And all others, and where the model is configured."""
    with pytest.raises(ConfigError) as error:
        engine_of(ModelConfig("m", engine="vlm", where="a.yaml:3"))
    what = "a.yaml:3: models.m.engine: unknown engine 'vlm'; did you mean 'vllm'? (known: "
    assert error.value.message.startswith(what)


@pytest.mark.usefixtures("_plug_ins")
def test_a_plug_in_is_found_by_its_entry_point() -> None:
    """Installing the package is all that a user does."""
    engine: Engine = engine_kind("good")
    assert engine.launch(ModelConfig("m"), Place(Path("/r"))).argv[:3] == ("vllm", "serve", "m")
    assert "good" in engine_names()


@pytest.mark.usefixtures("_plug_ins")
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("explodes", "cannot be loaded: OSError: no licence"),
        ("absent", "cannot be loaded: ModuleNotFoundError"),
        ("half", "lacks sleep_levels, ready, sleep"),
    ],
)
def test_a_broken_plug_in_is_an_error_of_the_configuration(name: str, what: str) -> None:
    """Of the models that name it, and of nobody else."""
    with pytest.raises(ConfigError, match=what):
        engine_kind(name)
    assert engine_kind("vllm").kind == "vllm"


@pytest.mark.usefixtures("_plug_ins")
def test_what_a_plug_in_raises_later_names_it(caplog: pytest.LogCaptureFixture) -> None:
    """A defect of a third party's becomes a model that does not start, with the traceback in our log."""
    engine = engine_kind("rotten")
    what = "'rotten' failed in launch: RuntimeError: no disk"
    with caplog.at_level(logging.ERROR), pytest.raises(ConfigError, match=what):
        engine.launch(ModelConfig("m"), Place(Path("/r")))
    assert "Traceback" in caplog.text


@pytest.mark.usefixtures("_plug_ins")
def test_a_plug_in_that_cannot_read_its_log_does_not_stop_a_start() -> None:
    """Reading logs is a courtesy."""
    engine = engine_kind("rotten")
    assert engine.progress("line") is None
    assert engine.failure(["last words"]).reason == "last words"

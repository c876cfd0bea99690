"""The stand-in as an engine kind: its options, and its process driven through the contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.driven import LIMIT, Driven
from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of
from vllmd.engines.base import Launch, Place
from vllmd.errors import ConfigError
from vllmd.simengine.device import device_usage, make_device
from vllmd.simengine.options import Options, parse_options
from vllmd.sizes import GiB


def options_of(launch: Launch) -> Options:
    """What the stand-in makes of a command line."""
    return parse_options(launch.argv[3:], {})


def sim(**options: object) -> ModelConfig:
    return ModelConfig("m", engine="sim", options=options)


def launched(model: ModelConfig, place: Place) -> Options:
    return options_of(engine_of(model).launch(model, place))


def test_options_become_flags() -> None:
    """All of the stand-in's flags can be written in a configuration."""
    options = launched(
        sim(load_time="2s", wake_time=[1, "3s"], max_num_seqs=4, fail=["hang", "slow-exit=2"], quiet=True, cuda=[0, 1]),
        Place(Path("/r")),
    )
    assert (options.load_time, options.wake_time, options.max_num_seqs) == (2.0, (1.0, 3.0), 4)
    assert (options.fail, options.quiet, options.cuda) == (("hang", "slow-exit=2"), True, (0, 1))
    assert (options.names, options.uds) == (("m",), "/r/engine.sock")


def test_it_takes_what_it_was_promised() -> None:
    """So the ledger is right by itself; ``memory`` in the options makes it lie."""
    place = Place(Path("/r"), ("0", "1"), 3 * GiB, 8 * GiB)
    honest = launched(sim(device_dir="/dev/sim"), place)
    assert (honest.memory, honest.device_file) == (3 * GiB, ("/dev/sim/0", "/dev/sim/1"))
    assert honest.device_memory == 8 * GiB
    assert launched(sim(memory="4GiB"), place).memory == 4 * GiB


def test_devices_declared_with_files_need_no_further_word() -> None:
    """``devices: [{memory: 8GiB, file: ...}]`` is a rehearsal with exact memory; options go before."""
    place = Place(Path("/r"), ("0",), 3 * GiB, 8 * GiB, device_files=("/gpus/a",))
    assert launched(sim(), place).device_file == ("/gpus/a",)
    assert launched(sim(), place).device_memory == 8 * GiB
    assert launched(sim(device_dir="/dev/sim"), place).device_file == ("/dev/sim/0",)
    assert launched(sim(device_file="/other"), place).device_file == ("/other",)


def test_what_it_keeps_asleep_is_the_models_setting() -> None:
    """``memory_asleep`` means the same for every engine."""
    model = ModelConfig("m", engine="sim", memory_asleep=GiB, max_model_len=99)
    options = launched(model, Place(Path("/r"), ("0",), 3 * GiB, 8 * GiB))
    assert (options.memory_asleep, options.max_model_len) == (GiB, 99)


def test_an_unknown_option_is_refused() -> None:
    """With the nearest known one."""
    with pytest.raises(ConfigError, match="did you mean load_time"):
        launched(sim(loadtime=1), Place(Path("/r")))


def test_it_sleeps_anywhere_unless_told_not_to() -> None:
    """Also on a machine without a GPU."""
    engine = engine_of(sim())
    assert engine.sleep_levels(sim()) == {1, 2}
    assert engine.sleep_levels(ModelConfig("m", engine="sim", sleep_mode=False)) == frozenset()


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[object]:
    """Starts one engine, and ends it."""
    driven: list[Driven] = []

    def start(model: ModelConfig, *device_ids: str) -> Driven:
        driven.append(Driven(model, Place(tmp_path, device_ids, 20 * GiB, 24 * GiB)))
        return driven[-1]

    yield start
    for one in driven:
        one.close()


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_by_the_contract(drive, tmp_path: Path, level: int) -> None:
    """The calls of the vllm kind against vLLM's semantics: awake, it answers sense; asleep, it holds little."""
    device = make_device(tmp_path / "0", 24 * GiB)
    model = ModelConfig("m", engine="sim", memory_asleep=GiB, options={"device_dir": str(tmp_path)})
    one = drive(model, "0").wait_ready()
    assert device_usage(device).used == 20 * GiB
    one.call_all(one.engine.sleep(level, freeze=False))
    assert one.is_asleep()
    assert device_usage(device).used == GiB
    one.call_all(one.engine.wake(level))
    assert not one.is_asleep()
    assert device_usage(device).used == 20 * GiB
    assert one.chat() == "hello you"


def test_the_vllm_kind_can_run_the_stand_in(drive) -> None:
    """vLLM's own command line, another program: what is tested with it holds for vLLM's flags."""
    command = (sys.executable, "-m", "vllmd.simengine", "serve")
    model = ModelConfig("m", command=command, sleep_mode=True, options={"sleep_flag": "always"}, max_model_len=512)
    one = drive(model).wait_ready()
    one.call_all(one.engine.sleep(2, freeze=False))
    assert one.is_asleep()
    one.call_all(one.engine.wake(2))
    assert one.chat() == "hello you"


def test_a_start_is_read_from_its_log(drive) -> None:
    """Phases in order, and the footprint that the log tells."""
    one = drive(sim(memory="20GiB", weights="12GiB")).wait_ready()
    phases = [found.phase for line in one.lines() if (found := one.engine.progress(line))]
    wanted = ["configuring", "workers", "weights", "profiling", "compile", "profiling", "graphs", "warm-up", "serving"]
    assert list(dict.fromkeys(phases)) == list(dict.fromkeys(wanted))
    footprint = one.engine.footprint(one.lines())
    assert footprint is not None
    assert 20 * GiB <= footprint.awake <= 22 * GiB


def test_a_start_without_room_says_how_much_it_needed(drive, tmp_path: Path) -> None:
    """The scheduler makes that room, or says that it never can."""
    make_device(tmp_path / "0", 16 * GiB)
    one = drive(sim(device_dir=str(tmp_path)), "0")
    assert one.popen.wait(LIMIT) == 1
    failure = one.engine.failure(one.lines())
    assert (failure.memory, failure.permanent, failure.needed) == (True, False, 20 * GiB)
    assert failure.reason.startswith("ValueError: Free memory on device")

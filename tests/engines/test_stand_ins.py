"""The kinds that cannot run here, against stand-ins that speak their documented HTTP API."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.driven import Driven
from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of
from vllmd.engines.base import Place
from vllmd.sizes import GiB

STAND_INS = Path(__file__).with_name("standins.py")
Start = Callable[..., Driven]


def free_port() -> int:
    """One that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a model's stand-in as its kind says, on one device, and waits until it is ready."""
    running: list[Driven] = []

    def begin(engine: str, *, command: tuple[str, ...] = (), **settings: Any) -> Driven:
        program = (sys.executable, str(STAND_INS), engine, *command)
        model = ModelConfig("org/m", engine=engine, command=program, **settings)
        place = Place(tmp_path, ("GPU-1",), 40 * GiB, 80 * GiB, port=free_port(), key="of-this-start")
        running.append(Driven(model, place))
        return running[-1].wait_ready()

    yield begin
    for one in running:
        one.close()


def told(one: Driven) -> Any:
    """What the stand-in was started with and asked."""
    return one.http.get("/standin").json()


def chat(one: Driven) -> Any:
    return one.http.post("/v1/chat/completions", json={"model": "org/m", "messages": [{"content": "hi"}]})


@pytest.mark.parametrize(("backup", "level"), [(True, 1), (False, 2)])
def test_sglang_sleeps_and_answers_the_same_afterwards(start: Start, backup: bool, level: int) -> None:
    """From level 2 the weights are read between weights and cache: otherwise it would answer garbage."""
    one = start("sglang", command=("serve",), sleep_mode=True, options={"weights_backup": backup})
    assert one.engine.sleep_levels(one.model) == {level}
    one.call_all(one.engine.sleep(level, freeze=False))
    assert chat(one).status_code == 500
    one.call(one.engine.alive(one.model))
    one.call_all(one.engine.wake(level))
    assert chat(one).json()["choices"][0]["message"]["content"] == "hi"


def test_sglang_is_told_its_share_and_not_to_generate_for_a_probe(start: Start) -> None:
    """Its static memory is a part of what was promised: activations come on top."""
    one = start("sglang", command=("serve",), sleep_mode=True, max_model_len=4096)
    seen = told(one)
    assert seen["env"]["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert seen["options"]["mem_fraction_static"] == "0.44"
    assert (seen["options"]["served_model_name"], seen["options"]["context_length"]) == ("org/m", 4096)


def test_triton_unloads_and_loads_one_model_of_a_repository(start: Start, tmp_path: Path) -> None:
    """The server lives on without it; the model is ready again after the wake."""
    (tmp_path / "models" / "densenet" / "1").mkdir(parents=True)
    one = start("triton", model=str(tmp_path / "models/densenet"))
    assert one.engine.served_name(one.model) == "densenet"
    infer = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
    assert one.http.post("/v2/models/densenet/infer", json=infer).json()["outputs"] == infer["inputs"]
    one.call_all(one.engine.sleep(2, freeze=False))
    one.call(one.engine.alive(one.model))
    assert one.http.post("/v2/models/densenet/infer", json=infer).status_code == 400
    one.call_all(one.engine.wake(2))
    one.call(one.engine.ready(one.model))


def test_comfyui_frees_between_jobs_and_tells_that_it_works(start: Start, tmp_path: Path) -> None:
    """A job outlives its request; it ends on SIGINT."""
    one = start("comfyui", options={"directory": str(tmp_path)})
    busy = one.engine.busy()
    assert busy is not None
    assert not any(one.call(busy).json().values())
    one.http.post("/prompt", json={"prompt": {}})
    assert any(one.call(busy).json().values())
    one.call_all(one.engine.sleep(2, freeze=False))
    assert one.http.post("/standin", json={}).json() == {"freed": 1}
    assert one.engine.wake(2) == ()
    assert "ends on SIGINT" in one.end()


def test_tei_embeds_under_the_configured_name(start: Start) -> None:
    """Its metrics have a free port, so that two of them can run; it drains on SIGTERM."""
    one = start("tei", dtype="half", options={"pooling": "cls", "auto_truncate": True})
    answer = one.http.post("/v1/embeddings", json={"model": "org/m", "input": ["a", "bc"]}).json()
    assert [entry["embedding"] for entry in answer["data"]] == [[1.0, 1.0], [2.0, 1.0]]
    seen = told(one)
    assert seen["env"]["PROMETHEUS_PORT"] == "0"
    assert (seen["options"]["dtype"], seen["options"]["auto_truncate"]) == ("float16", True)
    assert "ends on SIGTERM" in one.end()


@pytest.mark.parametrize("engine", ["sglang", "tei"])
def test_an_engine_on_a_port_asks_for_the_key_of_its_start(start: Start, engine: str) -> None:
    """Every user of the machine can reach a port of the loopback address; a command line is read by all as well."""
    one = start(engine, command=("serve",) if engine == "sglang" else ())
    assert one.launch.listen.key == "of-this-start"
    assert "of-this-start" not in " ".join(one.launch.argv)
    assert "of-this-start" not in Path(f"/proc/{one.popen.pid}/cmdline").read_text()
    assert one.http.get("/standin").status_code == 200
    assert one.http.get("/standin", headers={"Authorization": ""}).status_code == 401


def test_a_key_file_is_its_engines_alone(start: Start) -> None:
    """Whatever the umask of whoever started it."""
    before = os.umask(0)
    try:
        one = start("sglang", command=("serve",))
    finally:
        os.umask(before)
    file = Path(one.launch.argv[-1])
    assert file.name == "vllmd-key.yaml"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("sglang", {"options": {"key": False}}),
        ("sglang", {"extra_args": ("--config", "mine.yaml")}),
        ("sglang", {"extra_args": ("--api-key=mine",)}),
        ("tei", {"extra_args": ("--api-key", "mine")}),
        ("tei", {"env": {"API_KEY": "mine"}}),
        ("command", {"command": ("serve", "${PORT}")}),
        ("command", {"command": ("serve", "${PORT}"), "options": {"key_env": "K"}, "env": {"K": "mine"}}),
    ],
)
def test_who_says_his_own_key_keeps_it(engine: str, settings: dict[str, Any]) -> None:
    """As do those who have an older version."""
    model = ModelConfig("m", engine=engine, **settings)
    launch = engine_of(model).launch(model, Place(Path("/run/x"), port=33301, key="of-this-start"))
    assert launch.listen.key == ""
    assert "of-this-start" not in launch.env.values()


def test_a_command_gets_its_key_where_it_wants_it() -> None:
    """llama-server on a port takes its key from the environment, for one."""
    options = {"key_env": "LLAMA_API_KEY"}
    model = ModelConfig("m", engine="command", command=("llama-server", "--port", "${PORT}"), options=options)
    launch = engine_of(model).launch(model, Place(Path("/run/x"), port=33301, key="of-this-start"))
    assert (launch.listen.key, launch.env["LLAMA_API_KEY"]) == ("of-this-start", "of-this-start")

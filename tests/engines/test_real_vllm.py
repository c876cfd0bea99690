"""The vllm kind against a real vLLM on the CPU, and the stand-in held against it, request by request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import RealVllm
from tests.engines import lora
from tests.engines.driven import Driven
from tests.vllm_on_cpu import ENV_FORKING
from vllmd.config.types import AdapterConfig, ModelConfig
from vllmd.engines.adapters import LOADED_ALREADY
from vllmd.engines.base import Place

pytestmark = pytest.mark.vllm

LIMIT = 240.0  # seconds: it starts in 25-40 s on two idle cores
ARGS = ("--enforce-eager", "--max-num-seqs", "8")
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def configured(vllm: RealVllm, **more: object) -> ModelConfig:
    settings = {"command": (str(vllm.command),), "model": str(vllm.model), "sleep_mode": True, "max_model_len": 512}
    return ModelConfig("m", **{**settings, "extra_args": ARGS, "env": ENV_FORKING, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def vllm(real_vllm: RealVllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    """One real vLLM for all tests here, started as its kind says, with two adapters that are not loaded yet."""
    folder = tmp_path_factory.mktemp("v")
    paths = [lora.write(folder / "one"), lora.write(folder / "two", rank=12, seed=2)]
    adapters = {path.name: AdapterConfig(str(path)) for path in paths}
    one = Driven(configured(real_vllm, adapters={**adapters, "gone": AdapterConfig("/no/such")}), Place(folder), LIMIT)
    yield one.wait_ready()
    one.close()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    """The stand-in, told to be the same model."""
    one = Driven(ModelConfig("m", engine="sim", max_model_len=512), Place(tmp_path_factory.mktemp("s")))
    yield one.wait_ready()
    one.close()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("freeze", [False, True])
def test_it_answers_the_same_after_a_sleep(vllm: Driven, level: int, freeze: bool) -> None:
    """Greedy answers before and after are equal: the calls and their order are right."""
    before = vllm.chat()
    vllm.call_all(vllm.engine.sleep(level, freeze=freeze))
    assert vllm.is_asleep()
    vllm.call_all(vllm.engine.wake(level))
    assert not vllm.is_asleep()
    assert vllm.chat() == before


def test_adapters_are_loaded_while_it_runs(vllm: Driven) -> None:
    """Each answers in its own way, also after a sleep that discards the weights; the base's answers stay as they were.

    A second load of the same name and one of a folder that is not there are refused in the words that are looked for.
    """
    adapters, before = vllm.engine.adapters(vllm.model), vllm.chat()
    for name in ("one", "two"):
        load = adapters[name].load
        assert load is not None
        vllm.call(load)
        assert LOADED_ALREADY in _post(vllm, load.path, load.json).text
    missing = adapters["gone"].load
    assert missing is not None
    assert _post(vllm, missing.path, missing.json).status_code == 404
    answers = [vllm.chat(adapters[name].served_name) for name in ("one", "two")]
    assert len({before, *answers}) == 3
    vllm.call_all(vllm.engine.sleep(2, freeze=False))
    vllm.call_all(vllm.engine.wake(2))
    assert [vllm.chat(name) for name in ("one", "two")] == answers
    assert vllm.chat() == before


def test_its_start_is_read_from_its_log(vllm: Driven) -> None:
    """The phases that a CPU start has, in order."""
    phases = [found.phase for line in vllm.lines() if (found := vllm.engine.progress(line))]
    wanted = ["configuring", "weights", "warm-up", "serving"]
    assert [phase for phase in dict.fromkeys(phases) if phase in wanted] == wanted
    assert vllm.engine.footprint(vllm.lines()) is None


def test_a_model_that_is_not_there_is_a_permanent_failure(real_vllm: RealVllm, tmp_path: Path) -> None:
    """The reason is the error, not its consequence, and a retry would not help."""
    one = Driven(configured(real_vllm, model="no/such-model"), Place(tmp_path))
    try:
        assert one.popen.wait(LIMIT) != 0
        failure = one.engine.failure(one.lines())
        assert failure.permanent
        assert "Cannot find an appropriate cached snapshot" in failure.reason
    finally:
        one.close()


def _post(one: Driven, path: str, body: object) -> httpx.Response:
    return one.http.post(path, json=body)


REFUSED = [
    ("/v1/chat/completions", {**CHAT, "model": "x"}),
    ("/v1/chat/completions", {"model": "m"}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 600}),
    ("/v1/chat/completions", []),
    ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 1}),
    ("/sleep?level=3", None),
    ("/sleep?mode=never", None),
    ("/collective_rpc", {"method": "nonsense"}),
    ("/nowhere", {}),
    ("/health", {}),
]


@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_the_stand_in_refuses_what_vllm_refuses(vllm: Driven, stand_in: Driven, path: str, body: object) -> None:
    """With the same status, and the same kind of error naming the same field."""
    real, ours = _post(vllm, path, body), _post(stand_in, path, body)
    assert ours.status_code == real.status_code
    if "error" in real.json():
        theirs, own = real.json()["error"], ours.json()["error"]
        assert (own["type"], own["param"], own["code"]) == (theirs["type"], theirs["param"], theirs["code"])
    else:
        assert ours.json() == real.json()


ANSWERED = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
    ("/v1/messages", {**CHAT, "model": "m"}),
    ("/tokenize", {"prompt": "a b"}),
    ("/wake_up", None),
    ("/pause?mode=keep", None),
    ("/resume", None),
    ("/abort_requests", {}),
    ("/reset_prefix_cache", None),
]


@pytest.mark.parametrize(("path", "body"), ANSWERED)
def test_the_stand_ins_answers_have_no_field_that_vllms_lack(
    vllm: Driven, stand_in: Driven, path: str, body: object
) -> None:
    """A client that works with the stand-in finds the same fields in the real one."""
    real, ours = _post(vllm, path, body), _post(stand_in, path, body)
    assert ours.status_code == real.status_code == 200
    assert _fields(ours.json()) <= _fields(real.json())


def _fields(content: object, at: str = "") -> set[str]:
    """The paths of all fields."""
    if isinstance(content, dict):
        return {path for key, value in content.items() for path in {f"{at}.{key}", *_fields(value, f"{at}.{key}")}}
    if isinstance(content, list):
        return {path for value in content for path in _fields(value, at)}
    return set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}),
        ("/v1/messages", {**CHAT, "model": "m", "stream": True}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2, "stream": True}),
    ],
)
def test_streams_begin_and_end_alike(vllm: Driven, stand_in: Driven, path: str, body: object) -> None:
    """The first and the last line, and the media type."""
    real, ours = _post(vllm, path, body), _post(stand_in, path, body)
    assert ours.headers["content-type"] == real.headers["content-type"]
    real_lines, our_lines = real.text.split("\n\n"), ours.text.split("\n\n")
    assert our_lines[0][:6] == real_lines[0][:6]
    assert our_lines[-2].splitlines()[0] == real_lines[-2].splitlines()[0]

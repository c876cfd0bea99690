"""llama.cpp for real: xllamacpp's server with SmolLM2-135M, from the place where vllmd finds engines' environments."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import RealLlama
from tests.engines.adapter import write_adapter
from tests.engines.driven import Driven
from tests.engines.installed import daemon
from vllmd.config.types import AdapterConfig, ModelConfig
from vllmd.engines.base import Failure, Place
from vllmd.engines.estimate import estimate
from vllmd.sizes import GiB

pytestmark = pytest.mark.llama

LIMIT = 120.0  # seconds: on two busy cores
WIDTH = 576  # of SmolLM2-135M's layers
Start = Callable[..., Driven]


@pytest.fixture
def start(tmp_path: Path, llama: RealLlama) -> Iterator[Start]:
    """Starts the model with these settings; it may not be ready, or end at once."""
    running: list[Driven] = []

    def begin(model: Path | str = llama.model, **settings: Any) -> Driven:
        options = {"gpu_layers": 0, **settings.pop("options", {})}
        config = ModelConfig("m", engine="llama.cpp", model=str(model), options=options, **settings)
        place = tmp_path / f"{len(running)}"
        place.mkdir()
        running.append(Driven(config, Place(place), LIMIT))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def ask(one: Driven, question: str) -> str:
    """The most likely answer."""
    body = {"model": "m", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
    reply = one.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def failed(one: Driven) -> Failure:
    """What is told of a start that fails."""
    assert one.popen.wait(LIMIT) not in (0, -signal.SIGKILL)
    return one.engine.failure(one.lines())


def test_it_knows_the_capital_of_france(start: Start) -> None:
    """A true answer, under the configured name; its start is followed, its metrics are on, and SIGTERM ends it."""
    one = start(max_model_len=2048).wait_ready()
    assert ask(one, "What is the capital of France? Answer in one sentence.") == "The capital of France is Paris."
    assert one.http.get("/v1/models").json()["data"][0]["id"] == "m"
    assert "llamacpp:tokens_predicted_total" in one.http.get("/metrics").text
    one.call(one.engine.alive(one.model))
    phases = [found.phase for line in one.lines() if (found := one.engine.progress(line))]
    assert list(dict.fromkeys(phases)) == ["weights", "context", "serving"]
    refused = one.http.post("/v1/rerank", json={"query": "a", "documents": ["b"]})
    assert (refused.status_code, "--reranking" in refused.text) == (501, True)
    one.end()
    assert one.popen.returncode == 0


@pytest.mark.parametrize(("length", "slots"), [(2048, 1), (1024, 4)])
def test_it_takes_what_was_estimated(start: Start, length: int, slots: int) -> None:
    """Within 15 %, after a long prompt."""
    one = start(max_model_len=length, options={"parallel": slots} if slots > 1 else {}).wait_ready()
    ask(one, "word " * 150)
    status = Path(f"/proc/{one.popen.pid}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0]) << 10
    told = estimate(one.model, Path("/nowhere"), 0)
    assert 0.85 < told.footprint.awake / resident < 1.15, f"{told.why}; it takes {resident >> 20} MiB"
    assert told.host_running == told.footprint.awake + GiB // 2  # all of it is host memory, and so are kept prompts


def test_it_ends_in_the_middle_of_an_answer(start: Start) -> None:
    """Whoever is still asking is cut off; xllamacpp's own end would wait for the last token."""
    one = start(max_model_len=2048).wait_ready()
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with one.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
        one.popen.send_signal(one.launch.stop_signal)
        assert one.popen.wait(10.0) == 0


def test_one_that_idles_by_itself_wakes_by_itself(start: Start) -> None:
    """Asleep it answers probes and stays asleep; a request wakes it."""
    one = start(max_model_len=512, options={"sleep_idle": 1}).wait_ready()
    assert one.launch.self_managed
    while not one.http.get("/props").json()["is_sleeping"]:
        one.call(one.engine.alive(one.model))
    assert ask(one, "What is 2+2?")


def test_it_embeds(start: Start) -> None:
    """With ``embedding``: like texts are closer to each other than unlike ones. A model for text needs a pooling."""
    one = start(max_model_len=512, options={"embedding": True}, extra_args=("--pooling", "mean")).wait_ready()
    texts = ["The cat sleeps on the sofa.", "A cat is sleeping on a couch.", "Interest rates rose by two percent."]
    answer = one.http.post("/v1/embeddings", json={"model": "m", "input": texts}).json()
    cat, couch, rates = (entry["embedding"] for entry in answer["data"])
    assert len(cat) == WIDTH
    assert dot(cat, couch) > dot(cat, rates)


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_an_adapter_is_applied_by_its_scale(start: Start, tmp_path: Path) -> None:
    """At scale 0 it changes nothing; at 1 this one leaves no sense."""
    adapter = write_adapter(tmp_path / "adapter.gguf", 10, WIDTH)
    question = "What is 2+2?"
    answers = []
    for told in (f"{adapter}:0", str(adapter)):
        one = start(max_model_len=512, options={"lora": told}).wait_ready()
        assert one.http.get("/lora-adapters").json()[0]["path"] == str(adapter)
        answers.append(ask(one, question))
        one.end()
    assert "4" in answers[0]
    assert answers[0] != answers[1]


def test_adapters_of_their_own_names_answer_apart(start: Start, tmp_path: Path) -> None:
    """Each request has the adapter that it names, whatever the one before it had; those of the options stay as set."""
    first, second = (write_adapter(tmp_path / f"{layer}.gguf", layer, WIDTH) for layer in (10, 20))
    adapters = {"first": AdapterConfig(str(first)), "second": AdapterConfig(str(second))}
    one = start(max_model_len=512, options={"lora": f"{first}:0"}, adapters=adapters).wait_ready()
    known = one.engine.adapters(one.model)
    body = {"model": "m", "messages": [{"role": "user", "content": "What is 2+2?"}], "temperature": 0, "max_tokens": 12}

    def answer(name: str) -> str:
        reply = one.http.post("/v1/chat/completions", json=body | dict(known[name].members))
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])

    plain, changed, otherwise = (answer(name) for name in ("", "first", "second"))
    assert "4" in plain
    assert len({plain, changed, otherwise}) == 3
    assert [answer(name) for name in ("second", "", "first")] == [otherwise, plain, changed]


def test_a_command_that_is_a_python_has_the_package(
    start: Start, llama: RealLlama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An environment of one's own is named by its Python; a start that is broken off ends."""
    python = next(llama.environments.glob("llama.cpp/*/bin/python"))
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path))
    one = start(max_model_len=512, command=(str(python),))
    one.popen.send_signal(signal.SIGTERM)
    assert one.popen.wait(LIMIT) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("settings", "reason", "advice"),
    [
        ({"model": "/nowhere/a.gguf"}, "failed to open GGUF file '/nowhere/a.gguf'", "there is no such file"),
        ({"model": __file__}, "invalid magic", "damaged"),
        ({"model": "org/name-GGUF"}, "org/name-GGUF is not in the cache", "hf download org/name-GGUF"),
        ({"options": {"lora": "/nowhere/a.gguf"}}, "llama_adapter_lora_init: failed to open", "lora under options"),
        ({"options": {"mmproj": "/nowhere/a.gguf"}}, "Failed to load CLIP model", "mmproj under options"),
        ({"extra_args": ("--nonsense",)}, "unrecognized arguments: --nonsense", "does not know this flag"),
    ],
)
def test_what_cannot_start_says_why(start: Start, settings: dict[str, Any], reason: str, advice: str) -> None:
    """By llama.cpp's own line, without its stamp, and with what to do about it."""
    failure = failed(start(max_model_len=256, **settings))
    assert reason in failure.reason
    assert not failure.reason[0].isdigit()
    assert advice in failure.hint


def test_a_client_that_leaves_frees_its_slot(llama: RealLlama, tmp_path: Path) -> None:
    """Also one that waited for a whole answer: otherwise the engine works on for nobody, for minutes."""
    options = {"gpu_layers": 0, "parallel": 1}
    model = {"engine": "llama.cpp", "model": str(llama.model), "max_model_len": 4096, "options": options}
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # a socket's path has 107 characters
    config = {"devices": [], "engines": {"run_dir": str(short)}, "models": {"m": model}}
    with daemon(tmp_path / "site", config) as site:
        site.answer("m", "hello")
        transport = httpx.HTTPTransport(uds=str(next(short.rglob("engine.sock"))))
        engine = httpx.Client(transport=transport, base_url="http://engine", timeout=LIMIT)

        def works() -> bool:
            return any(slot["is_processing"] for slot in engine.get("/slots").json())

        body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            site.http.post("/v1/completions", json=body, timeout=2.0)
        # It looks after a second without any other answer, so who asks more often than that keeps it from looking.
        for _ in range(20):
            time.sleep(2.0)
            if not works():
                break
        else:
            pytest.fail("it still works for somebody who has gone")
        engine.close()
    shutil.rmtree(short)

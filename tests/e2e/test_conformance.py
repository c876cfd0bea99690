"""What clients of OpenAI's and Anthropic's API ask of a real vLLM, through vllmd as it is installed.

The clients are the official ones, run by vLLM's own Python in the machine; what is served there says conftest.py.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.clients import Clients
from tests.e2e.site import BASE, Site
from tests.machine.container import MODEL_INSIDE, VLLM_INSIDE

pytestmark = [pytest.mark.machine, pytest.mark.vllm, pytest.mark.timeout(1200)]  # the first one starts both engines

# The beginning of every client; show() is how one answers.
PRELUDE = f"""
import json
def show(**found): print(json.dumps(found))
BASE, MODEL, USER = "{BASE}", "lab/tiny", [{{"role": "user", "content": "Hello"}}]
"""
OPENAI = """
import openai
client = openai.OpenAI(base_url=BASE + "/v1", api_key="none", timeout=60, max_retries=0)
chat = client.chat.completions.create
"""
ENGINE = """
import httpx
once = httpx.Limits(max_keepalive_connections=0)  # vLLM closes idle connections after 5 s, and so does httpx
engine = httpx.Client(transport=httpx.HTTPTransport(uds=SOCKET, limits=once), base_url="http://engine")
"""
ANTHROPIC = """
import anthropic
client = anthropic.Anthropic(base_url=BASE, api_key="none", timeout=60, max_retries=0)
"""


@dataclass(frozen=True)
class Loaded:
    """The machine with both engines running, and how many files the daemon had open then."""

    site: Site
    clients: Clients
    open_files: int

    def ask(self, client: str, code: str) -> dict[str, Any]:
        """What a client written in Python shows."""
        return self.clients.ask(PRELUDE + client + textwrap.dedent(code))


@pytest.fixture(scope="module")
def loaded(loaded_site: Site) -> Iterator[Loaded]:
    clients = Clients(loaded_site.machine)
    yield Loaded(loaded_site, clients, open_files_at_rest(loaded_site))
    clients.end()


def open_files_at_rest(site: Site) -> int:
    """How many the daemon has once its pooled connections to engines have expired."""
    site.machine.wait_until("! grep -E ' 03 +[0-9]+ .*engine.sock' /proc/net/unix", timeout=20)
    pid = site.machine.show("vllmd.service", "MainPID")
    return int(site.machine.out(f"ls /proc/{pid}/fd | wc -l"))


def test_the_openai_client_chats(loaded: Loaded) -> None:
    """At once and streamed, the same words and the same count of tokens."""
    found = loaded.ask(
        OPENAI,
        """
        asked = {"model": MODEL, "messages": USER, "max_tokens": 12, "temperature": 0}
        whole = chat(**asked)
        chunks = list(chat(**asked, stream=True, stream_options={"include_usage": True}))
        show(whole=whole.choices[0].message.content, tokens=whole.usage.completion_tokens, model=whole.model,
            streamed="".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            chunks=len(chunks), counted=chunks[-1].usage.completion_tokens)
        """,
    )
    assert found["model"] == "lab/tiny"
    assert found["streamed"] == found["whole"]
    assert found["counted"] == found["tokens"] == 12
    assert found["chunks"] > 4


TOOL = """
tool = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": {"type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}}}
asked = {"model": MODEL, "messages": USER, "max_tokens": 300, "temperature": 1, "seed": 1, "tools": [tool]}
"""


def test_the_openai_client_has_tools_called(loaded: Loaded) -> None:
    """Whole and in the pieces of a stream, by name or by whatever the model picks."""
    found = loaded.ask(
        OPENAI + TOOL,
        """
        named = chat(**asked, tool_choice={"type": "function", "function": {"name": "weather"}})
        call = named.choices[0].message.tool_calls[0]
        deltas = [c.choices[0].delta for c in chat(**asked, tool_choice="required", stream=True)]
        pieces = [piece.function for delta in deltas for piece in delta.tool_calls or []]
        show(named=call.function.name, arguments=json.loads(call.function.arguments),
            streamed="".join(piece.name or "" for piece in pieces),
            pieces=json.loads("".join(piece.arguments or "" for piece in pieces)))
        """,
    )
    assert found["named"] == found["streamed"] == "weather"
    for arguments in (found["arguments"], found["pieces"]):
        assert list(arguments) == ["city"]
        assert arguments["city"] in ("Oslo", "Rome")


def test_the_openai_client_gets_json_of_its_schema(loaded: Loaded) -> None:
    """A schema within a schema reaches the engine whole: even this model, which talks nonsense, keeps to it."""
    found = loaded.ask(
        OPENAI,
        """
        colour = {"type": "object", "properties": {"name": {"enum": ["red", "green"]}}, "required": ["name"],
            "additionalProperties": False}
        schema = {"type": "object", "properties": {"colour": colour, "number": {"enum": [3, 4]}},
            "required": ["colour", "number"], "additionalProperties": False}
        wanted = {"type": "json_schema", "json_schema": {"name": "pick", "strict": True, "schema": schema}}
        answer = chat(model=MODEL, messages=USER, max_tokens=64, temperature=0, response_format=wanted)
        show(**json.loads(answer.choices[0].message.content))
        """,
    )
    assert found["colour"] in ({"name": "red"}, {"name": "green"})
    assert found["number"] in (3, 4)
    assert set(found) == {"colour", "number"}


def test_the_openai_client_makes_responses_and_finds_them_again(loaded: Loaded) -> None:
    """A response's id is all that a later request has; vllmd knows whose it is. (Paused, the slow one cannot end.)"""
    socket = loaded.site.view("lab/tiny")["socket"]
    found = loaded.ask(
        f"SOCKET = {socket!r}" + ENGINE + OPENAI,
        """
        asked = {"model": MODEL, "input": "Hello", "temperature": 0}
        made = client.responses.create(**asked, max_output_tokens=8)
        again = client.responses.retrieve(made.id)
        events = list(client.responses.create(**asked, max_output_tokens=8, stream=True))
        engine.post("/pause?mode=keep").raise_for_status()
        slow = client.responses.create(**asked, max_output_tokens=400, background=True)
        cancelled = client.responses.cancel(slow.id)
        engine.post("/resume").raise_for_status()
        try:
            client.responses.retrieve("resp_nobody")
        except openai.NotFoundError as error:
            missing = error.status_code
        show(same=again.id == made.id, text=made.output_text, again=again.output_text,
            streamed="".join(e.delta for e in events if e.type == "response.output_text.delta"),
            types=[events[0].type, events[-1].type], cancelled=cancelled.status, missing=missing)
        """,
    )
    assert found["same"]
    assert found["text"] == found["again"] == found["streamed"] != ""
    assert found["types"] == ["response.created", "response.completed"]
    assert found["cancelled"] == "cancelled"
    assert found["missing"] == 404


def test_the_openai_client_completes_embeds_and_lists(loaded: Loaded) -> None:
    """The older and the smaller routes; base64 is how this client asks for vectors."""
    found = loaded.ask(
        OPENAI,
        """
        texts = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=4, temperature=0)
        vectors = client.embeddings.create(model="lab/embedder", input=["a", "b", "a"])
        show(texts=len(texts.choices), used=texts.usage.completion_tokens, model=vectors.model,
            vectors=[each.embedding for each in vectors.data],
            models=sorted(each.id for each in client.models.list()), one=client.models.retrieve(MODEL).id)
        """,
    )
    assert (found["texts"], found["used"]) == (2, 8)
    assert found["model"] == "lab/embedder"
    first, second, third = found["vectors"]
    assert [len(first), len(second), len(third)] == [256, 256, 256]
    assert first == pytest.approx(third, abs=0.02)
    assert first != pytest.approx(second, abs=0.02)
    assert found["models"] == ["lab/embedder", "lab/tiny", "lab/wrong"]
    assert found["one"] == "lab/tiny"


def test_the_openai_client_gets_the_engines_own_refusal(loaded: Loaded) -> None:
    """Status, words and field, as its exception."""
    found = loaded.ask(
        OPENAI,
        """
        try:
            chat(model=MODEL, messages=USER, max_tokens=9999)
        except openai.BadRequestError as error:
            show(message=error.message, param=error.param)
        """,
    )
    assert "max_model_len=512" in found["message"]
    assert found["param"] == "max_tokens"


def test_the_anthropic_client_talks_and_counts(loaded: Loaded) -> None:
    """Messages at once and streamed, and the tokens before anything is spent."""
    found = loaded.ask(
        ANTHROPIC,
        """
        asked = {"model": MODEL, "messages": USER}
        greedy = {"max_tokens": 8, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**asked, **greedy)
        with client.messages.stream(**asked, **greedy) as stream:
            types = [event.type for event in stream]
            final = stream.get_final_message()
        count = client.messages.count_tokens(**asked)
        show(model=whole.model, whole=whole.content[0].text, streamed=final.content[0].text, types=types,
            used=final.usage.output_tokens, counted=count.input_tokens, input=whole.usage.input_tokens)
        """,
    )
    assert found["model"] == "lab/tiny"
    assert found["whole"] == found["streamed"] != ""
    assert [found["types"][0], found["types"][-1]] == ["message_start", "message_stop"]
    assert found["used"] == 8
    assert found["counted"] == found["input"] > 0


def test_tokens_there_and_back(loaded: Loaded) -> None:
    """Two routes of vLLM's own that have no version in their path."""
    status, tokens = loaded.site.post("/tokenize", {"model": "lab/tiny", "prompt": "Hello there"})
    assert status == 200
    assert tokens["count"] == len(tokens["tokens"]) > 1
    back = loaded.site.post("/detokenize", {"model": "lab/tiny", "tokens": tokens["tokens"]})
    assert back == (200, {"prompt": "Hello there"})


def test_a_form_reaches_the_engine_as_curl_sends_it(loaded: Loaded) -> None:
    """This model cannot hear, so vLLM has no such route: with its own status, and in words that name the model."""
    loaded.site.machine.run("head -c 200000 /dev/urandom >/root/sound.wav")
    form = "-F file=@/root/sound.wav -F model=lab/tiny -s -w '\\n%{http_code} %{content_type}'"
    path = "/v1/audio/transcriptions"
    socket = loaded.site.view("lab/tiny")["socket"]
    direct = loaded.site.machine.out(f"curl {form} --unix-socket {socket} http://x{path}").splitlines()
    assert direct == ['{"detail":"Not Found"}', "404 application/json"]
    answer, status = loaded.site.machine.out(f"curl {form} {BASE}{path}").splitlines()
    assert status == direct[1]
    assert json.loads(answer)["error"]["message"] == f"the model 'lab/tiny' does not serve {path}"


COMPARE = """
import httpx, re
def read(transport, base, path, body):
    with httpx.Client(transport=transport, timeout=60) as http:
        answer = http.post(base + path, json=body, headers={"X-Request-Id": "the-same"})
        assert answer.status_code == 200, answer.text
        masked = re.sub(rb'"created":[0-9]+', b'"created":0', answer.content)
        return answer.headers["content-type"], masked.decode()
def compare(path, body):
    for _ in range(5):  # vLLM may put the tokens of two steps into one chunk when the machine is busy
        through = read(None, BASE, path, body)
        direct = read(httpx.HTTPTransport(uds=SOCKET), "http://engine", path, body)
        if through == direct:
            break
    show(through=through, direct=direct)
"""
GREEDY = {"max_tokens": 24, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], **GREEDY}


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}, "data: [DONE]"),
        ("completions", {"prompt": "Hello", **GREEDY, "stream": True}, "data: [DONE]"),
        ("messages", {**CHAT, "stream": True}, '{"type":"message_stop"}'),
    ],
    ids=["chat", "completion", "message"],
)
def test_the_bytes_are_the_engines(loaded: Loaded, path: str, body: dict[str, Any], end: str) -> None:
    """Byte for byte what the engine's own socket gives, but for the second in which it was made."""
    socket = loaded.site.view("lab/tiny")["socket"]
    body = {"model": "lab/tiny", **body}
    if path == "completions":  # asked for usage, as vllmd does to count it, vLLM tells its fingerprint there instead
        body["stream_options"] = {"include_usage": True}
    found = loaded.ask(f"SOCKET = {socket!r}" + COMPARE, f"compare({'/v1/' + path!r}, {body!r})")
    assert found["through"] == found["direct"]
    media, text = found["through"]
    assert media.startswith("text/event-stream")
    assert text.rstrip().endswith(end)
    assert "the-same" in text


def test_vllms_own_benchmark_runs_against_it(loaded: Loaded) -> None:
    """A dozen chats, four at a time, none of which fails."""
    argv = [f"{VLLM_INSIDE}/bin/vllm", "bench", "serve", "--backend", "openai-chat", "--base-url", BASE]
    argv += ["--endpoint", "/v1/chat/completions", "--model", "lab/tiny", "--tokenizer", MODEL_INSIDE]
    argv += ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"]
    argv += ["--num-prompts", "12", "--max-concurrency", "4", "--save-result"]
    argv += ["--result-dir", "/root", "--result-filename", "bench.json"]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    loaded.site.machine.run(argv, timeout=120, env=offline)
    result = json.loads(loaded.site.machine.read("/root/bench.json"))
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 8


def test_afterwards_nothing_is_left(loaded: Loaded) -> None:
    """No request that nobody waits for, and no open file more than before."""
    lines = json.loads(loaded.site.machine.out("vllmctl ps --json"))
    assert {line["name"]: (line["state"], line["in_flight"], line["queued"]) for line in lines} == {
        "lab/tiny": ("running", 0, 0),
        "lab/embedder": ("running", 0, 0),
        "lab/wrong": ("stopped", 0, 0),
    }
    loaded.clients.end()
    assert open_files_at_rest(loaded.site) <= loaded.open_files

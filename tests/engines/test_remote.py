"""Servers that others run: their addresses, their keys, and what happens when they come and go."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.daemon.rig import Rig, tell
from tests.engines.installed import Site, daemon
from vllmd.config.loader import read
from vllmd.config.present import as_data, as_yaml
from vllmd.config.types import ModelConfig
from vllmd.core import commands, events
from vllmd.daemon import engine_manager, engine_resolver
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.engines import engine_of
from vllmd.engines.base import Engine, Listen, Place
from vllmd.errors import ConfigError

BAD_CERTIFICATE = "unable to get local issuer certificate|self-signed certificate|self signed certificate"


def listen(**options: str) -> Listen:
    model = ModelConfig("m", engine="remote", options=options, where="a.yaml:5")
    launch = engine_of(model).launch(model, Place(Path("/r")))
    assert launch.argv == ()
    return launch.listen


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://gpu2:33258/v1", Listen(host="gpu2", port=33258)),
        ("http://gpu2", Listen(host="gpu2", port=80)),
        ("https://api.example/openai/v1/", Listen(host="api.example", port=443, tls="system", prefix="/openai")),
        ("http://[::1]:8000", Listen(host="::1", port=8000)),
        ("unix:/run/other/http.sock", Listen(uds="/run/other/http.sock")),
    ],
)
def test_an_address_is_what_other_clients_are_given(url: str, address: Listen) -> None:
    """With or without the /v1 that all paths have anyway."""
    assert listen(url=url) == address


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "options.url: is missing"),
        ({"url": "ftp://gpu2/"}, "is no address of an HTTP server; right is one such as http://"),
        ({"url": "gpu2:33258"}, "is no address of an HTTP server"),
        ({"url": "http://gpu2:x/v1"}, "is no address of an HTTP server"),
        ({"url": "http://user:secret@gpu2/"}, "right is key_file or key"),
        ({"url": "http://gpu2", "ca_file": "/ca.pem"}, "options.ca_file: means something with https:// only"),
        ({"url": "https://gpu2", "ca_file": "/nowhere/ca.pem"}, "there is no file /nowhere/ca.pem"),
        ({"url": "http://gpu2", "key_file": "/nowhere/key"}, "options.key_file: /nowhere/key: No such file"),
        ({"url": "http://gpu2", "key": "a", "key_file": "b"}, "is given twice"),
        ({"url": "http://gpu2", "key": "a\nb"}, "control character"),
        ({"url": "http://gpu2", "watch": "often"}, "it must be a time such as 250ms or 2s"),
        ({"url": "http://gpu2", "keys": "a"}, "unknown option; did you mean key?"),
    ],
)
def test_what_is_no_such_server_is_refused(options: dict[str, str], what: str) -> None:
    """At the start of the daemon, with the place."""
    with pytest.raises(ConfigError) as error:
        listen(**options)
    assert error.value.message.startswith("a.yaml:5: models.m.options.")
    assert what in error.value.message


def test_its_key_comes_from_a_file_and_is_shown_nowhere(tmp_path: Path) -> None:
    """Beside the configuration; every request and every probe carries it."""
    (tmp_path / "gpu2.key").write_text("sk-1\n")
    model = ModelConfig("m", engine="remote", options={"url": "http://x", "key_file": "gpu2.key"},
                        where=f"{tmp_path}/a.yaml:5")  # fmt: skip
    engine = engine_of(model)
    assert engine.headers() == (("authorization", "Bearer sk-1"),)
    assert engine.ready(model).headers == engine.headers()
    assert "sk-1" not in repr(engine.ready(model))
    assert engine.device_count(model) == 0


def test_a_key_written_into_the_configuration_is_not_shown(tmp_path: Path) -> None:
    """``vllmctl config show`` hides it as every other secret."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("models: {m: {engine: remote, options: {url: http://x, key: sk-1}}}")
    file.chmod(0o600)
    reading = read(file, env={})
    shown = as_yaml(reading) + str(as_data(reading))
    assert "key" in shown
    assert "sk-1" not in shown


@dataclass
class Elsewhere:
    """A server on a port of its own: ``speak`` answers a connection's first line."""

    answer: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    tls: ssl.SSLContext | None = None
    heads: list[bytes] = field(default_factory=list)
    port: int = 0

    async def open(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def configure(rig: Rig, url: str, **options: str) -> None:
    rig.configure(engine="remote", options={"url": url, **options})


async def started(rig: Rig) -> events.Event:
    rig.engine_manager.start(commands.StartEngine("m", engine_manager.Placement(()), 0))
    return await rig.event()


def test_it_serves_at_once_when_it_answers_and_is_gone_when_it_does_not(tmp_path: Path) -> None:
    """Nothing is launched; the core hears of the end as of any engine's."""

    async def story(rig: Rig) -> None:
        there = Elsewhere()
        await there.open()
        configure(rig, f"http://127.0.0.1:{there.port}/deep/v1", key="sk-1", watch="10ms")
        assert await started(rig) == events.EngineReady("m", None)
        assert there.heads[0].startswith(b"GET /deep/v1/models HTTP/1.1\r\n")
        assert b"authorization: Bearer sk-1\r\n" in there.heads[0]
        assert rig.launcher.orders == []
        await there.close()
        assert isinstance(await rig.event(), events.ServerSilent)
        gone = await rig.event()
        assert isinstance(gone, events.EngineExited)
        where = f"127.0.0.1:{there.port}/deep"
        assert gone.reason == f"it is gone: GET /v1/models: no connection to {where}: Connection refused"
        await rig.nothing_more()

    tell(story, tmp_path)


def test_nothing_is_noted_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A later daemon finds it by its configuration; there is no control group of ours to write into."""

    async def story(rig: Rig) -> None:
        there = Elsewhere()
        await there.open()
        configure(rig, f"http://127.0.0.1:{there.port}")
        await started(rig)
        await rig.engine_manager.annotate(rig.engine_manager.processes["m"], idle_since="1")
        assert caplog.text == ""
        await there.close()

    tell(story, tmp_path)


NOT_FOUND = b'{"error": {"message": "%b", "type": "NotFoundError", "param": %b, "code": %b}}'


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, b"{}", ""),
        (404, b'{"detail": "Not Found"}', ""),
        (404, NOT_FOUND % (b"sim/m does not serve that", b"null", b'"not_found"'), ""),
        (404, NOT_FOUND % (b"no model is called m", b"null", b'"model_not_found"'), "404: no model is called m"),
        (404, NOT_FOUND % (b"The model m does not exist.", b'"model"', b"404"), "404: The model m does not exist."),
        (503, b'{"error": {"message": "m: no such file"}}', "503: m: no such file"),
        (502, b"<html>", "502: b'<html>'"),
    ],
)
def test_a_probe_is_answered_by_whoever_would_answer_clients(
    tmp_path: Path, status: int, body: bytes, why: str
) -> None:
    """An embedding model does not chat, but lives; one that is not known there would be a 404 for every client."""

    async def story(rig: Rig) -> None:
        there = Elsewhere()
        await there.open()
        configure(rig, f"http://127.0.0.1:{there.port}")
        await started(rig)
        there.answer = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body
        rig.engine_manager.probe(commands.ProbeReplica("p", "m", 5.0))
        probed = await rig.event()
        assert isinstance(probed, events.ReplicaProbed)
        assert (probed.seconds is None) == bool(why)
        assert probed.reason == (why and f"POST /v1/chat/completions answered {why}")
        await there.close()

    tell(story, tmp_path)


def test_it_is_let_go_without_a_word(tmp_path: Path) -> None:
    """A stop ends our use of it, not it."""

    async def story(rig: Rig) -> None:
        there = Elsewhere()
        await there.open()
        configure(rig, f"http://127.0.0.1:{there.port}")
        await started(rig)
        rig.engine_manager.stop(commands.StopEngine("m", "idle"))
        assert isinstance(await rig.event(), events.EngineStopped)
        assert len(there.heads) == 1
        assert rig.launcher.signals == []
        await there.close()

    tell(story, tmp_path)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "malformed answer"),
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\n{}", "answered 401 instead of 200"),
        (b"", "the connection broke off"),
    ],
)
def test_what_speaks_no_http_or_refuses_us_has_not_started(tmp_path: Path, answer: bytes, what: str) -> None:
    """Its clients hear what was met there."""

    async def story(rig: Rig) -> None:
        there = Elsewhere(answer)
        await there.open()
        configure(rig, f"http://127.0.0.1:{there.port}")
        failed = await started(rig)
        assert isinstance(failed, events.EngineStartFailed)
        assert what in failed.reason
        await there.close()

    tell(story, tmp_path)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for localhost that nobody signed but itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    made = subprocess.run([*command, *named, "-keyout", "-"], check=True, capture_output=True)
    path.write_bytes(made.stdout)
    return path


def test_its_certificate_is_checked(tmp_path: Path, certificate: Path) -> None:
    """One that the given file trusts is taken; the system does not know it, and a start fails saying so."""

    async def story(rig: Rig) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        there = Elsewhere(tls=context)
        await there.open()
        configure(rig, f"https://localhost:{there.port}", ca_file=str(certificate))
        assert await started(rig) == events.EngineReady("m", None)
        assert b"host: localhost:%d\r\n" % there.port in there.heads[0]
        rig.engine_manager.processes.clear()
        configure(rig, f"https://localhost:{there.port}")
        failed = await started(rig)
        assert isinstance(failed, events.EngineStartFailed)
        assert any(words in failed.reason for words in BAD_CERTIFICATE.split("|")), failed.reason
        await there.close()

    tell(story, tmp_path)


NEAR = {"devices": [{"memory": "8GiB"}], "server": {"idle_exit": "never"}}
FAR_MODELS = {"sim/far": {"engine": "sim", "gpu_memory": "4GiB", "options": {"load_time": "0s"}}}
KEYS = [{"name": "near", "key": "near-secret-key-1"}]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Another vllmd, which wants a key."""
    with daemon(tmp_path_factory.mktemp("far") / "site", NEAR | {"models": FAR_MODELS, "auth": {"keys": KEYS}}) as site:
        yield site


def remote(site: Site, **options: str) -> dict[str, object]:
    return {"engine": "remote", "model": "sim/far", "options": {"url": f"http://127.0.0.1:{site.port}/v1", **options}}


def test_another_vllmd_is_used_like_an_engine_of_ours(far: Site, tmp_path: Path) -> None:
    """Under our name for it, with the key that it wants, streams included; the client's own key stays here."""
    (tmp_path / "far.key").write_text("near-secret-key-1\n")
    (tmp_path / "far.key").chmod(0o600)
    models = {
        "ours": remote(far, key_file=str(tmp_path / "far.key")),
        "locked-out": remote(far),
    }
    with daemon(tmp_path / "site", NEAR | {"models": models}) as near:
        reply = near.chat("ours", "over there", Authorization="Bearer somebody-elses")
        assert (reply.status_code, reply.json()["model"]) == (200, "ours")
        assert reply.json()["choices"][0]["message"]["content"] == "over there"
        assert near.view("ours")["pid"] is None
        assert "401" in near.refusal("locked-out")
        body = {"model": "ours", "stream": True, "messages": [{"role": "user", "content": "a b c"}]}
        assert near.http.post("/v1/chat/completions", json=body).text.rstrip().endswith("data: [DONE]")


def test_a_remote_that_is_away_is_a_clear_503_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    """Nobody has to do anything here."""
    with daemon(tmp_path / "far", NEAR | {"models": FAR_MODELS}) as far:
        port, models = far.port, {"ours": remote(far) | {"restart_backoff": "0s"}}
    with daemon(tmp_path / "near", NEAR | {"models": models}) as near:
        reply = near.chat("ours")
        assert reply.status_code == 503
        assert f"no connection to 127.0.0.1:{port}: " in reply.json()["error"]["message"]
        with daemon(tmp_path / "again", NEAR | {"models": FAR_MODELS}, port=port):
            near.wait_for("ours", "error", "stopped")
            assert near.answer("ours", "welcome back") == "welcome back"


def test_models_with_the_same_options_share_an_engine_as_long_as_one_has_it() -> None:
    """Its key, which may be among the options, is not kept of a model that has gone; a file may have changed."""
    options = {"url": "http://gpu2", "key": "secret"}
    one, other = (engine_of(ModelConfig(name, engine="remote", options=options)) for name in ("m", "n"))
    assert one is other
    assert engine_of(ModelConfig("m@2", engine="remote", options=options, replica_of="m")) is not one
    left = weakref.ref(one)
    del one, other
    assert left() is None


def test_an_engine_is_kept_of_models_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload drops what it kept of others; as many may come and go as want to."""
    found = list[str]()

    def look(model: ModelConfig) -> Engine:
        found.append(model.name)
        return engine_of(model)

    monkeypatch.setattr(engine_resolver, "engine_of", look)
    resolver, models = EngineResolver(), [ModelConfig(name, engine="sim") for name in ("m", "n")]
    for names in (("m", "n"), ("m",), ()):
        resolver.renew(names)
        for model in models:
            resolver(model)
    assert found == ["m", "n", "n", "m", "n"]

"""TLS at addresses that others can reach: what is spoken there, who is refused, and a certificate that is renewed."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.admin.site import Site, running, until
from vllmd.cli import main
from vllmd.config.loader import load
from vllmd.errors import ConfigError

CONFIG = """\
server: {{idle_exit: never, head_timeout: 2s, ui: true, tls: {{cert: {folder}/cert.pem, key: {folder}/key.pem}}}}
auth: {{keys: [{{name: lab, key: a-key-for-the-lab, scopes: [models, admin]}}]}}
devices: []
models:
  alpha: {{engine: sim, options: {{load_time: 0.01s, tokens_per_second: 500}}}}
  dies: {{engine: sim, options: {{load_time: 0.01s, tokens_per_second: 100, fail: crash-mid-stream}}}}
"""


def certificate(folder: Path, name: str) -> None:
    """A certificate of ``name`` for 127.0.0.1, signed by itself."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "first")
    with running(folder, CONFIG.format(folder=folder), address="0.0.0.0") as site:
        yield site


def connect(site: Site) -> http.client.HTTPSConnection:
    trusted = ssl.create_default_context(cafile=str(site.folder / "cert.pem"))
    return http.client.HTTPSConnection("127.0.0.1", site.port, timeout=30, context=trusted)


def ask(site: Site, method: str, path: str, body: str = "", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = connect(site)
    sent = {"Content-Type": "application/json", "Authorization": "Bearer a-key-for-the-lab", **headers}
    connection.request(method, path, body or None, sent)
    answer = connection.getresponse()
    found = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return found


def test_an_answer_that_breaks_off_has_no_orderly_end(site: Site) -> None:
    """To HTTP/1.0 the end of the connection is the answer's: TLS must not say that it was meant."""
    body = '{"model": "dies", "stream": true, "messages": [{"role": "user", "content": "one two three four five six"}]}'
    head = f"POST /v1/chat/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nAuthorization: Bearer a-key-for-the-lab\r\n\r\n"
    trusted = ssl.create_default_context(cafile=str(site.folder / "cert.pem"))
    with (
        socket.create_connection(("127.0.0.1", site.port), timeout=30) as plain,
        trusted.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False) as client,
    ):
        client.sendall((head + body).encode())
        assert client.recv(12) == b"HTTP/1.1 200"
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            list(iter(lambda: client.recv(65536), b""))


def test_a_chat_and_a_stream_go_through(site: Site) -> None:
    body = '{"model": "alpha", "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]%s}'
    assert ask(site, "POST", "/v1/chat/completions", body % "")[0] == 200
    status, text, _ = ask(site, "POST", "/v1/chat/completions", body % ', "stream": true')
    assert status == 200 and text.endswith(b"data: [DONE]\n\n")


def test_a_large_body_and_a_refused_one_are_answered(site: Site) -> None:
    """TLS has no half-closed connections: the refusal must reach a client that is still sending."""
    text = "x" * 3_000_000
    assert ask(site, "POST", "/v1/embeddings", f'{{"model": "alpha", "input": "{text}"}}')[0] in (200, 400)
    connection = connect(site)
    connection.putrequest("POST", "/v1/embeddings")
    connection.putheader("Content-Length", str(10**12))
    connection.putheader("Authorization", "Bearer a-key-for-the-lab")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 413


def test_the_pages_cookie_is_for_tls_only_then(site: Site) -> None:
    status, _, headers = ask(site, "POST", "/ui/session", "{}")
    assert status == 200 and "; Secure" in headers["set-cookie"]


def test_a_client_without_tls_is_told_so_and_harms_nobody(site: Site) -> None:
    """Whoever says nothing, or what is neither, gets no answer, and keeps nobody waiting."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: plain.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"TLS is spoken here, and this is plain HTTP: the URL must begin with https://" in answer
    with (
        socket.create_connection(("127.0.0.1", site.port), timeout=30),
        socket.create_connection(("127.0.0.1", site.port), timeout=30) as odd,
    ):
        odd.sendall(b"\x00" * 40)
        assert not odd.recv(1000).startswith(b"HTTP/")
    assert ask(site, "GET", "/health/live")[0] == 200


def test_a_renewed_certificate_is_taken_at_a_reload_and_a_broken_one_is_refused(site: Site) -> None:
    """Certificates of today live for weeks: a renewal must not cost a restart, nor a bad file the one in use."""
    certificate(site.folder, "second")
    site.operate("POST", "/admin/reload")
    shown = ssl.get_server_certificate(("127.0.0.1", site.port))
    assert shown.split() == (site.folder / "cert.pem").read_text().split()
    good = (site.folder / "key.pem").read_text()
    (site.folder / "key.pem").write_text("nothing of the kind")
    refused = site.ask("POST", "/admin/reload", admin=True)
    assert refused.status == 400 and "key.pem" in refused.error
    assert ask(site, "GET", "/health/live")[0] == 200
    (site.folder / "key.pem").write_text(good)


def test_loopback_stays_plain(tmp_path: Path) -> None:
    """Programs on this machine go on as they are."""
    certificate(tmp_path, "own")
    with running(tmp_path, CONFIG.format(folder=tmp_path)) as site:
        assert site.ask("GET", "/health/live").status == 200


def test_who_speaks_tls_to_a_plain_address_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A TLS library shows its own error whatever we answer: so our client says it, and the log does for all others."""
    certificate(tmp_path, "own")
    with running(tmp_path, CONFIG.format(folder=tmp_path)) as site:
        assert main(["--url", f"https://127.0.0.1:{site.port}", "--key", "a-key-for-the-lab", "ps"]) == 69
        assert "TLS is not spoken there; if that is vllmd, its URL begins with http://" in capsys.readouterr().err
        told = "a client (127.0.0.1) speaks TLS where plain HTTP is spoken: its URL must begin with http://"
        until(lambda: told in site.log)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("no key", "key.pem cannot be read: No such file"), ("another key", "does not belong to the certificate"),
     ("no certificate", "no certificate in PEM"), ("a password", "encrypted")],
)  # fmt: skip
def test_what_is_wrong_with_the_files_is_said(tmp_path: Path, fault: str, said: str) -> None:
    certificate(tmp_path, "own")
    match fault:
        case "no key":
            (tmp_path / "key.pem").unlink()
        case "another key":
            kept = (tmp_path / "cert.pem").read_text()
            certificate(tmp_path, "other")
            (tmp_path / "cert.pem").write_text(kept)
        case "no certificate":
            (tmp_path / "cert.pem").write_text("-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
        case "a password":
            key = tmp_path / "key.pem"
            subprocess.run(["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", key],
                           check=True, capture_output=True)  # fmt: skip
    from vllmd.config.tls import context

    with pytest.raises(ValueError, match=said):
        context(tmp_path / "cert.pem", tmp_path / "key.pem")


@pytest.mark.parametrize("given", ["cert", "key"])
def test_half_of_it_is_an_error_with_its_place(tmp_path: Path, given: str) -> None:
    certificate(tmp_path, "own")
    file = tmp_path / "vllmd.yaml"
    file.write_text(f"server: {{tls: {{{given}: {tmp_path}/{given}.pem}}}}\n")
    with pytest.raises(ConfigError, match=rf"vllmd.yaml:1: server.tls.{given}.* needs both cert and key"):
        load(file, env={})


def test_a_client_that_says_nothing_holds_no_place(site: Site) -> None:
    """It is not even counted as connected once its handshake is given up; others are served meanwhile."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=30):
        until(lambda: site.operate("GET", "/admin/status")["connections"] >= 2)
        assert ask(site, "GET", "/health/live")[0] == 200
    until(lambda: site.operate("GET", "/admin/status")["connections"] == 1)

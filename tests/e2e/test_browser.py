"""What a page of another site can do to this server, in a real browser: nothing.

The daemon has no keys, as it is installed. Chromium resolves every name to this machine, as a page's own name may be
made to do; each page runs its attempts and reports what it got, the daemon tells whether a model was touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.admin.site import Site, running

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: packaging/dev/setup host")

LIMIT = 90.0  # seconds that a browser may take to come up and run a page
CONFIG = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}]
server: {{idle_exit: never, cors_origins: ["http://chat.example:{page}"], hosts: [ours.example]}}
models:
  alpha: {{engine: sim, gpu_memory: 20GiB, options: {{load_time: 0.01s}}}}
  kserve:
    engine: command
    command: [{python}, -m, vllmd.simengine, --model, "${{MODEL}}", --uds, "${{SOCKET}}"]
    gpu_memory: 20GiB
    options: {{routes: ["/v2/models/{{model}}/infer", "/v2/models/{{model}}/config"]}}
"""
# What every page has: ask() tells the status, "opaque" for an answer that it may not look at, or that there was none.
PAGE = """<!doctype html><meta charset=utf-8><body><script>
const chat = {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(
  {model: "alpha", messages: [{role: "user", content: "hello"}], max_tokens: 2})};
async function ask(url, options) {
  try {
    const answer = await fetch(url, options);
    const text = await answer.text();
    return answer.type === "opaque" ? "opaque" : answer.status + " " + text.slice(0, 200);
  } catch (error) { return "none"; }
}
const event = (target, ...names) => new Promise(done => names.forEach(name =>
  target.addEventListener(name, () => done(name), {once: true})));
async function attempts() { %s }
attempts().catch(error => ({error: String(error)})).then(found =>
  fetch("%s", {method: "POST", mode: "no-cors", body: JSON.stringify(found)}));
</script>"""


class Pages:
    """A site with one page, whatever name it is called by; ``report`` waits for what the page has to say."""

    def __init__(self, address: str) -> None:
        pages = self
        self.html = ""
        self.told = threading.Event()
        self.last_report: Any = None

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = pages.html.encode() if self.path.startswith("/page") else b""
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                pages.last_report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.do_GET()
                pages.told.set()

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self.server = ThreadingHTTPServer((address, 0), Handler)
        self.port: int = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def report(self) -> Any:
        assert self.told.wait(LIMIT), "the page did not report"
        self.told.clear()
        return self.last_report


@contextlib.contextmanager
def pages(address: str = "127.0.0.1") -> Iterator[Pages]:
    site = Pages(address)
    try:
        yield site
    finally:
        site.server.shutdown()
        site.server.server_close()


@pytest.fixture(scope="module")
def chat_page() -> Iterator[Pages]:
    with pages() as site:
        yield site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, chat_page: Pages) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("browser")
    with running(folder, CONFIG.format(folder=folder, page=chat_page.port, python=sys.executable)) as site:
        yield site


@contextlib.contextmanager
def browser(folder: Path, url: str, *rules: str) -> Iterator[None]:
    """Chromium showing a page; ``rules`` say which name is where. Ended at the end of the block."""
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder}/profile", f"--host-resolver-rules={','.join(f'MAP {rule}' for rule in rules)}"),
        "--remote-debugging-port=0",  # without it, a headless browser leaves when the page has been loaded
    )
    assert CHROMIUM is not None
    home = {**os.environ, "HOME": str(folder)}
    process = subprocess.Popen(
        [CHROMIUM, *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=home, start_new_session=True
    )
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def run(folder: Path, page: Pages, url: str, script: str, report: Pages, *rules: str) -> Any:
    """What the page reports of its attempts. The report goes to an address, which no page may read from."""
    page.html = PAGE % (script, f"http://127.0.0.1:{report.port}/report")
    with browser(folder, url, *rules):
        return report.report()


def touched(site: Site) -> set[str]:
    """The models that are not as they were, and those that were asked something."""
    states = site.ask("GET", "/health").json["model_status"]
    counted = site.ask("GET", "/metrics").text
    asked = {line for line in counted.splitlines() if line.startswith("vllmd_model_requests_total{")}
    return asked | {name for name, state in states.items() if state != "stopped"}


ATTACKS = """
  const server = "%(server)s", found = {};
  found.json = await ask(server + "/v1/chat/completions", chat);
  found.simple = await ask(server + "/v1/chat/completions", {...chat, mode: "no-cors", headers: {}});
  found.list = await ask(server + "/v1/models", {});
  found.kserve = await ask(server + "/v2/models/kserve/infer", {method: "POST", mode: "no-cors", body: "{}"});
  found.metrics = await ask(server + "/metrics?model=alpha", {mode: "no-cors"});
  const image = document.body.appendChild(new Image());
  image.src = server + "/v2/models/kserve/config";
  found.image = await event(image, "load", "error");
  const form = document.body.appendChild(document.createElement("form")), frame = document.createElement("iframe");
  frame.name = form.target = "frame";
  document.body.append(frame);
  Object.assign(form, {method: "POST", enctype: "multipart/form-data", action: server + "/v1/audio/transcriptions"});
  form.innerHTML = "<input name=model value=alpha><input name=file value=x>";
  form.submit();
  found.form = await event(frame, "load");
  const web = new WebSocket(server.replace("http", "ws") + "/v1/realtime?model=alpha");
  found.socket = await event(web, "open", "error");
  return found;
"""


@pytest.mark.parametrize("target", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_of_another_origin_touches_no_model(site: Site, chat_page: Pages, tmp_path: Path, target: str) -> None:
    """By JSON, simple requests, images, forms and WebSockets; to our address, our name, or a name of its own."""
    with pages() as evil:
        script = ATTACKS % {"server": f"http://{target}:{site.port}"}
        url = f"http://evil.example:{evil.port}/page"
        found = run(tmp_path, evil, url, script, evil, "evil.example 127.0.0.1")
    assert (found["json"], found["list"], found["socket"], found["image"]) == ("none", "none", "error", "error")
    assert {found[how] for how in ("simple", "kserve", "metrics")} == {"opaque"}  # sent, and refused
    assert touched(site) == set()


@contextlib.contextmanager
def rebound(site: Site, page: Pages) -> Iterator[None]:
    """Our port at another address: the first connection gets the page, and whatever comes later is led to us.

    To the browser, and to the daemon, it is as if the name of the page had been pointed at us in between.
    """
    with socket.create_server(("127.0.0.2", site.port)) as listener:
        threading.Thread(target=_lead, args=(listener, site, page), daemon=True).start()
        yield


def _lead(listener: socket.socket, site: Site, page: Pages) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        head = client.recv(65536, socket.MSG_PEEK)
        port = page.port if head.startswith(b"GET /page") else site.port
        there = socket.create_connection(("127.0.0.1", port))
        for one, other in ((client, there), (there, client)):
            threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


REBOUND = """
  return {chat: await ask("/v1/chat/completions", chat), list: await ask("/v1/models"), health: await ask("/health")};
"""


def test_a_page_whose_name_points_here_reads_nothing(site: Site, chat_page: Pages, tmp_path: Path) -> None:
    """DNS rebinding: for its browser our answers are the page's own. Under a name of ours the same page is our own."""
    url = f"http://evil.example:{site.port}/page"
    with rebound(site, chat_page):
        found = run(tmp_path / "evil", chat_page, url, REBOUND, chat_page, "evil.example 127.0.0.2")
        assert {what: told.split()[0] for what, told in found.items()} == dict.fromkeys(found, "421")
        assert touched(site) == set()
        url = f"http://ours.example:{site.port}/page"
        found = run(tmp_path / "ours", chat_page, url, REBOUND, chat_page, "ours.example 127.0.0.2")
    assert {what: told.split()[0] for what, told in found.items()} == dict.fromkeys(found, "200")


def test_a_page_that_is_named_chats(site: Site, chat_page: Pages, tmp_path: Path) -> None:
    """After the browser has asked; it reads the answer, which is what the setting is for."""
    script = f'return {{chat: await ask("http://localhost:{site.port}/v1/chat/completions", chat)}};'
    url = f"http://chat.example:{chat_page.port}/page"
    found = run(tmp_path, chat_page, url, script, chat_page, "chat.example 127.0.0.1")
    assert found["chat"].startswith("200 ")
    assert '"assistant"' in found["chat"]

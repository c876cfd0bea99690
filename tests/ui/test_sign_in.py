"""Signing in to the page of a real daemon, as a browser does: link, cookie and token, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import http.cookies
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.admin.site import Answer, Site, running

KEYS = {"admin": "an-admin-key-1", "read": "a-reading-key-1", "models": "a-model-key-1"}
CONFIG = "server: {idle_exit: never}\nmodels: {alpha: {engine: sim, options: {load_time: 0.01s}}}\n"
KEYED = CONFIG + "auth:\n  keys:\n" + "".join(
    f"    - {{name: {scope}, key: {key}, scopes: [{scope}]}}\n" for scope, key in KEYS.items()
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running(tmp_path_factory.mktemp("ui"), KEYED) as site:
        yield site


def session_of(answer: Answer) -> dict[str, str]:
    """The header fields by which a browser that got this answer is known."""
    assert answer.status == 200, answer.text
    cookie = http.cookies.SimpleCookie(answer.headers["set-cookie"])["vllmd_session"]
    assert cookie["httponly"] and cookie["samesite"] == "Strict" and cookie["path"] == "/"
    return {"Cookie": f"vllmd_session={cookie.value}", "X-Vllmd-Session": answer.json["token"]}


def at_the_page(site: Site) -> dict[str, str]:
    """The name under which the page is served at loopback addresses."""
    return {"Host": f"vllmd.localhost:{site.port}"}


def sign_in(site: Site, body: object, key: str = "") -> Answer:
    return site.ask("POST", "/ui/session", body, key=key, headers=at_the_page(site))


def by_link(site: Site) -> dict[str, str]:
    link = site.operate("POST", "/admin/ui/links")
    assert link["listen"] == [f"127.0.0.1:{site.port}"]
    code = link["path"].removeprefix("/ui#code=")
    return session_of(sign_in(site, {"code": code}))


def test_a_link_opens_what_the_admin_socket_opens(site: Site) -> None:
    mine = by_link(site)
    status = site.ask("GET", "/admin/status", headers=mine)
    assert [line["name"] for line in status.json["models"]] == ["alpha"]
    assert site.ask("POST", "/admin/models/alpha/pin", {"pinned": True}, headers=mine).json["pinned"]
    assert site.ask("POST", "/admin/models/alpha/pin", {"pinned": False}, headers=mine).status == 200
    assert site.ask("GET", "/admin/models", headers=mine).json["data"][0]["id"] == "alpha"


def test_what_is_done_from_the_page_is_recorded_by_name(site: Site) -> None:
    """In the log stands who did it, as for a key."""
    site.ask("POST", "/admin/models/alpha/pin", {"pinned": False}, headers=by_link(site))
    assert "on the page: done" in site.log


def test_a_session_uses_no_model(site: Site) -> None:
    body = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
    refused = site.ask("POST", "/v1/chat/completions", body, headers=by_link(site))
    assert refused.status == 403 and "send an API key" in refused.error


def test_keys_sign_in_by_their_scopes(site: Site) -> None:
    reading = session_of(sign_in(site, {}, KEYS["read"]))
    assert site.ask("GET", "/admin/status", headers=reading).status == 200
    assert site.ask("POST", "/admin/models/alpha/pin", {}, headers=reading).status == 403
    assert sign_in(site, {}, KEYS["models"]).status == 403
    assert sign_in(site, {}, "wrong").status == 401
    assert sign_in(site, {}).status == 401
    assert sign_in(site, {"code": "wrong"}).status == 401


def test_half_a_session_is_none(site: Site) -> None:
    mine = by_link(site)
    assert site.ask("GET", "/admin/status", headers={"Cookie": mine["Cookie"]}).status == 401
    assert site.ask("GET", "/admin/status", headers={"X-Vllmd-Session": mine["X-Vllmd-Session"]}).status == 401


def test_signing_out_ends_it(site: Site) -> None:
    mine = by_link(site)
    assert site.ask("DELETE", "/ui/session", headers=mine).status == 204
    assert site.ask("GET", "/admin/status", headers=mine).status == 401


def test_another_page_signs_nobody_in_and_does_nothing(site: Site) -> None:
    """A browser says which page it is that sends something."""
    foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert site.ask("POST", "/admin/models/alpha/pin", {}, headers={**by_link(site), **foreign}).status == 403


def test_a_page_of_an_engine_has_another_origin(site: Site) -> None:
    """Its script would find the session otherwise, and act as the operator who is signed in."""
    sent_on = site.ask("GET", "/ui")
    assert (sent_on.status, sent_on.headers["location"]) == (307, f"http://vllmd.localhost:{site.port}/ui")
    refused = site.ask("POST", "/ui/session", {}, key=KEYS["admin"])
    assert refused.status == 403 and "vllmd.localhost" in refused.error


class Evil(BaseHTTPRequestHandler):
    """An engine that answers everything with a page."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"<script>steal(localStorage)</script>"
        self.send_response(200)
        for name, value in (
            ("Content-Type", "text/html"),
            ("Content-Length", str(len(body))),
            ("Service-Worker-Allowed", "/"),
            ("Clear-Site-Data", '"*"'),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


def test_what_an_engine_sends_runs_no_script_where_the_page_is(tmp_path: Path) -> None:
    """Under the page's name it is shut in; under another one ComfyUI's page works, and can reach no session."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Evil) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        model = f'{{engine: remote, options: {{url: "{url}", upstream: ["GET /index.html"]}}}}'
        config = KEYED.replace("models: {", f"models: {{evil: {model}, ", 1).replace("[admin]", "[admin, models]")
        with running(tmp_path, config) as site:
            here = site.ask("GET", "/upstream/evil/index.html", key=KEYS["admin"], headers=at_the_page(site))
            there = site.ask("GET", "/upstream/evil/index.html", key=KEYS["admin"])
        server.shutdown()
    assert here.status == there.status == 200 and b"<script>" in here.body
    assert here.headers["content-security-policy"] == "sandbox"
    assert "content-security-policy" not in there.headers
    for answer in (here, there):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not {"service-worker-allowed", "clear-site-data"} & set(answer.headers)


def test_a_session_makes_no_links(site: Site) -> None:
    """Else one that was made by a key would outlive the key."""
    assert site.ask("POST", "/admin/ui/links", headers=by_link(site)).status == 403
    linked = site.ask("POST", "/admin/ui/links", key=KEYS["read"]).json["path"].removeprefix("/ui#code=")
    session = session_of(sign_in(site, {"code": linked}))
    assert site.ask("GET", "/admin/status", headers=session).status == 200
    assert site.ask("POST", "/admin/models/alpha/pin", {}, headers=session).status == 403


def test_a_key_that_a_browser_sends_by_itself_is_no_operators(site: Site) -> None:
    """A browser that was once given a password adds it to whatever a page asks for."""
    basic = {"Authorization": "Basic " + base64.b64encode(f"x:{KEYS['admin']}".encode()).decode()}
    refused = site.ask("GET", "/admin/status", headers=basic)
    assert refused.status == 403 and "as Bearer" in refused.error
    with contextlib.closing(
        site.connect()
    ) as connection:  # what was allowed once on a connection is not for other paths
        for path, status in (("/upstream/alpha/version", (200, 503)), ("/admin/status", (403,))):
            connection.request("GET", path, headers=basic)
            answer = connection.getresponse()
            answer.read()
            assert answer.status in status, path


def test_strangers_do_not_fill_the_list_of_requests(site: Site) -> None:
    for _ in range(5):
        assert site.ask("GET", "/admin/status").status == 401
    kept = site.operate("GET", "/admin/requests")["requests"]
    assert not [each for each in kept if each["path"] == "/admin/status"]


def test_the_page_and_nothing_beside_it_is_served(site: Site) -> None:
    page = site.ask("GET", "/ui/", headers=at_the_page(site))
    assert page.status == 200 and "text/html" in page.headers["content-type"]
    assert site.ask("GET", "/ui", headers=at_the_page(site)).body == page.body
    assert site.ask("GET", "/ui/vendor/preact.js").status == 200
    for path in ("/ui/../files.py", "/ui/%2e%2e/files.py", "/ui/vendor", "/ui/versions.json", "/ui/vendor/NOTICE"):
        assert site.ask("GET", path).status in (400, 404), path


def test_a_key_that_is_taken_away_ends_its_sessions(tmp_path: Path) -> None:
    with running(tmp_path, KEYED) as site:
        mine = session_of(sign_in(site, {}, KEYS["admin"]))
        assert site.ask("GET", "/admin/status", headers=mine).status == 200
        site.reconfigure(KEYED.replace(KEYS["admin"], "another-secret-1"))  # the name alone is not the key
        assert site.ask("GET", "/admin/status", headers=mine).status == 401
        site.reconfigure(KEYED.replace("idle_exit: never", "idle_exit: never, ui: false"))
        off = site.ask("GET", "/ui/")
        assert off.status == 404 and "server.ui: true" in off.error


def test_an_address_that_others_can_reach_has_no_page_unless_it_is_wanted(tmp_path: Path) -> None:
    """What the page shows and does can be overheard on a network."""
    with running(tmp_path, KEYED, address="0.0.0.0") as site:
        assert site.ask("GET", "/ui/").status == 404
        assert site.ask("POST", "/ui/session", {}, key=KEYS["admin"]).status == 404
        site.reconfigure(KEYED.replace("idle_exit: never", "idle_exit: never, ui: true"))
        assert site.ask("GET", "/ui/").status == 200


def test_without_keys_the_link_is_the_only_way_in(tmp_path: Path) -> None:
    """Everybody on the machine may use the models then; only operators see the page."""
    with running(tmp_path, CONFIG) as site:
        assert sign_in(site, {}).status in (401, 403)
        assert site.ask("GET", "/admin/status", headers=by_link(site)).status == 200
        assert json.loads(site.chat("alpha").body)["choices"]


def test_the_timeline_of_all_models_goes_back_before_this_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon exits when nothing is loaded: what it decided at night must be there in the morning."""
    monkeypatch.setenv("VLLMD_LEARNT", str(tmp_path / "learnt.json"))
    with running(tmp_path, CONFIG) as site:
        assert site.chat("alpha").status == 200
    (tmp_path / "admin.sock").unlink()
    (tmp_path / "read.sock").unlink()
    with running(tmp_path, CONFIG) as site:
        made = site.operate("GET", "/admin/decisions")["decisions"]
        assert ("start", "alpha") in [(each["what"], each["model"]) for each in made]


def test_the_settings_in_force_have_their_origin_and_no_secret(site: Site) -> None:
    shown = site.ask("GET", "/admin/config", admin=True)
    assert shown.status == 200 and "idle_exit: never  # " in shown.text
    assert not any(key in shown.text for key in KEYS.values())
    assert "engine: sim" in site.ask("GET", "/admin/config?model=alpha", admin=True).text
    assert site.ask("GET", "/admin/config?model=nobody", admin=True).status == 404

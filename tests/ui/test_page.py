"""The page in a real browser, with a real daemon and stand-in engines behind it: what an operator does with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.admin.site import Site, running, until
from tests.machine.container import cache

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: packaging/dev/setup venv")

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: packaging/dev/setup host")

# Chromium must not look for its maker's servers: this machine has no way there, and it would wait for them.
SWITCHES = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
LIMIT = 30_000  # ms that the page may take to show something on a busy machine
AXE = cache() / "axe" / "axe.min.js"
CONFIG = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}]
server: {{idle_exit: never}}
idle: {{sleep_after: never}}
defaults: {{engine: sim}}
models:
  alpha: {{gpu_memory: 50GiB, options: {{load_time: 0.2s}}}}
  beta: {{gpu_memory: 50GiB, options: {{load_time: 0.2s}}}}
  broken: {{gpu_memory: 10GiB, options: {{fail: exit-at-start}}}}
  slow: {{gpu_memory: 5GiB, options: {{load_time: 0.2s, tokens_per_second: 1}}}}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLMD_USAGE", str(folder / "usage.db"))
        yield from _site(folder)


def _site(folder: Path) -> Iterator[Site]:
    with running(folder, CONFIG.format(folder=folder)) as site:
        yield site


@pytest.fixture
def page(browser: sync_api.Browser, site: Site) -> Iterator[sync_api.Page]:
    """Signed in by a link; whatever the browser complains of fails the test."""
    yield from visit(browser, site)


def visit(browser: sync_api.Browser, site: Site, **more: object) -> Iterator[sync_api.Page]:
    context = browser.new_context(base_url=f"http://vllmd.localhost:{site.port}", **more)  # type: ignore[arg-type]
    page, complaints = context.new_page(), []
    page.set_default_timeout(LIMIT)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.goto(site.operate("POST", "/admin/ui/links")["path"])
    page.get_by_role("navigation").wait_for()
    yield page
    context.close()
    # The browser's console calls each refused request an error, also those that are refused on purpose.
    assert [text for text in complaints if "Failed to load resource" not in text] == []


def row(page: sync_api.Page, name: str) -> sync_api.Locator:
    """A model's row of the table."""
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


def test_the_link_signs_in_and_is_gone_from_the_address(page: sync_api.Page) -> None:
    """A screenshot of the window gives nobody the way in."""
    assert "code=" not in page.url
    row(page, "alpha").get_by_text("stopped").wait_for()


def test_a_cold_start_and_what_it_moves_can_be_watched(page: sync_api.Page, site: Site) -> None:
    """Two models that do not fit together: the page shows each as it becomes so, without a reload."""
    assert site.chat("alpha").status == 200
    row(page, "alpha").get_by_text("running").wait_for()
    page.get_by_role("img", name="alpha").wait_for()
    assert site.chat("beta").status == 200
    row(page, "beta").get_by_text("running").wait_for()
    row(page, "alpha").get_by_text("asleep").wait_for()


def test_an_operator_reads_what_a_verb_does_before_it_does_it(page: sync_api.Page, site: Site) -> None:
    assert site.chat("beta").status == 200
    row(page, "beta").get_by_role("button", name="stop beta").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("It answers nothing now. Its engine is stopped, and 50 GiB on GPU 0 come free.").wait_for()
    assert site.line("beta")["state"] == "running", "nothing is done before it is confirmed"
    dialog.get_by_role("button", name="stop beta").click()
    row(page, "beta").get_by_text("stopped").wait_for()


def test_all_models_are_stopped_after_it_was_read_what_that_does(page: sync_api.Page, site: Site) -> None:
    """One button; each of them is named with what becomes of it, and nothing happens before."""
    assert site.chat("alpha").status == site.chat("beta").status == 200
    row(page, "alpha").get_by_text("asleep").wait_for()
    page.get_by_role("button", name="stop all").click()
    dialog = page.get_by_role("dialog", name="stop 2 models")
    told = dialog.get_by_label("what it will do")
    told.get_by_text("50 GiB on GPU 0 come free").wait_for()
    assert told.locator("dt").all_inner_texts() == ["alpha", "beta"]
    assert site.line("beta")["state"] == "running"
    dialog.get_by_role("button", name="stop all").click()
    for name in ("alpha", "beta"):
        row(page, name).get_by_text("stopped").wait_for()
    page.get_by_role("button", name="stop all").wait_for(state="detached")


def test_a_load_says_who_leaves_for_it(page: sync_api.Page, site: Site) -> None:
    """The daemon's own words, from what decides it in earnest."""
    assert site.chat("beta").status == 200
    until(lambda: site.line("alpha")["state"] in ("sleeping_l1", "sleeping_l2", "stopped"))
    row(page, "alpha").get_by_role("button", name="load alpha").click()
    page.get_by_role("dialog").get_by_text("after others have made room: beta is put to sleep").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="drain GPU 0").click()
    page.get_by_role("dialog").get_by_text("Nothing new is put on GPU 0.").wait_for()
    page.get_by_role("dialog").get_by_text("beta is stopped.").wait_for()


def test_every_action_is_there_and_says_what_it_does(page: sync_api.Page, site: Site) -> None:
    """Those without a button of their own are behind "more"."""
    assert site.chat("beta").status == 200
    row(page, "beta").get_by_text("running").wait_for()
    row(page, "beta").get_by_role("button", name="more for beta").click()
    dialog = page.get_by_role("dialog")
    action = dialog.get_by_role("combobox", name="Action")
    said = {
        "load": "It serves already",
        "sleep": "The next request wakes it",
        "stop": "Its engine is stopped",
        "restart": "started anew",
        "pin": "until it is unpinned",
        "lease": "Until the lease ends",
        "disable": "Who asks for it from now on gets status 503",
        "probe": "one short question",
    }
    assert set(action.locator("option").all_inner_texts()) == set(said)
    for name, words in said.items():
        action.select_option(name)
        dialog.get_by_text(words).wait_for()
    dialog.get_by_role("button", name="probe beta").click()
    dialog.get_by_role("status").get_by_text("beta: ").wait_for()
    assert site.line("beta")["state"] == "running", "looking has done nothing"


def test_a_model_is_disabled_with_a_message_and_given_back(page: sync_api.Page, site: Site) -> None:
    row(page, "beta").get_by_role("button", name="more for beta").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("combobox", name="Action").select_option("disable")
    dialog.get_by_label("Message to its clients").fill("back on Monday")
    dialog.get_by_role("button", name="disable beta").click()
    row(page, "beta").get_by_text("disabled: back on Monday").wait_for()
    refused = site.chat("beta")
    assert (refused.status, refused.error) == (503, "beta is disabled: back on Monday")
    row(page, "beta").get_by_role("button", name="enable beta").click()
    page.get_by_role("dialog").get_by_role("button", name="enable beta").click()
    row(page, "beta").get_by_role("button", name="load beta").wait_for()
    assert site.chat("beta").status == 200


def test_why_shows_who_left_for_whom(page: sync_api.Page, site: Site) -> None:
    assert site.chat("alpha").status == site.chat("beta").status == 200
    page.get_by_role("link", name="Why").click()
    decision = page.get_by_role("row").filter(has_text="alpha sleeps").first
    decision.wait_for()
    decision.get_by_role("button").click()
    decision.get_by_text("waiting").first.wait_for()


def test_the_hardware_and_how_busy_it_is(page: sync_api.Page, site: Site) -> None:
    """The host's figures are this machine's; the device's, which a declared one does not tell, are put in."""

    def measured(route: sync_api.Route) -> None:
        told = site.operate("GET", "/admin/status") | {"backend": "systemd"}
        for device in told["devices"]:
            device |= {"utilisation": 87.4, "power": 310.0, "temperature": 61.0, "name": "H200", "node": 1}
        route.fulfill(json=told)

    page.route("**/admin/status", measured)
    page.get_by_text("87 % busy").wait_for()
    page.get_by_text("Hardware").click()
    host = site.operate("GET", "/admin/status")["host"]
    assert host["cpus"] > 0
    assert 0 < host["available"] < host["memory"]
    page.get_by_text(host["system"], exact=True).wait_for()
    page.get_by_text("H200; 80 GiB; NUMA node 1").wait_for()
    page.get_by_text("journalctl -u vllmd -f").wait_for()
    page.get_by_role("link", name="Why").click()
    page.get_by_role("combobox", name="Curve of").select_option("utilisation")
    page.get_by_role("img", name="Share of time that it computed. GPU 0: 87 %").wait_for()
    page.get_by_role("combobox", name="Curve of").select_option("used")
    page.get_by_role("img", name=re.compile(r"Host memory in use\. [\d.]+ [MGT]iB")).wait_for()
    page.get_by_role("combobox", name="Curve of").select_option("load")
    page.get_by_role("img", name=re.compile(r"Load of the CPUs\. \d+\.\d")).wait_for()


def test_a_launcher_that_hangs_is_told_above_all_models(page: sync_api.Page, site: Site) -> None:
    """No model's own line says why nothing starts."""
    trouble = {"launcher_trouble": "it has not answered a Start for 25 s"}
    page.route("**/admin/status", lambda route: route.fulfill(json=site.operate("GET", "/admin/status") | trouble))
    wrong = page.get_by_role("status", name="what is wrong")
    wrong.get_by_text("No engine starts or ends, because of the launcher: it has not answered").wait_for()


def test_a_decision_about_devices_names_no_model(page: sync_api.Page, site: Site) -> None:
    """Its row says so: an empty head of a row tells nobody who listens to the page what the row is about."""
    site.operate("POST", "/admin/devices/0/drain", {"drained": False})
    page.get_by_role("link", name="Why").click()
    page.locator("th").get_by_text("(no model)", exact=True).first.wait_for()


def test_a_failure_stands_where_one_looks_with_its_cause(page: sync_api.Page, site: Site) -> None:
    assert site.chat("broken").status >= 500
    row(page, "broken").get_by_text("failed", exact=True).wait_for()
    page.get_by_role("status", name="what is wrong").get_by_text("broken has failed: ").wait_for()  # above all models
    page.get_by_role("link", name="broken").click()
    page.get_by_role("alert").get_by_text("It failed.").wait_for()
    page.get_by_role("tab", name="Log").click()
    page.get_by_label("log", exact=True).wait_for()


def test_a_model_can_be_tried_beside_another(page: sync_api.Page) -> None:
    page.get_by_role("link", name="Try").click()
    page.get_by_role("combobox", name="Model").select_option("alpha")
    page.get_by_label("Message").fill("tell me about nothing")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("article", name="answer of alpha").get_by_text("tell me about nothing").wait_for()
    page.get_by_text("first word after").wait_for()
    page.get_by_text("The same as a command").click()
    page.get_by_text("curl http://vllmd.localhost").wait_for()


def test_embeddings_are_shown_by_their_beginning(page: sync_api.Page) -> None:
    page.get_by_role("link", name="Try").click()
    page.get_by_role("combobox", name="What").select_option("embeddings")
    page.get_by_role("textbox", name="Text").fill("nothing")
    page.get_by_role("button", name="Send").click()
    page.get_by_text('"embedding": [').wait_for()


def test_two_models_answer_side_by_side_and_the_command_is_the_same_request(page: sync_api.Page, site: Site) -> None:
    """What is shown as curl and as Python asks the same: words of the message stay words."""
    page.get_by_role("link", name="Try").click()
    page.get_by_role("combobox", name="Model").select_option("beta")
    page.get_by_role("combobox", name="Beside it").select_option("alpha")
    page.get_by_label("Message").fill("say true, or null, it's false")
    page.get_by_role("button", name="Send").click()
    for name in ("alpha", "beta"):
        page.get_by_role("article", name=f"answer of {name}").get_by_text("first word after").wait_for()
    page.get_by_text("The same as a command").click()
    curl, python = page.locator("details pre").all_inner_texts()
    assert "it'\\''s false" in curl
    calls: list[dict[str, Any]] = []

    class Client:
        def __init__(self, **how: object) -> None:
            assert str(how["base_url"]).endswith(f":{site.port}/v1")
            self.chat = self.completions = self

        def create(self, **body: Any) -> Any:
            calls.append(body)
            return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="x"))])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openai", SimpleNamespace(OpenAI=Client))
        exec(python, {})
    assert calls == [{"model": "beta", "messages": [{"role": "user", "content": "say true, or null, it's false"}]}]
    asked = subprocess.run(
        ["sh", "-c", curl.replace("curl ", "printf '%s\\n' ", 1)], capture_output=True, text=True, check=True
    )
    assert json.loads(asked.stdout.splitlines()[-1]) == {**calls[0], "stream": True}


def test_what_is_no_text_is_shown_too(page: sync_api.Page) -> None:
    """A transcription by the stand-in; images and sound, which it does not make, by answers as engines give them."""
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    page.route("**/v1/images/generations", lambda route: route.fulfill(json={"data": [{"b64_json": dot}]}))
    page.route("**/v1/audio/speech", lambda route: route.fulfill(body=b"RIFF", content_type="audio/wav"))
    page.get_by_role("link", name="Try").click()
    what, send = page.get_by_role("combobox", name="What"), page.get_by_role("button", name="Send")
    what.select_option("transcription")
    page.get_by_label("Sound").set_input_files([{"name": "a.wav", "mimeType": "audio/wav", "buffer": b"RIFF"}])
    send.click()
    page.get_by_text("heard 4 bytes of a.wav").wait_for()
    what.select_option("images")
    page.get_by_role("textbox", name="Text").fill("a dot")
    send.click()
    page.get_by_role("img", name="made by").wait_for()
    what.select_option("speech")
    send.click()
    page.locator("audio[src^='blob:']").wait_for()
    what.select_option("rerank")
    page.get_by_role("textbox", name="Query").fill("x")
    page.get_by_label("Documents").fill("one\ntwo")
    send.click()
    page.get_by_text("relevance_score").first.wait_for()


def test_a_model_is_kept_probed_and_its_settings_have_an_origin(page: sync_api.Page, site: Site) -> None:
    assert site.chat("alpha").status == 200
    page.goto("/ui#/models/alpha")
    page.get_by_label("settings").get_by_text("gpu_memory: 50GiB  # ").wait_for()
    page.get_by_role("button", name="Keep it loaded").click()
    page.get_by_role("button", name="Give the lease back").wait_for()
    assert site.line("alpha")["leases"] == ["page"]
    page.get_by_role("button", name="Give the lease back").click()
    page.get_by_role("button", name="Keep it loaded").wait_for()
    page.get_by_role("button", name="Probe its engines").click()
    page.get_by_role("status").get_by_text("alpha: ").wait_for()


def test_a_model_of_the_cache_is_served_and_what_cannot_be_fetched_is_said(page: sync_api.Page, site: Site) -> None:
    """What is added is written as `vllmctl add` writes it."""
    snapshot = site.folder / "hf" / "hub" / "models--acme--tiny" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (snapshot / "model.safetensors").write_bytes(b"0" * 4096)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    page.get_by_role("link", name="Models").click()
    page.get_by_role("button", name="serve acme/tiny").click()
    page.get_by_role("table", name="models").get_by_role("rowheader", name="acme/tiny").wait_for()
    written = (site.folder / "models.d" / "acme-tiny.yaml").read_text()
    assert "models:\n  acme/tiny:" in written
    page.get_by_label("Name or repository").fill("no such name")
    page.get_by_role("button", name="Fetch and serve").click()
    page.get_by_role("group", name="download of no such name").get_by_role("alert").wait_for()


def test_a_failed_request_of_last_night_is_found_and_looked_into(page: sync_api.Page, site: Site) -> None:
    assert site.chat("broken").status >= 500
    page.get_by_role("link", name="Requests").click()
    page.get_by_label("only failed").check()
    found = page.get_by_role("row").filter(has_text="broken").first
    found.get_by_text("EngineFailed").wait_for()
    found.get_by_role("link").click()
    page.get_by_role("heading", name="Head").wait_for()
    page.get_by_text("/v1/chat/completions").wait_for()
    page.get_by_text("broken: the engine exited").wait_for()


def test_a_request_under_way_is_cancelled(page: sync_api.Page, site: Site) -> None:
    """It is said what that means; then its client is told, and it stands among those that have ended."""
    connection = site.connect()
    body = json.dumps({"model": "slow", "prompt": "x", "max_tokens": 1000, "min_tokens": 1000})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json", "X-Request-Id": "endless"})
    until(lambda: site.line("slow")["in_flight"] == 1)
    page.get_by_role("link", name="Requests").click()
    page.get_by_role("row").filter(has_text="under way").get_by_role("link").click()
    page.get_by_text("so far").wait_for()
    page.get_by_role("link", name="All requests").click()
    page.get_by_role("button", name="cancel request endless").click()
    page.get_by_role("dialog").get_by_text("Its client gets status 403").wait_for()
    assert site.line("slow")["in_flight"] == 1
    page.get_by_role("button", name="Cancel the request").click()
    assert connection.getresponse().status == 403
    connection.close()
    page.get_by_role("row").filter(has_text="slow").get_by_text("403 RequestCancelled").wait_for()
    assert site.line("slow")["in_flight"] == 0
    site.operate("POST", "/admin/models/slow/unload?wait=true")


def test_bodies_are_seen_only_after_somebody_said_so(page: sync_api.Page, site: Site) -> None:
    page.get_by_role("link", name="Requests").click()
    page.get_by_role("button", name="Record bodies").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("combobox", name="Model").select_option("beta")
    dialog.get_by_role("button", name="Record").click()
    dialog.get_by_text("left").wait_for()
    dialog.get_by_role("button", name="Close").click()
    answer = site.ask("POST", "/v1/completions", {"model": "beta", "prompt": "who goes there", "max_tokens": 3})
    assert answer.status == 200 and "x-vllmd-recorded" in answer.headers
    page.locator(f"a[href*='{answer.headers['x-request-id']}']").first.click()  # others of beta stand there already
    page.get_by_role("heading", name="Request body").wait_for()
    page.get_by_text("who goes there").first.wait_for()
    site.operate("DELETE", "/admin/recordings")


def test_usage_is_shown_and_taken_along(page: sync_api.Page, site: Site) -> None:
    assert site.chat("alpha").status == 200
    page.get_by_role("link", name="Usage").click()
    page.get_by_role("combobox", name="By").select_option("model")
    page.get_by_role("rowheader", name="alpha").wait_for()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export as CSV").click()
    lines = saved.value.path().read_text().splitlines()
    assert lines[0].startswith("model,requests,") and any(line.startswith('"alpha",') for line in lines)


def test_a_plan_shows_what_one_more_gpu_would_change(page: sync_api.Page, site: Site) -> None:
    for _ in range(3):
        assert site.chat("alpha").status == site.chat("beta").status == 200
    page.get_by_role("link", name="Plan").click()
    page.get_by_role("button", name="Compute").click()
    table = page.get_by_role("table", name="plan", exact=True)
    table.get_by_role("columnheader", name="with the change").wait_for()

    def figures(title: str) -> list[str]:
        named = page.get_by_role("rowheader", name=title, exact=True)
        return table.get_by_role("row").filter(has=named).get_by_role("cell").all_inner_texts()

    assert figures("GPUs") == ["80 GiB", "80 GiB, 80 GiB"]
    before, after = figures("longest wait")
    assert before != after, "those for beta need not wait for alpha"
    page.get_by_role("img", name="Requests that wait.").wait_for()
    page.get_by_role("combobox", name="Model with other settings").select_option("alpha")
    page.get_by_label("Its settings").fill("gpu_memroy: 1GiB")
    page.get_by_role("button", name="Compute").click()
    page.get_by_role("alert").get_by_text("gpu_memory").wait_for()


def test_another_tab_signs_out_and_no_page_remembers(page: sync_api.Page) -> None:
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="With a link").wait_for()
    page.reload()
    page.get_by_role("heading", name="With a link").wait_for()
    assert page.evaluate("localStorage.length") == 0


def test_the_page_says_that_the_daemon_is_away_and_goes_on_when_it_is_back(
    browser: sync_api.Browser, tmp_path: Path
) -> None:
    """Its sessions do not outlive this daemon, which has no cache folder: signing in is then what is asked for."""
    with running(tmp_path, CONFIG.format(folder=tmp_path)) as site:
        visits = visit(browser, site)
        page = next(visits)
        row(page, "alpha").wait_for()
        site.process.terminate()
        site.process.wait(60)
        page.get_by_text("vllmd does not answer").wait_for()
        with pytest.raises(StopIteration):
            next(visits)


@pytest.mark.parametrize("models", [0, 80])
def test_none_and_many_models(browser: sync_api.Browser, tmp_path: Path, models: int) -> None:
    """With none, the first words say what to do; with many, they can be searched."""
    names = {f"model-{number:03}": {"engine": "sim"} for number in range(models)}
    with running(tmp_path, json.dumps({"server": {"idle_exit": "never"}, "devices": [], "models": names})) as site:
        visits = visit(browser, site)
        page = next(visits)
        if models:
            page.get_by_role("searchbox").fill("model-07")
            row(page, "model-079").wait_for()
            assert page.get_by_role("rowheader").count() == 10
        else:
            page.get_by_role("heading", name="No model is configured").wait_for()
            page.get_by_text("vllmctl run").wait_for()
        with pytest.raises(StopIteration):
            next(visits)


MOST_NODES = 2500  # elements of a view, however many models there are


def test_five_thousand_models_and_a_hundred_events_a_second(browser: sync_api.Browser, tmp_path: Path) -> None:
    """Only what is in sight is in the document, and what happens is drawn as often as the screen is, not as often as
    it happens; the last thing that happened is shown all the same.
    """
    names = {f"model-{number:04}": {"engine": "sim"} for number in range(5000)}
    config = json.dumps({"server": {"idle_exit": "never"}, "devices": [], "models": names})
    with running(tmp_path, config, limit=120.0) as site:
        visits = visit(browser, site)
        page = next(visits)
        row(page, "model-0000").wait_for()
        for view in ("now", "why", "requests", "models", "try", "plan"):
            page.goto(f"/ui#/{view}")
            page.locator("main h2").first.wait_for()
            assert page.locator("*").count() < MOST_NODES, view
        page.get_by_label("Model with other settings").fill("model-499")
        assert page.locator("datalist option").count() == 10, "of many the name is typed"
        page.goto("/ui#/now")
        page.get_by_role("searchbox").fill("model-4999")
        row(page, "model-4999").get_by_text("stopped").wait_for()
        page.goto("/ui#/requests")
        assert site.chat("model-4999").status == 200
        for _ in range(200):
            site.ask("POST", "/v1/completions", {"model": "model-4999", "prompt": "x", "max_tokens": 1})
        page.get_by_role("row").filter(has_text="model-4999").nth(40).wait_for()
        (last,) = site.operate("GET", "/admin/requests?limit=1&model=model-4999")["requests"]
        page.locator(f"a[href='#/requests/{last['id']}']").wait_for()
        assert page.locator(f"a[href='#/requests/{last['id']}']").count() == 1
        assert page.locator("*").count() < MOST_NODES
        page.goto("/ui#/now")
        page.get_by_role("searchbox").fill("model-4999")
        row(page, "model-4999").get_by_text("running").wait_for()
        with pytest.raises(StopIteration):
            next(visits)


@pytest.mark.parametrize("view", ["now", "why", "requests", "models", "models/alpha", "try", "usage", "plan"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(browser: sync_api.Browser, site: Site, view: str, scheme: str) -> None:
    """axe's rules: contrast, names of controls, order of headings and the like; in both colour schemes."""
    assert AXE.exists(), "no axe here: packaging/dev/setup axe"
    visits = visit(browser, site, color_scheme=scheme, bypass_csp=True)
    page = next(visits)
    row(page, "alpha").wait_for()
    page.goto(f"/ui#/{view}")
    page.locator("main h2").first.wait_for()
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run().then(found => found.violations.map(each => each.id + ': ' + each.nodes[0].html))")
    assert found == []
    with pytest.raises(StopIteration):
        next(visits)


@pytest.mark.parametrize("width", [390, 800, 1100])
def test_every_window_shows_all_of_it(browser: sync_api.Browser, site: Site, width: int) -> None:
    """Nothing is cut off at the right: on a phone, in half a screen, on a small laptop."""
    site.chat("broken")
    assert site.chat("beta").status == 200
    visits = visit(browser, site, viewport={"width": width, "height": 844})
    page = next(visits)
    row(page, "beta").get_by_text("running").wait_for()
    for view in ("now", "why", "requests", "models", "models/alpha", "try", "usage", "plan"):
        page.goto(f"/ui#/{view}")
        page.locator("main h2").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
    with pytest.raises(StopIteration):
        next(visits)


def test_every_operation_is_documented_and_a_get_can_be_tried(page: sync_api.Page, site: Site) -> None:
    """``/docs`` draws the types of the whole document, of which one that it cannot draw would leave an empty page."""
    page.goto("/docs")
    page.locator("details").first.wait_for()
    paths = site.ask("GET", "/openapi.json").json["paths"]
    assert page.locator("details").count() == sum(map(len, paths.values()))
    listed = page.locator("details").filter(has=page.get_by_text("/v1/models", exact=True))
    listed.locator("summary").click()
    listed.get_by_role("button", name="Send").click()
    listed.get_by_text('200 OK {"object":"list"').wait_for()

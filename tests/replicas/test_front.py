"""A front whose replicas are vllmd nodes on other machines: killed, cut off, back again, and all away at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines.installed import Site, daemon
from tests.replicas.lab import KEY, PORT, Lab, machines, until
from tests.replicas.load import Load

CLIENTS = 24
TRIES = 3  # a busy machine may take its time once, not every time
ENGINE = {"load_time": "0s", "tokens_per_second": 40}  # half a second for an answer of twenty words


class Front:
    """The front's daemon, and what it says of the nodes."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.site.port}"

    def replica(self, name: str) -> dict[str, Any]:
        return next(line for line in self.site.view("sim/m")["replicas"] if line["name"] == f"sim/m@{name}")

    def serve(self, *names: str) -> None:
        """Wait until these nodes serve."""
        until(lambda: all(self.replica(name)["health"] == "serving" for name in names), f"{names} to serve")

    def decided(self, name: str, what: str, since: float) -> float:
        """When the front first decided so about a node after ``since`` (Unix time), as soon as it has."""
        found: list[float] = []

        def look() -> list[float]:
            made = self.site.admin.get("/admin/decisions").json()["decisions"]
            found[:] = [d["at"] for d in made if (d["model"], d["what"]) == (f"sim/m@{name}", what) and d["at"] > since]
            return found

        until(look, f"{what} {name}")
        return found[0]

    def busy(self, name: str) -> None:
        """Wait until several requests are at that node: those that are no streams without a byte of their answer."""
        until(lambda: self.replica(name)["in_flight"] >= CLIENTS // 4, f"requests at {name}")

    def ctl(self, *argv: str) -> str:
        """What vllmctl prints."""
        env = {**os.environ, "VLLMD_ADMIN_SOCKET": str(self.site.log.with_name("admin.sock"))}
        command = [sys.executable, "-m", "vllmd.cli", *argv]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with machines(tmp_path_factory.mktemp("lab"), "a", "b") as lab:
        for node in lab.nodes.values():
            node.start(options=ENGINE)
        yield lab


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("front")
    (folder / "nodes.key").write_text(f"{KEY}\n")
    (folder / "nodes.key").chmod(0o600)
    listed = [
        {"name": name, "options": {"url": f"http://{node.address}:{PORT}/v1"}} for name, node in lab.nodes.items()
    ]
    model = {"engine": "remote", "options": {"key_file": str(folder / "nodes.key")}, "replicas": {"of": listed}}
    config = {"server": {"idle_exit": "never"}, "devices": [], "models": {"sim/m": model}}
    with daemon(folder / "site", config, inside=lab.inside("front")) as site:
        yield site


@pytest.fixture
def front(lab: Lab, site: Site) -> Front:
    """With both nodes serving, whatever the script before did."""
    for node in lab.nodes.values():
        node.plug_in()
        if not node.alive:
            node.start(options=ENGINE)
    front = Front(site)
    front.site.answer("sim/m")
    front.serve("a", "b")
    return front


def test_a_node_that_dies_under_load_costs_nobody_but_who_reads_its_streams(front: Front, lab: Lab) -> None:
    """A crash is everyday: its clients are answered by the other node, and a stream that it had begun says its end."""
    a = lab.nodes["a"]
    with Load(front.url, "sim/m", CLIENTS) as load:
        more(load, CLIENTS)
        front.busy("a")
        died = time.time()
        a.kill()
        left_out = front.decided("a", "eject", died) - died
        more(load, 3 * CLIENTS)
        assert front.replica("a")["in_flight"] == 0
        a.start(options=ENGINE)
        front.decided("a", "serve", died)
        until(lambda: a.answered > CLIENTS, "its share of the load")
    assert not load.failed
    assert 0 < len(load.truncated) <= CLIENTS, "only what it was about when it died"
    assert left_out < 1.0


def test_a_node_that_is_cut_off_is_left_out_within_a_second_and_nobody_who_waits_for_it_is_lost(
    front: Front, lab: Lab
) -> None:
    """Nothing tells that a cable is pulled: connections stay open and silent, so the front has to look, and often."""
    a, took = lab.nodes["a"], []
    with Load(front.url, "sim/m", CLIENTS) as load:
        for _ in range(TRIES):
            more(load, CLIENTS)
            front.busy("a")
            cut_off = time.time()
            a.cut_off()
            took.append(front.decided("a", "eject", cut_off) - cut_off)
            drains(lambda: front.replica("a")["in_flight"])
            back = time.time()
            a.plug_in()
            front.decided("a", "serve", back)
            if took[-1] < 1.0:
                break
    assert not load.failed
    assert took[-1] < 1.0, took


def test_a_node_that_returns_serves_again_by_itself(front: Front, lab: Lab) -> None:
    """Its operator has told the front nothing; a probe, not a client, finds out whether it is well."""
    a = lab.nodes["a"]
    cut_off = time.time()
    a.cut_off()
    front.decided("a", "eject", cut_off)
    until(lambda: front.replica("a")["state"] == "error", "the front to give it up")
    before, back = a.answered, time.time()
    a.plug_in()
    front.serve("a")
    assert front.decided("a", "serve", back) > front.decided("a", "start", cut_off)
    assert a.answered > before, "nobody but a probe has asked it"
    with Load(front.url, "sim/m", CLIENTS) as load:
        until(lambda: a.answered > before + CLIENTS, "its share of the load")
    assert not load.failed
    assert not load.truncated


def test_with_both_away_everybody_is_told_so_and_what_is_no_request_works_on(front: Front, lab: Lab) -> None:
    """A clear 503 with each node and its trouble, a time to come back, and no operator needed when the nodes are."""
    for node in lab.nodes.values():
        node.cut_off()
    replies = [front.site.chat("sim/m") for _ in range(2)]
    for reply in replies:
        assert reply.status_code == 503
        assert 1 <= int(reply.headers["retry-after"]) <= 5
        for name, node in lab.nodes.items():
            assert f"{node.address}:{PORT}" in reply.json()["error"]["message"], name
    assert [model["id"] for model in front.site.http.get("/v1/models").json()["data"]] == ["sim/m"]
    assert front.site.http.get("/health").status_code == 200
    assert 'vllmd_model_requests_total{code="503",model="sim/m"}' in front.site.http.get("/metrics").text
    shown = front.ctl("ps")
    assert "0 of 2 replicas serve, degraded" in shown
    assert all(f"{node.address}:{PORT}" in shown for node in lab.nodes.values())
    for node in lab.nodes.values():
        node.plug_in()
    front.serve("a", "b")
    assert json.loads(front.ctl("ps", "--json"))[0]["serving"] == 2
    assert front.site.answer("sim/m", "back again") == "back again"


def more(load: Load, outcomes: int) -> None:
    """Wait until so many more requests have ended."""
    enough = len(load.outcomes) + outcomes
    until(lambda: len(load.outcomes) >= enough, f"{outcomes} more requests to end")


def drains(in_flight: Callable[[], int]) -> None:
    """Wait until nothing is at a node any more; insists that nothing more goes there meanwhile."""
    before = in_flight()

    def look() -> bool:
        nonlocal before
        now = in_flight()
        assert now <= before, "it was sent another request"
        before = now
        return now == 0

    until(look, "its requests to go elsewhere")

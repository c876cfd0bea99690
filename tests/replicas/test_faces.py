"""What operators and programs see of replicas, and how they name them: a real daemon with two devices."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engines.installed import Site, daemon
from tests.replicas.stubs import until
from vllmd.client import AsyncClient, Client
from vllmd.errors import UnknownModel

DEVICES = [{"memory": "80GiB"}] * 2
MODELS = {
    "org/m": {"engine": "sim", "gpu_memory": "20GiB", "replicas": 2, "aliases": ["a"]},
    "one": {"engine": "sim", "gpu_memory": "20GiB"},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    config = {"devices": DEVICES, "server": {"idle_exit": "never"}, "models": MODELS}
    with daemon(tmp_path_factory.mktemp("faces") / "site", config) as site:
        yield site


@pytest.fixture(autouse=True)
def at_rest(site: Site) -> None:
    """Nothing is loaded."""
    for model in ("org%2Fm", "one"):
        site.admin.post(f"/admin/models/{model}/unload?force=true&wait=true", json={})


def ctl(site: Site, *argv: str, status: int = 0) -> str:
    """What vllmctl prints (stdout, then stderr), ended with ``status``."""
    env = {**os.environ, "VLLMD_ADMIN_SOCKET": str(site.log.parent / "admin.sock")}
    command = [sys.executable, "-m", "vllmd.cli", *argv]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def client(site: Site) -> Client:
    return Client(f"unix:{site.log.parent}/admin.sock")


def test_a_day_of_a_replica(site: Site) -> None:
    """Every verb takes its name, in any of the ways in which its model may be called."""
    ctl(site, "start", "a")
    assert "2 of 2 replicas serve" in ctl(site, "ps")
    assert "m@2 is stopped" in ctl(site, "stop", "m@2")
    assert "1 of 2 replicas serve" in ctl(site, "why", "m")
    assert "a@2 is running" in ctl(site, "start", "a@2")
    assert "sleeping_l1" in ctl(site, "sleep", "org/m@2")
    assert "m@2 is running" in ctl(site, "wake-up", "m@2")
    ctl(site, "pin", "m@2")
    pinned = {line["name"]: line["pinned"] for line in json.loads(ctl(site, "ps", "--json"))[0]["replicas"]}
    assert pinned == {"org/m@1": False, "org/m@2": True}
    ctl(site, "unpin", "m@2")
    assert "startup complete" in ctl(site, "logs", "m@2")
    both = ctl(site, "logs", "m")
    assert "== org/m@1" in both and "== org/m@2" in both
    assert " org/m@2: " in ctl(site, "why", "m@2")
    assert " org/m@2: " not in ctl(site, "why", "m@1")


def test_a_probe_loads_nothing(site: Site) -> None:
    """It says so, with the state."""
    answer = site.admin.post("/admin/models/a/probe", json={})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        409,
        "org/m does not serve now (stopped), and a probe loads nothing",
    )
    with client(site) as asking:
        assert asking.fastest("one") is None
        assert asking.running() == []


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "soon", "1e9"])
def test_a_probes_limit_is_a_time(site: Site, limit: str) -> None:
    """What is none is refused with the parameter's name."""
    answer = site.admin.post(f"/admin/models/a/probe?limit={limit}", json={})
    assert answer.status_code == 400
    assert "limit must be a number of seconds" in answer.json()["error"]["message"]


def test_a_model_with_one_engine_is_probed_as_well(site: Site) -> None:
    """By its own name."""
    ctl(site, "start", "one")
    with client(site) as asking:
        best = asking.fastest("one")
        assert asking.running() == ["one"]
        assert asking.latencies("one") == {"one": None}
        with pytest.raises(UnknownModel):
            asking.latencies("nobody")
    assert best
    assert best[0] == "one"
    assert ctl(site, "probe").splitlines()[1].startswith("one ")


def test_one_replica_alone_is_probed(site: Site) -> None:
    """Whoever suspects one asks that one."""
    ctl(site, "start", "m")
    assert [line.split()[0] for line in ctl(site, "probe", "m@2").splitlines()] == ["REPLICA", "org/m@2"]
    assert {line.split()[0] for line in ctl(site, "probe", "m", "--all").splitlines()} == {
        "REPLICA",
        "org/m@1",
        "org/m@2",
    }
    until(lambda: site.view("org/m")["in_flight"] == 0)


def samples(site: Site, path: str = "/metrics") -> dict[str, float]:
    """Each sample of the exposition, by its name and sorted labels, but those of histograms' buckets."""
    families = text_string_to_metric_families(site.admin.get(path).text)
    return {
        f"{sample.name}{dict(sorted(sample.labels.items()))}": sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_tell_replicas_apart_beside_their_model(site: Site) -> None:
    """What is the model's stays the model's; its parts have series of their own."""
    ctl(site, "start", "m")
    assert site.answer("a", "hello") == "hello"
    read = samples(site)
    assert read["vllmd_model_state{'model': 'org/m', 'state': 'running'}"] == 1
    assert read["vllmd_decisions_total{'decision': 'serve', 'model': 'org/m'}"] >= 2
    for name in ("org/m@1", "org/m@2"):
        of = f"'model': 'org/m', 'replica': '{name}'"
        assert read[f"vllmd_replica_health{{'health': 'serving', {of}}}"] == 1
        assert read[f"vllmd_replica_decisions_total{{'decision': 'serve', {of}}}"] >= 1
    assert [name for name in read if name.startswith("vllmd_replica_latency_seconds")]
    assert not [name for name in read if "'model': 'org/m@" in name]
    engines = samples(site, "/metrics/engines")
    assert {name.partition("'model': '")[2].partition("'")[0] for name in engines} == {"org/m@1", "org/m@2"}
    assert site.admin.get("/metrics?model=m@2").status_code == 200


def test_the_figures_from_asyncio(site: Site) -> None:
    """The same four, for programs that do not wait."""

    async def ask() -> None:
        async with AsyncClient(f"unix:{site.log.parent}/admin.sock") as asking:
            await asking.load_model("a")
            best = await asking.fastest("a")
            assert best
            assert best[0] in ("org/m@1", "org/m@2")
            probed = await asking.probe("a", all=True)
            assert [line.seconds is None for line in probed.replicas] == [False, False]
            assert list(await asking.latencies("a")) == ["org/m@1", "org/m@2"]
            assert await asking.running() == ["org/m"]

    asyncio.run(ask())

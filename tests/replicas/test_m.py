"""M's API with several instances of a model: what its document says of start, stop and status, at a real daemon.

M is the start/stop API: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engines.installed import Site, daemon
from tests.replicas.stubs import until

MODELS: dict[str, Any] = {
    "m": {"engine": "sim", "gpu_memory": "20GiB", "aliases": ["a"]},
    "pair": {"engine": "sim", "gpu_memory": "20GiB", "replicas": {"min": 1, "max": 2}},
    "there": {"engine": "sim", "gpu_memory": "20GiB", "devices": [0]},
    "wide": {"engine": "sim", "gpu_memory": "20GiB", "tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    config = {"devices": [{"memory": "80GiB"}] * 3, "server": {"idle_exit": "never"}, "models": MODELS}
    with daemon(tmp_path_factory.mktemp("m") / "site", config) as site:
        yield site


@pytest.fixture(autouse=True)
def at_rest(site: Site) -> Iterator[None]:
    """Nothing is loaded, and nothing is known that no file has."""
    yield
    for model in MODELS:
        site.admin.post(f"/admin/models/{model}/unload?force=true&wait=true", json={})
    assert site.admin.post("/admin/reload", json={}).status_code == 200


def ask(site: Site, what: str, name: str, gpu: int | None = None, status: int = 200) -> dict[str, Any]:
    """The answer to a start or stop."""
    body = {"model_name": name} if gpu is None else {"model_name": name, "gpu_id": gpu}
    answer = site.admin.post(f"/api/v1/models/{what}", json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def start(site: Site, name: str, gpu: int | None = None, status: int = 202) -> dict[str, Any]:
    return ask(site, "start", name, gpu, status)


def instances(site: Site, name: str) -> list[tuple[int, str]]:
    """GPU and state of each of its items."""
    return [(each["gpu_id"], each["status"]) for each in site.admin.get(f"/api/v1/models/status/{name}").json()]


def running(site: Site, name: str, *gpus: int) -> None:
    """Wait until it runs there."""
    until(lambda: sorted(instances(site, name)) == [(gpu, "RUNNING") for gpu in gpus])


def refusal(site: Site, name: str, gpu: int, status: int) -> str:
    return str(start(site, name, gpu, status)["error"]["message"])


def test_three_starts_at_once_on_a_gpu_make_one_instance(site: Site) -> None:
    """Each of them finds no instance there; the core makes one of it, and all hear of the same."""
    start(site, "m", 0)
    running(site, "m", 0)
    with ThreadPoolExecutor(3) as threads:
        told = list(threads.map(lambda _: start(site, "m", 1), range(3)))
    assert [(each["active_gpu_ids"], each["total_instances"]) for each in told] == [([0, 1], 2)] * 3
    running(site, "m", 0, 1)


def test_M_two_gpus_stop_one(site: Site) -> None:
    """A start on a second GPU adds an instance, which shares the requests; a stop takes that GPU's only."""
    start(site, "m", 0)
    running(site, "m", 0)
    pid = site.view("m")["pid"]
    second = start(site, "m", 1)
    assert (second["model_name"], second["active_gpu_ids"], second["total_instances"]) == ("m", [0, 1], 2)
    assert second["status"] == "STARTING"
    running(site, "m", 0, 1)
    assert site.view("m")["replicas"][0]["pid"] == pid, "the first went on"
    assert site.answer("a", "hello") == "hello"
    stopped = ask(site, "stop", "m", 0)
    assert (stopped["status"], stopped["active_gpu_ids"], stopped["total_instances"]) == ("RUNNING", [1], 1)
    assert site.answer("m", "still") == "still"
    assert instances(site, "m") == [(1, "RUNNING")]
    last = ask(site, "stop", "m", 1)
    assert (last["status"], last["active_gpu_ids"], last["total_instances"]) == ("STOPPED", [], 0)
    assert site.view("m")["replicas"] == []
    assert ask(site, "stop", "m", status=404)["error"]


def test_M_an_instance_that_is_added_goes_with_its_stop(site: Site) -> None:
    """The model is then as its file has it, and its engine never noticed."""
    start(site, "m", 1)
    running(site, "m", 1)
    pid = site.view("m")["pid"]
    start(site, "m", 0)
    running(site, "m", 0, 1)
    start(site, "m", 2)
    running(site, "m", 0, 1, 2)
    assert [item["model_name"] for item in site.admin.get("/api/v1/models/status").json()] == ["m"] * 3
    ask(site, "stop", "m", 0)
    ask(site, "stop", "m", 2)
    assert (site.view("m")["pid"], site.view("m")["replicas"]) == (pid, [])
    start(site, "m", 0)
    running(site, "m", 0, 1)
    ask(site, "stop", "m")
    assert site.view("m")["replicas"] == []


def test_M_a_reload_forgets_what_was_added(site: Site) -> None:
    """No file has it."""
    start(site, "m", 0)
    running(site, "m", 0)
    start(site, "m", 1)
    running(site, "m", 0, 1)
    assert site.admin.post("/admin/reload", json={}).status_code == 200
    running(site, "m", 0)


def test_M_start_where_it_is_already(site: Site) -> None:
    """The same instance, whichever it is."""
    start(site, "m", 0)
    running(site, "m", 0)
    start(site, "m", 1)
    running(site, "m", 0, 1)
    for gpu in (0, 1):
        again = start(site, "m", gpu)
        assert (again["active_gpu_ids"], again["total_instances"], again["status"]) == ([0, 1], 2, "RUNNING")


def test_M_configured_replicas_are_put_where_they_are_wanted_and_no_more_come(site: Site) -> None:
    """``replicas`` of vllmd.yaml(5) are the model's instances."""
    start(site, "pair", 2)
    running(site, "pair", 2)
    start(site, "pair", 0)
    running(site, "pair", 0, 2)
    assert refusal(site, "pair", 1, 409) == ("all 2 replicas of pair are loaded; replicas in vllmd.yaml(5) gives more")
    ask(site, "stop", "pair", 2)
    start(site, "pair", 1)
    running(site, "pair", 0, 1)


def test_M_an_instance_where_it_may_not_be(site: Site) -> None:
    """Certain devices, several devices, no device."""
    for model in ("there", "wide"):
        start(site, model)
        until(lambda model=model: site.view(model)["state"] == "running")
    assert refusal(site, "there", 1, 400) == "there may use the GPUs 0 only"
    gpu = 2 if 2 not in site.view("wide")["devices"] else 0
    assert refusal(site, "wide", gpu, 400) == "wide takes 2 GPUs and cannot be put on one"
    assert refusal(site, "m", 7, 400) == "there is no GPU 7; there are 0, 1, 2"
    assert ask(site, "stop", "there", 1, 404)["error"]["message"] == "there is not running on GPU 1"


def test_M_a_model_with_a_config_of_its_own_on_two_gpus(site: Site) -> None:
    """The same config again is the same model, however many instances it has by then."""
    body = {"model_name": "brought", "model_type": "sim", "config": {"gpu_memory": "20GiB"}}
    for gpu, present in ((0, [0]), (1, [0, 1]), (0, [0, 1])):
        answer = site.admin.post("/api/v1/models/start", json={**body, "gpu_id": gpu})
        assert (answer.status_code, answer.json().get("active_gpu_ids")) == (202, present), answer.text
        running(site, "brought", *present)
    ask(site, "stop", "brought")
    assert site.admin.delete("/admin/guests/brought").status_code < 300

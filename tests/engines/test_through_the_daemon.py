"""The other kinds through the real daemon: found, started, asked, put to sleep and stopped, with stand-ins for them.

M is the start/stop API: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines.installed import Site, daemon

STAND_INS = str(Path(__file__).with_name("standins.py"))


def stand_in(engine: str, *more: str, **settings: Any) -> dict[str, Any]:
    return {"engine": engine, "command": [sys.executable, STAND_INS, engine, *more], "gpu_memory": "8GiB", **settings}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A daemon with a model of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "models" / "densenet" / "1").mkdir(parents=True)
    models = {
        "org/sg": stand_in("sglang", "serve", sleep_mode=True),
        "pictures/dense": stand_in("triton", model=str(folder / "models/densenet")),
        "vectors": stand_in("tei"),
        "drawings": stand_in("comfyui", options={"directory": str(folder)}),
    }
    config = {"devices": [{"memory": "80GiB"}], "server": {"idle_exit": "never"}, "models": models}
    with daemon(folder / "site", config) as site:
        yield site


def sleep(site: Site, model: str, level: int) -> None:
    assert site.admin.post(f"/admin/models/{model}/sleep?level={level}&wait=true", json={}).status_code == 200
    site.wait_for(model, f"sleeping_l{level}")


def test_sglang_wakes_for_a_request(site: Site) -> None:
    """Released and resumed around it."""
    assert site.answer("org/sg", "good morning") == "good morning"
    sleep(site, "org/sg", 1)
    assert site.answer("org/sg", "again") == "again"
    site.unload("org/sg")


def test_M_triton_is_asked_by_our_name_for_its_model(site: Site) -> None:
    """In the path of KServe's protocol, slash and all; asleep, the model alone is unloaded."""
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.5]}]}
    for _ in range(2):
        reply = site.http.post("/v2/models/pictures/dense/infer", json=body)
        assert (reply.status_code, reply.json()) == (200, {"model_name": "densenet", "outputs": body["inputs"]})
        sleep(site, "pictures/dense", 2)
    assert site.http.post("/v2/models/vectors/infer", json=body).status_code == 404


def test_tei_is_asked_in_its_own_way_as_well(site: Site) -> None:
    """Its requests name no model, so ours add it."""
    reply = site.http.post("/embed", json={"model": "vectors", "inputs": ["abc"]})
    assert reply.json() == [[3.0, 1.0]]
    site.unload("vectors")


def test_M_comfyui_finishes_its_job_before_it_sleeps(site: Site) -> None:
    """The request that began it is long over; its own API is for administrators."""
    reply = site.admin.post("/upstream/drawings/prompt", json={"prompt": {}})
    assert reply.json()["prompt_id"] == "p1"
    engine = f"http://{site.view('drawings')['socket']}"
    assert site.admin.post("/admin/models/drawings/sleep?level=2", json={}).status_code < 300
    site.wait_for("drawings", "falling_asleep")
    assert httpx.post(f"{engine}/standin", json={}).json() == {"freed": 0}
    site.wait_for("drawings", "sleeping_l2")
    assert httpx.post(f"{engine}/standin", json={}).json() == {"freed": 2}

"""More models than memory: the whole product with stand-in engines on declared devices, from the installed package.

The device is a file in which the engines' processes hold their memory, so what
must not be taken twice cannot be taken twice: an engine that finds too little
ends with vLLM's own out-of-memory error.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.e2e.load import failed, load
from tests.e2e.site import Site
from tests.machine.container import Machine

pytestmark = pytest.mark.machine

GPU = "/var/lib/vllmd-engine/gpu0"
LEARNT = "/var/cache/vllmd/learnt.json"
FAILURES = "/run/failures"  # what the stand-ins are to do wrong, read anew each time

CONFIG = f"""
devices: [{{memory: 80GiB, file: {GPU}}}]
host_memory: 200GiB
server: {{idle_exit: never}}
idle: never
defaults:
  engine: sim
  gpu_memory: 50GiB
  memory_asleep: 1GiB
  options:
    {{load_time: 0.3s, sleep_time: "0.1,0.05", wake_time: "0.1,0.2", tokens_per_second: 100, fail_file: {FAILURES}}}
"""


@pytest.fixture(scope="module")
def site(installed_machine: Machine) -> Iterator[Site]:
    yield Site(installed_machine)
    installed_machine.run("systemctl stop vllmd.service", check=False)


@pytest.fixture(autouse=True)
def at_rest(site: Site) -> None:
    """Every test begins with an empty device, nothing learnt and nothing running."""
    site.to_rest()
    site.machine.wait_until(lambda: site.machine.cgroup_pids("vllmd.slice") == [])
    site.machine.run(f"rm -f {GPU} {LEARNT} {FAILURES}; journalctl --rotate --vacuum-time=1s", check=False)


def configured(site: Site, models: str, **settings: str) -> None:
    """The common settings, with these models."""
    more = "".join(f"{name}: {value}\n" for name, value in settings.items())
    site.configure(f"{more}{CONFIG}models:\n{models}")


def decisions(site: Site, what: str = "", model: str = "") -> list[dict[str, object]]:
    made = site.admin("GET", f"decisions?model={model}")["decisions"]
    return [decision for decision in made if what in ("", decision["what"])]


def states(site: Site) -> dict[str, str]:
    return {view["name"]: view["state"] for view in site.status()["models"]}


def pids(site: Site) -> dict[str, int]:
    return {view["name"]: view["pid"] for view in site.status()["models"]}


def killed(site: Site) -> None:
    """The daemon is killed, and the next one has opened."""
    daemon = site.status()["pid"]
    site.machine.run("systemctl kill -s KILL vllmd.service")
    site.machine.wait_until(lambda: site.status()["pid"] != daemon and site.status()["opened"])


def held(site: Site) -> int:
    """GiB that live processes hold on the device."""
    code = f"from vllmd.simengine.device import device_usage; print(device_usage({GPU!r}).used >> 30)"
    return int(site.machine.python(code).stdout)


# ---- sharing ------------------------------------------------------------------------------------


def test_two_that_do_not_fit_together_share_the_device_under_load(site: Site) -> None:
    """A minute of 16 clients who mix both models: everybody is answered in full, and nobody is killed at work."""
    slow = "{options: {sleep_time: 1s, wake_time: 1s}}"
    configured(site, f"  a: {slow}\n  b: {slow}\n")
    outcomes = load(site, ["a", "b"], clients=16, seconds=60)
    swaps = decisions(site, "swap")
    log = site.machine.journal()
    assert failed(outcomes) == {}
    assert len(outcomes) > 200
    assert {outcome.model for outcome in outcomes} == {"a", "b"}
    assert log.count("ready after") == 2  # each started once: they slept for each other
    assert not [line for line in ("aborted by the shutdown", "killing its cgroup", "crash", "cut:") if line in log]
    assert 4 <= len(swaps) <= 30  # at two seconds each there is no time for more
    assert len(outcomes) / len(swaps) > 8  # a swap serves a batch, not a request


def test_engines_that_cannot_sleep_share_it_as_well(site: Site) -> None:
    """They are stopped for each other: each had finished its requests when it was told to go."""
    configured(site, "  a: {sleep_mode: false}\n  b: {sleep_mode: false}\n")
    outcomes = load(site, ["a", "b"], clients=8, seconds=15)
    log = site.machine.journal()
    assert failed(outcomes) == {}
    assert {outcome.model for outcome in outcomes} == {"a", "b"}
    assert log.count("Application shutdown complete") >= 2
    assert "aborted by the shutdown" not in log
    assert "killing its cgroup" not in log


def test_three_that_fit_stay(site: Site) -> None:
    """Nobody leaves where there is room for all."""
    configured(site, "".join(f"  {name}: {{gpu_memory: 25GiB}}\n" for name in "abc"))
    assert failed(load(site, "abc", clients=6, seconds=5)) == {}
    began = pids(site)
    assert failed(load(site, "abc", clients=6, seconds=5)) == {}
    assert (states(site), pids(site)) == (dict.fromkeys("abc", "running"), began)
    assert {decision["what"] for decision in decisions(site)} == {"start"}
    assert held(site) == 75


def test_lru_evicts_the_one_that_was_used_longest_ago(site: Site) -> None:
    """With ``policy: lru`` the order of use is the order of leaving, whatever it costs."""
    configured(site, "".join(f"  {name}: {{gpu_memory: 25GiB}}\n" for name in "abcde"), policy="lru")
    for name in "abcabd":  # c was used before a and b
        site.chat(name, "x")
    assert states(site) == {"a": "running", "b": "running", "c": "sleeping_l1", "d": "running", "e": "stopped"}
    site.chat("e", "x")
    assert states(site) == {"a": "sleeping_l1", "b": "running", "c": "sleeping_l1", "d": "running", "e": "running"}
    assert held(site) == 3 * 25 + 2


def test_a_pinned_model_never_leaves(site: Site) -> None:
    """Others change places beside it; what cannot fit beside it is told so, by name."""
    configured(
        site, "  keep: {pin: true}\n  b: {gpu_memory: 25GiB}\n  c: {gpu_memory: 25GiB}\n  large: {gpu_memory: 60GiB}\n"
    )
    site.chat("keep", "x")
    pid = pids(site)["keep"]
    assert failed(load(site, "bc", clients=4, seconds=5)) == {}
    status, answer = site.post("/v1/completions", {"model": "large", "prompt": "x"})
    assert status == 503
    assert "pinned models ('keep')" in answer["error"]["message"]
    assert (states(site)["keep"], pids(site)["keep"]) == ("running", pid)
    assert len(decisions(site, "swap")) >= 2


def test_a_waiter_behind_a_model_that_is_never_idle_is_served_in_time(site: Site) -> None:
    """New requests keep coming for the loaded model; its drain limit bounds the wait for the other one all the same."""
    configured(site, "  busy: {drain_limit: 10s}\n  rare: {}\n")
    site.chat("rare", "x")  # what loading it costs is learnt; before, the deadline would be that of a real vLLM
    site.chat("busy", "x")
    crowd = site.machine.popen(
        f"while [ ! -e /run/enough ]; do {site.curl('busy', 'w ' * 40)} >/run/crowd & sleep 0.2; done; wait"
    )
    site.machine.wait_until(lambda: site.view("busy")["in_flight"] > 1)
    began = time.monotonic()
    site.chat("rare", "at last")
    waited = time.monotonic() - began
    assert waited < 20
    assert decisions(site, "swap", "rare")[-1]["numbers"]["deadline"] == 60
    site.machine.run("touch /run/enough")
    crowd.wait(120)


# ---- time, leases -------------------------------------------------------------------------------


def test_an_unused_model_sleeps_sleeps_deeper_and_stops(site: Site) -> None:
    """In this order, and the device has its memory back at each step."""
    idle = "{sleep_after: 1s, level: 1, deepen_after: 3s, stop_after: 6s}"
    configured(site, f"  a: {{idle: {idle}}}\n")
    site.chat("a", "x")
    assert held(site) == 50
    asleep = [state for state in site.states_until_gone("a") if state != "running"]  # it wakes to sleep deeper
    assert asleep == ["sleeping_l1", "sleeping_l2", "stopped"]
    assert held(site) == 0


def test_a_lease_keeps_a_model_until_its_deadline(site: Site) -> None:
    """Alive before, gone after; a second lease keeps it on; repeating one replaces it."""
    configured(site, "  a: {}\n")
    site.chat("a", "x")
    site.admin("POST", "models/a/lease", {"lease": "one", "deadline_seconds": 1})
    site.admin("POST", "models/a/lease", {"lease": "two", "deadline_seconds": 60})
    site.machine.wait_until(lambda: site.view("a")["leases"] == ["two"])
    assert site.state("a") == "running"
    site.admin("POST", "models/a/lease", {"lease": "two", "deadline_seconds": 2})
    site.machine.wait_until(lambda: site.state("a") == "stopped")  # and not only after the 60 s
    assert held(site) == 0


# ---- races --------------------------------------------------------------------------------------


def test_a_client_that_leaves_the_queue_causes_no_load(site: Site) -> None:
    """Who is gone needs no model: the loaded one is not disturbed."""
    configured(site, "  a: {}\n  b: {}\n")
    site.chat("a", "x")
    stream = site.machine.popen(site.curl_stream("a", "w " * 500, max_tokens=500))
    site.machine.wait_until(lambda: site.view("a")["in_flight"] == 1)
    leaving = site.machine.popen("exec timeout 1 " + site.curl("b", "x"))
    site.machine.wait_until(lambda: site.view("b")["queued"] == 1)
    site.machine.wait_until(lambda: site.view("b")["queued"] == 0)
    assert leaving.wait(120) == 124
    assert stream.communicate(timeout=120)[0].rstrip().endswith("data: [DONE]")
    assert states(site) == {"a": "running", "b": "stopped"}
    assert "b: started" not in site.machine.journal("vllmd.service")


def test_requests_that_race_stops_and_sleeps_are_answered(site: Site) -> None:
    """Whatever an operator does meanwhile: the answer, or a 503 that says why. Never silence, never a broken pipe."""
    configured(site, "  a: {}\n  b: {gpu_memory: 25GiB}\n")
    site.chat("a", "x")
    meddling = site.machine.popen(
        "while [ $SECONDS -lt 15 ]; do for do in 'stop a' 'sleep a --level 2' 'stop b' 'sleep a' 'wake a' "
        "'stop a --force'; do timeout 20 vllmctl $do; done; done >/run/meddling 2>&1"
    )
    outcomes = load(site, ["a", "b"], clients=8, seconds=15)
    meddling.wait(120)
    assert {outcome.status for outcome in outcomes} <= {200, 502, 503}
    assert all(outcome.said is True for outcome in outcomes if outcome.status == 200)
    assert sum(outcome.status == 200 for outcome in outcomes) > len(outcomes) / 2
    assert all("a" in str(outcome.said) for outcome in outcomes if outcome.status != 200)
    site.chat("a", "x")
    site.chat("b", "x")


# ---- failures -----------------------------------------------------------------------------------


def test_a_crash_is_restarted_a_few_times_while_clients_wait(site: Site) -> None:
    """Each restart serves one of them here, then the engine dies again; after the last one they are told why."""
    configured(
        site, "  a: {concurrency: 1, max_restarts: 2, restart_backoff: 0.5s, options: {fail: [crash-after=1]}}\n"
    )
    answers = site.posts(12, "/v1/completions", {"model": "a", "prompt": "x"})  # each life has one at a time
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 502, 503}  # 502: it was sent into the dying engine, perhaps read
    assert 2 <= statuses.count(200) <= 3  # the first start and two restarts
    assert all("exited with status 1" in answer["error"]["message"] for status, answer in answers if status == 503)
    assert 503 in statuses
    backoffs = [decision["numbers"]["retry_after"] for decision in decisions(site, "crash")]
    assert backoffs == [0.5, 1.0]
    assert site.state("a") == "error"
    site.machine.run("vllmctl stop a")
    assert site.state("a") == "stopped"


def test_a_start_that_always_lacks_memory_is_tried_twice(site: Site) -> None:
    """Then it is told; the client hears the cause, the operator the engine's last words as well."""
    configured(site, "  a: {options: {fail: [oom-at-start]}}\n")
    status, answer = site.post("/v1/completions", {"model": "a", "prompt": "x"})
    assert status == 503
    assert "last log lines" not in answer["error"]["message"]
    assert "last log lines" in site.machine.out("vllmctl why a")
    log = site.machine.journal("vllmd.service")
    assert log.count("a: started as pid") == 2
    assert [decision["what"] for decision in decisions(site)] == ["start", "retry", "start", "fail"]


def test_memory_that_a_stranger_took_is_made_up_for(site: Site) -> None:
    """The ledger did not know of it; the engine that found too little is started again when another has left."""
    configured(site, "  a: {gpu_memory: 30GiB}\n  b: {gpu_memory: 30GiB}\n")
    site.chat("a", "x")
    hold = f"import sys; from vllmd.simengine.device import FakeGpu; FakeGpu({GPU!r}).hold(30 << 30); sys.stdin.read()"
    stranger = site.machine.popen(["/usr/bin/python3", "-c", hold], stdin=subprocess.PIPE)
    site.machine.wait_until(lambda: held(site) == 60)
    assert site.chat("b", "hello")["choices"][0]["message"]["content"] == "hello"
    assert states(site) == {"a": "sleeping_l1", "b": "running"}
    assert site.status()["devices"][0]["external"] == 30 << 30
    stranger.communicate()  # it ends with its input
    site.machine.wait_until(lambda: site.status()["devices"][0]["external"] == 0)
    site.chat("a", "x")
    assert set(states(site).values()) == {"running"}


def test_a_model_larger_than_the_machine_is_refused_with_the_arithmetic(site: Site) -> None:
    """At check time and at request time; the others are served."""
    configured(site, "  large: {gpu_memory: auto, options: {memory: 100GiB}}\n  a: {}\n")
    checked = site.machine.run("vllmd --check", check=False)
    assert checked.returncode == 78
    assert "large needs 100 GiB on 1 device" in checked.stderr
    assert "79.5 GiB" in checked.stderr
    status, answer = site.post("/v1/completions", {"model": "large", "prompt": "x"})
    assert (status, answer["error"]["code"]) == (400, "model_too_large")
    assert "'large' needs 100 GiB on 1 device" in answer["error"]["message"]
    assert "80 GiB less a reserve of 512 MiB" in answer["error"]["message"]
    site.chat("a", "x")


def test_an_engine_kind_that_does_not_exist_fails_its_model_only(site: Site) -> None:
    """Every request for it is told what is wrong and where; it is seen in the list; the others are served."""
    configured(site, "  odd: {engine: nonesuch}\n  a: {}\n  opt: {options: {lod_time: 1s}}\n")
    checked = site.machine.run("vllmd --check", check=False)
    assert checked.returncode == 78
    assert "models.odd.engine: unknown engine 'nonesuch'" in checked.stderr
    assert "did you mean load_time?" in checked.stderr
    for _ in range(2):
        status, answer = site.post("/v1/completions", {"model": "odd", "prompt": "x"})
        assert status == 503
        assert "vllmd.yaml" in answer["error"]["message"]
        assert "unknown engine 'nonesuch'" in answer["error"]["message"]
    assert site.view("odd")["state"] == "error"
    assert {model["id"] for model in site.get("/v1/models")[1]["data"]} == {"a", "odd", "opt"}
    site.chat("a", "x")


def test_a_sleep_that_frees_nothing_is_noticed(site: Site) -> None:
    """The engine says that it sleeps and keeps everything: it is stopped instead, so that the other can start."""
    configured(site, "  a: {options: {fail: [sleep-keeps-memory]}}\n  b: {}\n")
    site.chat("a", "x")
    site.chat("b", "x")
    assert states(site) == {"a": "stopped", "b": "running"}
    why = site.machine.out("vllmctl why a")
    assert "it says that it sleeps, but 10 s later it still holds 51200 MiB on device 0" in why


def test_a_device_that_keeps_memory_is_avoided_until_it_comes_back(site: Site) -> None:
    """The driver did not take back what a stopped engine held: it is shown, and nobody is started into it."""
    configured(site, "  a: {options: {fail: [slow-exit=2]}}\n")
    site.chat("a", "x")
    stopping = site.machine.popen("vllmctl stop a")
    site.machine.wait_until(lambda: site.state("a") == "stopping")
    lose = "from vllmd.simengine.device import FakeGpu; FakeGpu(%r).lose(%d << 30)"
    site.machine.python(lose % (GPU, 40))
    stopping.wait(120)
    device = site.status()["devices"][0]
    assert "40 GiB" in device["wedged"]
    assert decisions(site, "wedged")[0]["numbers"]["missing"] == 40 << 30
    waiting = site.machine.popen(site.curl("a", "hello"))
    site.machine.wait_until(lambda: site.view("a")["queued"] == 1)
    assert "wedged" in site.view("a")["waiting_for"] or "avoided" in site.view("a")["waiting_for"]
    site.machine.python(lose % (GPU, 0))
    assert "hello" in waiting.communicate(timeout=120)[0]
    assert site.status()["devices"][0]["wedged"] == ""


# ---- another daemon -----------------------------------------------------------------------------


def test_the_next_daemon_takes_over_every_state(site: Site) -> None:
    """Killed in the middle of a start and a sleep: the same processes go on, in the states they are really in."""
    names = {"ready": "{}", "one": "{}", "two": "{}", "starting": "{load_time: 6s}", "dozing": "{sleep_time: 4s}"}
    configured(site, "".join(f"  {n}: {{gpu_memory: 10GiB, options: {o}}}\n" for n, o in names.items()))
    for name in ("ready", "one", "two", "dozing"):
        site.chat(name, "x")
    site.machine.run("vllmctl sleep one --level 1 && vllmctl sleep two --level 2")
    for name, way, midway in (("starting", "load", "starting"), ("dozing", "sleep?level=1", "falling_asleep")):
        site.admin("POST", f"models/{name}/{way}")
        site.machine.wait_until(lambda name=name, midway=midway: site.state(name) == midway)  # type: ignore[misc]
        before = pids(site)
        killed(site)
        assert states(site)["starting"] in ("starting", "running")
        site.machine.wait_until(lambda: site.state("starting") == "running")  # one change at a time on a device
    now = {"ready": "running", "one": "sleeping_l1", "two": "sleeping_l2", "dozing": "sleeping_l1"}
    assert {name: state for name, state in states(site).items() if name != "starting"} == now
    assert site.view("ready")["idle"] > 0
    for name in names:
        assert "again" in site.chat(name, "again")["choices"][0]["message"]["content"]
    assert pids(site) == before
    assert held(site) == 50


# ---- explaining ---------------------------------------------------------------------------------


def test_an_eviction_is_explained_with_its_numbers(site: Site) -> None:
    """In the journal, for machines; by vllmctl why, for people: both for who left and for whom."""
    configured(site, "  a: {}\n  b: {}\n")
    site.chat("a", "x")
    site.chat("b", "x")
    lines = site.machine.out("journalctl --sync; journalctl -o json DECISION=swap").splitlines()
    record = json.loads(lines[-1])
    assert (record["MODEL"], record["VLLMD_VICTIMS"], record["VLLMD_DEVICES"]) == ("b", "a:1", "0")
    assert all(float(record[f"VLLMD_{name}"]) >= 0 for name in ("PRICE", "COST", "WAITED"))
    for model in "ab":
        why = site.machine.out(f"vllmctl why {model} --numbers")
        assert "swap b" in why
        assert "price=" in why
    assert "sleep a: to make room for b" in site.machine.out("vllmctl why a")


def test_a_running_answer_is_frozen_for_another_model_and_completes(site: Site) -> None:
    """With ``preempt: true``, and only after the engine has proved that it can: nothing of the answer is lost."""
    configured(site, "  a: {preempt: true, options: {tokens_per_second: 20}}\n  b: {}\n")
    site.chat("b", "x")  # what a swap costs is learnt
    site.chat("a", "x")
    site.machine.wait_until(lambda: decisions(site, "prove"))
    assert decisions(site, "prove")[0]["why"] == "frozen requests survive"
    site.machine.wait_until(lambda: site.state("a") == "running")
    words = " ".join(f"w{n}" for n in range(300))  # fifteen seconds of it
    answer = site.machine.popen(site.curl("a", words))
    site.machine.wait_until(lambda: site.view("a")["in_flight"] == 1)
    began = time.monotonic()
    site.chat("b", "x")
    assert time.monotonic() - began < 10
    assert answer.poll() is None
    assert decisions(site, "freeze")
    assert site.json(answer.communicate(timeout=120)[0])["choices"][0]["message"]["content"] == words

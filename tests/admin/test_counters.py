"""What is counted is what Prometheus reads."""

from __future__ import annotations

from dataclasses import fields, replace

from prometheus_client.parser import text_string_to_metric_families

from tests.admin.exposed import exposed
from vllmd.admin.control import Gauges
from vllmd.admin.counters import AT_A_TIME, Counters, Histogram
from vllmd.core.types import Decision, DeviceView, ModelView, ReplicaView, Snapshot, State, View
from vllmd.proxy.tokens import Tokens
from vllmd.records.ring import Entry

ENGINE = ReplicaView("m", State.SLEEPING, 1, (0,), 7 << 30, 2, 3, 1.5, None, 9.0, True, ("l",), "", "")


def model(name: str, *replicas: ReplicaView, balanced: bool = False) -> ModelView:
    """Of these engines, in the state of the first."""
    shared = {field.name for field in fields(View)} - {"name"}
    each = {name: getattr(replicas[0], name) for name in shared}
    return ModelView(name=name, replicas=replicas, balanced=balanced, serving=1, degraded=False, **each)


VIEW = model("m", ENGINE)
DEVICE = DeviceView(0, 80 << 30, 1 << 30, 7 << 30, 2 << 30, "")
SNAPSHOT = Snapshot(0.0, (VIEW,), (DEVICE,), 64 << 30, 5 << 30, ())


def samples(counters: Counters, gauges: Gauges) -> dict[str, float]:
    """``name{sorted labels}`` -> value, as Prometheus' own parser reads it."""
    body, content_type = exposed(counters, gauges, "text/plain")
    assert content_type.startswith("text/plain")
    families = text_string_to_metric_families(body.decode())
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}": s.value
        for family in families
        for s in family.samples
    }


def test_a_histogram_is_cumulative_and_ends_with_all() -> None:
    """A value on a bound counts as below it."""
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.total == 102.0


def test_what_is_counted_is_what_is_read() -> None:
    """Counters end in _total, histograms have their count and sum."""
    counters = Counters()
    counters.waited("m", 0.3)
    counters.used("m", "alice", Tokens(8, 4, 3, estimated=True))
    counters.held("alice", 1.5)
    counters.held("", 9.0)
    counters.changed("m", "start", 4.0, failed=False)
    counters.changed("m", "wake", 1.0, failed=True)
    counters.decided(Decision(0.0, "sleep", "m", "to make room for x", {"cause": "swap"}))
    counters.decided(Decision(0.0, "start", "m", "it fits"))
    counters.decided(Decision(0.0, "eject", "m", "it failed a probe", replica="m@2"))
    counters.retried("m", "m@2")
    read = samples(counters, Gauges(None))
    assert read["vllmd_model_queue_wait_seconds_count{model=m}"] == 1
    assert read["vllmd_model_tokens_total{model=m}"] == 12
    kinds = {kind: read[f"vllmd_model_tokens_by_kind_total{{kind={kind},model=m}}"] for kind in ("prompt", "answer")}
    assert kinds == {"prompt": 8, "answer": 4}
    assert read["vllmd_model_tokens_by_kind_total{kind=cached,model=m}"] == 3
    assert read["vllmd_model_tokens_by_kind_total{kind=estimated,model=m}"] == 12
    assert read["vllmd_key_tokens_total{key=alice}"] == 12
    assert [name for name in read if "key_device" in name and "total" in name] == [
        "vllmd_key_device_seconds_total{key=alice}"
    ]
    assert read["vllmd_key_device_seconds_total{key=alice}"] == 1.5
    assert read["vllmd_model_change_duration_seconds_sum{change=start,model=m}"] == 4.0
    assert read["vllmd_model_failures_total{change=wake,model=m}"] == 1
    assert read["vllmd_model_departures_total{cause=swap,how=sleep,model=m}"] == 1
    assert read["vllmd_decisions_total{decision=start,model=m}"] == 1
    assert read["vllmd_decisions_total{decision=eject,model=m}"] == 1
    assert read["vllmd_replica_decisions_total{decision=eject,model=m,replica=m@2}"] == 1
    assert read["vllmd_replica_retries_total{model=m,replica=m@2}"] == 1
    assert "vllmd_replica_decisions_total{decision=start,model=m,replica=}" not in read
    assert read["vllmd_ready{}"] == 0


def test_a_model_that_could_not_be_fetched_has_no_counters_of_its_own() -> None:
    """Clients choose the names, as many as they like; the failures are counted all the same."""
    counters = Counters({"m"}.__contains__)
    for model in ("m", "org/one", "org/two"):
        failed = entry(model=model, status=404, error="UnknownModel", seconds=1.0, received=10, sent=100)
        counters.recorded(failed)
    read = samples(counters, Gauges(None))
    assert read["vllmd_http_requests_total{code=404,method=POST,route=/v1/chat/completions}"] == 3
    assert read["vllmd_errors_total{kind=UnknownModel,model=}"] == 2
    assert not [name for name in read if "org/" in name]


def test_requests_are_counted_together() -> None:
    """Some at a time or when somebody looks, by what the record keeps of them: none is lost, none counted twice."""
    counters = Counters()
    for number in range(AT_A_TIME + 3):
        failed = number % 2 == 1
        counters.recorded(
            entry(
                status=502 if failed else 200,
                error="UpstreamFailed" if failed else "",
                first_byte=None if failed else 0.5,
                seconds=2.0,
                received=10,
                sent=100,
            )
        )
    assert counters.requests.total() == AT_A_TIME, "the rest waits for somebody to look"
    read = samples(counters, Gauges(None))
    number, failures = AT_A_TIME + 3, (AT_A_TIME + 3) // 2
    of = "code={},method=POST,route=/v1/chat/completions"
    assert read[f"vllmd_http_requests_total{{{of.format(200)}}}"] == number - failures
    assert read[f"vllmd_http_requests_total{{{of.format(502)}}}"] == failures
    assert read["vllmd_model_requests_total{code=200,model=m}"] == number - failures
    assert read["vllmd_errors_total{kind=UpstreamFailed,model=m}"] == failures
    assert read["vllmd_model_request_duration_seconds_sum{model=m}"] == 2.0 * number
    assert read["vllmd_model_time_to_first_byte_seconds_count{model=m}"] == number - failures
    assert read["vllmd_model_received_bytes_total{model=m}"] == 10 * number
    assert read["vllmd_model_sent_bytes_total{model=m}"] == 100 * number
    assert read["vllmd_key_requests_total{key=k}"] == number
    again = samples(counters, Gauges(None))
    assert [name for name in read if name.startswith("vllmd_") and again[name] != read[name]] == []


def entry(**fields: object) -> Entry:
    """What the record keeps of a request for ``m``."""
    known: dict[str, object] = {"method": "POST", "route": "/v1/chat/completions", "model": "m", "key": "k"}
    return Entry(**{**dict.fromkeys(Entry._fields), **known, **fields})  # type: ignore[arg-type]


def test_how_things_stand() -> None:
    """States are one series each, memory is in bytes and per device."""
    devices = {"used": {0: 3 << 30}, "power": {0: 99.5}, "load": {0: 0.25}, "energy": {0: 7200.0},
               "throttled": {0: True}, "model_power": {"m": 60.5}, "model_energy": {"m": 3600.0},
               "unused_energy": {"m": 60.0}, "last_phases": {"m": {"compile": 12.5}},
               "last_loaders": {"m": "x"}}  # fmt: skip
    read = samples(Counters(), Gauges(SNAPSHOT, 4, 5, **devices))  # type: ignore[arg-type]
    assert read["vllmd_model_state{model=m,state=sleeping_l1}"] == 1
    assert read["vllmd_model_state{model=m,state=running}"] == 0
    assert read["vllmd_model_queue_length{model=m}"] == 3
    assert read["vllmd_model_running_requests{model=m}"] == 2
    assert read["vllmd_model_memory_bytes{device=0,model=m}"] == 7 << 30
    assert read["vllmd_device_memory_external_bytes{device=0}"] == 2 << 30
    assert read["vllmd_device_memory_used_bytes{device=0}"] == 3 << 30
    assert read["vllmd_device_power_watts{device=0}"] == 99.5
    assert read["vllmd_device_energy_joules_total{device=0}"] == 7200
    assert read["vllmd_device_throttled{device=0}"] == 1
    assert (read["vllmd_model_power_watts{model=m}"], read["vllmd_model_energy_joules_total{model=m}"]) == (60.5, 3600)
    assert read["vllmd_model_unused_energy_joules_total{model=m}"] == 60
    assert read["vllmd_device_utilization_ratio{device=0}"] == 0.25
    assert read["vllmd_host_memory_promised_bytes{}"] == 5 << 30
    assert read["vllmd_connections{}"] == 4
    assert read["vllmd_model_last_start_phase_seconds{model=m,phase=compile}"] == 12.5
    assert read["vllmd_model_last_start_loader_info{loader=x,model=m}"] == 1


def test_replicas_are_told_apart_beside_their_model() -> None:
    """The model has all that they hold and run; a model with one engine has no series of replicas."""
    one = replace(ENGINE, name="m@1", state=State.READY, health="serving", latency=0.25, in_flight=2)
    two = replace(ENGINE, name="m@2", state=State.STOPPED, devices=(), in_flight=0)
    models = (model("m", one, two, balanced=True), model("n", replace(ENGINE, name="n")))
    read = samples(Counters(), Gauges(replace(SNAPSHOT, models=models)))
    assert read["vllmd_model_state{model=m,state=running}"] == 1
    assert read["vllmd_model_memory_bytes{device=0,model=m}"] == 7 << 30
    assert read["vllmd_replica_latency_seconds{model=m,replica=m@1}"] == 0.25
    assert read["vllmd_replica_running_requests{model=m,replica=m@1}"] == 2
    assert read["vllmd_replica_health{health=serving,model=m,replica=m@1}"] == 1
    assert read["vllmd_replica_health{health=down,model=m,replica=m@2}"] == 1
    assert read["vllmd_replica_health{health=serving,model=m,replica=m@2}"] == 0
    assert not [name for name in read if "replica" in name and "model=n" in name]


def test_openmetrics_for_those_who_ask() -> None:
    """Prometheus prefers it, and it must end as it must."""
    body, content_type = exposed(Counters(), Gauges(SNAPSHOT), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_every_family_has_help_and_a_conventional_name() -> None:
    """promtool complains of a missing help text, of a unit that is no base unit, of a counter without _total."""
    counters = Counters()
    body, _ = exposed(counters, Gauges(SNAPSHOT), "")
    for family in text_string_to_metric_families(body.decode()):
        assert family.documentation, family.name
        assert not family.name.endswith(("_ms", "_milliseconds", "_kb", "_mb", "_percent", "_total_total"))

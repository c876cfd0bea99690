"""The metrics of ``/metrics``, written with prometheus_client. Imported at the first scrape, not before.

A machine with ten thousand models has two hundred thousand series, and the loop must not stand still while they are
written. So a family comes in pieces of ``PIECE_SERIES`` series, each piece is encoded by itself as if it were a
registry of its own, and the loop gets its turn in between; HELP and TYPE of all but a family's first piece are cut off.
Which series a caller may see is decided by their labels, in one place, whichever family they belong to.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

import vllmd
from vllmd.admin.control import Gauges
from vllmd.admin.counters import Counters, Histogram
from vllmd.core.types import DeviceView, ModelView, State
from vllmd.proxy.access import ANYBODY, Caller

Labels = tuple[str, ...]
Values = Mapping[Any, float] | Iterable[tuple[Labels, float]]  # by label values
PIECE_SERIES = 500  # written in one turn of the loop: about 5 ms
END = b"# EOF\n"  # of OpenMetrics
HEALTH_STATUSES = ("new", "serving", "resting", "slow", "ejected", "down")
STATES = (*(state.value for state in State if state is not State.SLEEPING), "sleeping_l1", "sleeping_l2")


def expose_in_turns(
    counters: Counters, gauges: Gauges, accept: str, caller: Caller = ANYBODY
) -> Generator[None, None, tuple[bytes, str]]:
    """The exposition and its content type, in the format that ``accept`` prefers, for ``proxy.large.in_turns``.

    Series of models and keys that the caller may not see are left out.
    """
    encode, content_type = choose_encoder(accept)
    counters.add_up()
    written: dict[str, list[bytes]] = {}
    for metric in ProcessCollector(registry=None).collect():
        written[metric.name] = [_text(encode, metric)]
    families = [counted(counters), daemon_state(gauges)]
    if gauges.snapshot:
        families += [models(gauges), replicas(gauges), devices(gauges.snapshot.devices, gauges)]
    for metric in itertools.chain.from_iterable(families):
        metric.samples = [sample for sample in metric.samples if is_visible(sample.labels, caller)]
        text = _text(encode, metric)
        if metric.name in written:
            samples = re.compile(rb"(#.*\n)*").match(text)  # behind the lines about the family, which are there already
            written[metric.name].append(text[samples.end() if samples else 0 :])
        else:
            written[metric.name] = [text]
        yield
    end = END if "openmetrics" in content_type else b""
    return b"".join([piece for pieces in written.values() for piece in pieces]) + end, content_type


class _SingleFamily(CollectorRegistry):
    """A registry of one metric, for the encoders."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _text(encode: Callable[[CollectorRegistry], bytes], metric: Metric) -> bytes:
    return encode(_SingleFamily(metric)).removesuffix(END)


def is_visible(labels: Mapping[str, str], caller: Caller) -> bool:
    """Whether the caller may see a series: its labels name the model and the key that it is about."""
    model, key = labels.get("model"), labels.get("key")
    return (not model or caller.may_use(model)) and (key is None or caller.may_see_key(key))


def counted(counters: Counters) -> Iterator[Metric]:
    """Requests, tokens, failures and decisions since the daemon's start."""
    model = ["model"]
    yield from _counter("http_requests", "Requests by route, method and status.", ["route", "method", "code"],
                   counters.requests)  # fmt: skip
    yield from _histogram("http_request_duration_seconds", "From a whole request to the end of its answer.", ["route"],
                     counters.durations)  # fmt: skip
    yield from _counter(
        "model_requests", "Requests for a model, by status.", ["model", "code"], counters.model_requests
    )
    yield from _histogram("model_request_duration_seconds", "The same of requests for a model.", model,
                     counters.model_durations)  # fmt: skip
    yield from _histogram("model_time_to_first_byte_seconds", "From a whole request to the first byte of its answer.",
                     model, counters.first_bytes)  # fmt: skip
    yield from _histogram("model_queue_wait_seconds", "From a request's arrival to its admission, loading included.",
                     model, counters.waits)  # fmt: skip
    yield from _counter("model_received_bytes", "Request bodies relayed to a model.", model, counters.received)
    yield from _counter("model_sent_bytes", "Answers relayed to clients, heads included.", model, counters.sent)
    yield from _counter(
        "model_tokens",
        "Tokens in and out: by the answer's usage, without one estimated from sizes.",
        model,
        counters.tokens,
    )
    yield from _counter(
        "model_tokens_by_kind",
        "Of the prompt and the answer; cached ones are of the prompt, and estimated ones of both.",
        ["model", "kind"],
        counters.token_kinds,
    )
    yield from _counter(
        "errors", "Requests that ended in an error of ours, by its kind.", ["model", "kind"], counters.errors
    )
    yield from _counter(
        "failed_logins",
        "API keys that were wrong, or not looked at after too many wrong ones.",
        ["how"],
        counters.failed_logins,
    )
    yield from _counter("key_requests", "Requests by the name of their API key.", ["key"], counters.key_requests)
    yield from _counter("key_tokens", "Tokens by the name of the API key.", ["key"], counters.key_tokens)
    yield from _counter("key_device_seconds", "Seconds for which models that the key used held whole devices.", ["key"],
                   counters.key_devices)  # fmt: skip
    yield from _histogram("model_change_duration_seconds", "Starts, wakes, sleeps and stops that succeeded.",
                     ["model", "change"], counters.changes)  # fmt: skip
    yield from _counter("model_failures", "Starts, wakes, sleeps that failed, and exits that nobody asked for.",
                   ["model", "change"], counters.failures)  # fmt: skip
    yield from _counter("decisions", "What the scheduler decided.", ["model", "decision"], counters.decisions)
    yield from _counter("replica_decisions", "Those about one of several replicas, such as eject.",
                   ["model", "replica", "decision"], counters.replica_decisions)  # fmt: skip
    yield from _counter("replica_retries", "Requests that it did not answer, and that went to another replica.",
                   ["model", "replica"], counters.retries)  # fmt: skip
    yield from _counter("model_departures", "Sleeps, stops and freezes by cause; swap: evicted for another model.",
                   ["model", "how", "cause"], counters.departures)  # fmt: skip


def daemon_state(gauges: Gauges) -> Iterator[Metric]:
    """The daemon itself, and the host memory."""
    yield from _gauge("build_info", "The version.", ["version"], {(vllmd.__version__,): 1})
    yield from _gauge("ready", "Whether devices and engines have been found.", [], {(): gauges.snapshot is not None})
    yield from _gauge("configuration_valid", "Whether the last configuration read was usable.", [], {(): gauges.valid})
    yield from _gauge("usage_written", "Whether the record of use can be written; what waits is kept.", [],
                 {(): gauges.use_written})  # fmt: skip
    yield from _counter("traced_requests", "Requests whose spans a collector has taken, or which were dropped.",
                   ["outcome"], {(how,): number for how, number in gauges.traced.items()})  # fmt: skip
    yield from _gauge("connections", "Clients and operators who are connected.", [], {(): gauges.connections})
    yield from _gauge("requests_in_progress", "Model requests that wait or run.", [], {(): gauges.requests})
    snapshot = gauges.snapshot
    if snapshot:
        yield from _gauge("host_memory_budget_bytes", "Host memory for models asleep at level 1 and engines on it.", [],
                     {(): snapshot.host_memory})  # fmt: skip
        yield from _gauge("host_memory_promised_bytes", "What of it is promised.", [], {(): snapshot.host_promised})


def models(gauges: Gauges) -> Iterator[Metric]:
    """Each model as clients see it: of several replicas the best state, and all their requests together."""
    views = gauges.snapshot.models if gauges.snapshot else ()

    def each(name: str, about: str, value: Callable[[ModelView], float]) -> Iterator[Metric]:
        return _gauge(f"model_{name}", about, ["model"], (((view.name,), value(view)) for view in views))

    yield from _gauge("model_state", "1 for the state that the model is in.", ["model", "state"],
                 (((view.name, state), state == state_of(view)) for view in views for state in STATES))  # fmt: skip
    yield from each("queue_length", "Requests that wait.", lambda view: view.queued)
    yield from each("running_requests", "Requests that run.", lambda view: view.in_flight)
    yield from each(
        "oldest_wait_seconds", "How long the first of the waiting has waited.", lambda v: v.oldest_wait or 0.0
    )
    yield from each("pinned", "Whether it is pinned.", lambda view: view.pinned)
    yield from each("disabled", "Whether an operator has disabled it.", lambda view: bool(view.disabled))
    yield from each("leases", "Leases that keep it.", lambda view: len(view.leases))
    held: Counter[Labels] = Counter()
    for view in views:
        for engine in view.replicas:
            held.update({(view.name, str(index)): engine.memory for index in engine.devices})
    yield from _gauge("model_memory_bytes", "What the ledger has it at, on each device.", ["model", "device"], held)
    yield from _gauge("model_last_start_seconds", "How long its last start took.", ["model"],
                 {(name,): took for name, took in gauges.last_starts.items()})  # fmt: skip
    yield from _gauge("model_last_start_phase_seconds", "And how long each phase of it: imports, weights, compile ...",
                 ["model", "phase"], {(name, phase): took for name, phases in gauges.last_phases.items()
                                      for phase, took in phases.items()})  # fmt: skip
    yield from _gauge("model_last_start_loader_info", "What read its weights then, where it was not the engine's own.",
                      ["model", "loader"], dict.fromkeys(gauges.last_loaders.items(), 1))  # fmt: skip


def replicas(gauges: Gauges) -> Iterator[Metric]:
    """Each of a model's replicas; a model with one engine has no series here."""
    balanced = [model for model in (gauges.snapshot.models if gauges.snapshot else ()) if model.balanced]
    known = [((model.name, replica.id), replica) for model in balanced for replica in model.replicas]
    labels = ["model", "replica"]
    yield from _gauge("replica_health", "1 for what its answers have earned it; down: its engine is not up.",
                 [*labels, "health"], {(*of, health): health == (view.health or "down")
                                         for of, view in known for health in HEALTH_STATUSES})  # fmt: skip
    yield from _gauge("replica_latency_seconds", "Time to the first byte of its answers, the last ones weighing most.",
                 labels, {of: view.latency for of, view in known if view.latency is not None})  # fmt: skip
    yield from _gauge("replica_running_requests", "Requests that run in it.", labels,
                 {of: view.in_flight for of, view in known})  # fmt: skip


def devices(views: tuple[DeviceView, ...], gauges: Gauges) -> Iterator[Metric]:
    """Each device's memory, and what its driver reports; the models' shares of their devices' power."""

    def each(name: str, about: str, value: Callable[[DeviceView], float]) -> Iterator[Metric]:
        return _gauge(f"device_{name}", about, ["device"], {(str(view.index),): value(view) for view in views})

    def read(name: str, about: str, values: Mapping[int, float]) -> Iterator[Metric]:
        return _gauge(f"device_{name}", about, ["device"], {(str(index),): value for index, value in values.items()})

    yield from each("memory_bytes", "The device's memory.", lambda view: view.memory)
    yield from each("memory_reserve_bytes", "Memory that is never promised.", lambda view: view.reserve)
    yield from each("memory_promised_bytes", "Memory that is promised to models.", lambda view: view.promised)
    yield from each("memory_external_bytes", "Memory that others hold, as last read.", lambda view: view.external)
    yield from each("avoided", "Whether it is avoided: memory did not come back, or it cannot be read.",
               lambda view: bool(view.wedged))  # fmt: skip
    yield from read("memory_used_bytes", "Memory in use by anybody, as the driver says.", gauges.used)
    yield from read("power_watts", "Power draw.", gauges.power)
    yield from read("temperature_celsius", "Temperature.", gauges.temperature)
    yield from read("throttled", "Whether it is slowed down against its will: heat, power.", gauges.throttled)
    yield from _counter(
        "device_energy_joules",
        "What it has drawn while it was read, since the daemon's start.",
        ["device"],
        {(str(index),): joules for index, joules in gauges.energy.items()},
    )
    yield from _gauge(
        "model_power_watts",
        "Its share of what its devices draw, by the memory it holds there.",
        ["model"],
        {(name,): watts for name, watts in gauges.model_power.items()},
    )
    yield from _counter("model_unused_energy_joules", "What of it was drawn while no request ran in it.", ["model"],
                   {(name,): joules for name, joules in gauges.unused_energy.items()})  # fmt: skip
    yield from _counter("model_energy_joules", "The same, summed up since the daemon's start.", ["model"],
                   {(name,): joules for name, joules in gauges.model_energy.items()})  # fmt: skip
    yield from read("utilization_ratio", "Share of time that it computed, as the driver says.", gauges.load)


def state_of(view: ModelView) -> str:
    """The state's name in the API, with the level of sleep: ``sleeping_l1``."""
    return f"sleeping_l{view.level}" if view.state is State.SLEEPING else view.state.value


# -- families, in pieces


def _counter(name: str, about: str, labels: list[str], values: Values) -> Iterator[Metric]:
    return _filled(lambda: CounterMetricFamily(f"vllmd_{name}", about, labels=labels), values)


def _gauge(name: str, about: str, labels: list[str], values: Values) -> Iterator[Metric]:
    return _filled(lambda: GaugeMetricFamily(f"vllmd_{name}", about, labels=labels), values)


def _filled(new: Callable[[], Any], values: Values) -> Iterator[Metric]:
    """The family in pieces, at least one: a family without series has its HELP and TYPE, too."""
    # A copy: in another's turn of the loop a counter may get a new series.
    pairs = iter(list(values.items()) if isinstance(values, Mapping) else values)
    family = new()
    for number, (labels, value) in enumerate(pairs, 1):
        family.add_metric(labels, float(value))
        if number % PIECE_SERIES == 0:
            yield family
            family = new()
    yield family


def _histogram(name: str, about: str, labels: list[str], values: Mapping[Labels, Histogram]) -> Iterator[Metric]:
    family = HistogramMetricFamily(f"vllmd_{name}", about, labels=labels)
    for number, (key, histogram) in enumerate(list(values.items()), 1):
        family.add_metric(list(key), histogram.buckets(), histogram.total)
        if number % (PIECE_SERIES // 10) == 0:  # each has seventeen buckets
            yield family
            family = HistogramMetricFamily(f"vllmd_{name}", about, labels=labels)
    yield family

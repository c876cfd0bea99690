"""The defaults of most servers: no sleep, no log that tells much, a program that has to be installed.

A kind derives from ``Plain``, overrides what is its own, and lists its settings in ``OPTIONS``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.engines.base import Adapter, Call, Failure, Place, Progress
from vllmd.engines.known_failures import known

DETAIL = 160  # characters of a log line that are worth showing as a start's progress
PROBE = 5.0  # seconds for an answer of a server that may be busy loading

# Patterns of what a start's log says. They are compiled (and kept) by ``re`` when the first engine starts: the first
# client of a daemon waits for what its modules do.
_ABSENT = r"(?i)there is no command|No module named|not found|No such file or directory|cannot (run|execute|find)"
_MEMORY = r"(?i)out of memory|\bOOM\b|failed to allocate|cudaMalloc failed|CUBLAS_STATUS_ALLOC_FAILED"
_WRONG = (
    r"(?i)unrecognized arguments|no such option|invalid argument|unexpected argument|"
    r"does not exist|is not a (valid|local)|Permission denied|You can install it with"
)
_RAISED = r"(?:\w+\.)*\w*(?:Error|Exception): "
_TELLING = r"(?i)\berror\b|exception|fail|fatal|panick|traceback"


# What a server tells of itself, and changes nothing.
TOLD = frozenset(
    {
        *("GET /health", "GET /metrics", "GET /version", "GET /ping", "GET /v1/models", "GET /v1/models/{id:path}"),
        *("GET /docs", "GET /redoc", "GET /openapi.json", "GET /docs/oauth2-redirect"),
    }
)


OF_AN_ENGINE = frozenset({"/props", "/tokenizer_info"})  # public paths that are asked by GET (proxy.models.QUERY_PATHS)


def usual_api(routes: Iterable[str]) -> frozenset[str]:
    """The rules of ``own_api`` for a server of which only the public paths are known."""
    return TOLD | {f"{'GET' if route in OF_AN_ENGINE else 'POST'} {route}" for route in routes}


class Plain:
    """The parts of ``base.Engine`` that a server without anything special has."""

    kind = "plain"
    OPTIONS: ClassVar[Mapping[str, str]] = {}
    PROGRAM = ""  # the word in "No module named ..." that means that it is not installed
    INSTALL = ""  # what to do then
    ROUTES: ClassVar[frozenset[str]] = frozenset()
    PHASES: ClassVar[Sequence[tuple[str, str]]] = ()  # of a start, by what of its log begins each
    OWN_API: ClassVar[frozenset[str]] = frozenset()  # beside its routes and what nearly every server has

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """None: such an engine is stopped instead."""
        return frozenset()

    def ready(self, model: ModelConfig) -> Call:
        """The engine is ready when ``/health`` answers with a 2xx status."""
        return Call("GET", "/health", timeout=PROBE)

    def alive(self, model: ModelConfig) -> Call:
        """The same, where that is cheap and wakes nothing."""
        return self.ready(model)

    def busy(self) -> Call | None:
        """An open request is all there is."""
        return None

    def device_count(self, model: ModelConfig) -> int:
        """As many as the model is split over on this machine."""
        return model.devices_here

    def headers(self) -> Sequence[tuple[str, str]]:
        """Header fields that a request to the engine needs besides the client's: none here."""
        return ()

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """Nothing: the engine has no sleep."""
        return ()

    def wake(self, level: int) -> Sequence[Call]:
        """The calls that wake the engine: none, as it has no sleep."""
        return ()

    def asleep(self) -> Call | None:
        """The call that tells whether the engine sleeps: None, as it cannot be asked."""
        return None

    def routes(self, model: ModelConfig) -> frozenset[str]:
        """The paths that engines of this kind serve, from the class's ``ROUTES``."""
        return self.ROUTES

    def own_api(self, model: ModelConfig) -> frozenset[str]:
        """The kind's routes, those by which nearly every server describes itself, and ``OWN_API``."""
        return usual_api(self.routes(model)) | self.OWN_API

    def served_name(self, model: ModelConfig) -> str:
        """The name that the engine knows its model by: that of the configuration."""
        return model.replica_of or model.name

    def adapters(self, model: ModelConfig) -> Mapping[str, Adapter]:
        """The LoRA adapters that the engine serves beside its model: none here."""
        return {}

    def progress(self, line: str) -> Progress | None:
        """The phase that a log line shows; the first pattern of ``PHASES`` that it has counts."""
        phase = next((phase for phase, pattern in self.PHASES if re.search(pattern, line)), None)
        return Progress(phase, line.strip()[:DETAIL], once=phase == "compile") if phase else None

    def failure(self, lines: Sequence[str]) -> Failure:
        """The last exception, else the first line that tells of an error (later ones follow from it), else the last."""
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            return Failure("it said nothing")
        if absent := self._absent(texts):
            return Failure(absent, permanent=True, hint=self.INSTALL)
        raised = next((line for line in reversed(texts) if re.match(_RAISED, line)), "")
        reason = raised or next((line for line in texts if re.search(_TELLING, line)), texts[-1])
        match = known(texts)
        reason, advice, row = match or (reason, "", None)
        memory = any(re.search(_MEMORY, line) for line in texts) or (row is not None and row.memory)
        wrong = bool(re.search(_WRONG, reason)) or (row is not None and row.permanent)
        return Failure(reason, memory, permanent=wrong and not memory, hint=advice, port=row is not None and row.port)

    def _absent(self, lines: Sequence[str]) -> str:
        """The line that says that its program is not there; "" if none does."""
        program = self.PROGRAM or self.kind
        return next((line for line in reversed(lines) if program in line and re.search(_ABSENT, line)), "")

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        """Only the device can tell."""
        return None


# Engines on the CPU share its cores. A thread of OpenMP that waits for the others of its engine is to sleep meanwhile,
# and not to spin on a core that another engine needs, or the thread for which it waits.
SHARING = {"OMP_WAIT_POLICY": "passive"}


def environment(model: ModelConfig, place: Place) -> dict[str, str]:
    """The variables of every engine: its devices, how it uses the CPU where it has none, the token for gated models."""
    token = {"HF_TOKEN": model.hf_token} if model.hf_token else {}
    by_id = {"CUDA_VISIBLE_DEVICES": ",".join(place.device_ids), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {**(place.visible or (by_id if place.device_ids else SHARING | threads(place))), **token}


def threads(place: Place) -> dict[str, str]:
    """OpenMP's, and Rayon's for servers in Rust: both count the CPUs that they see, and not what a quota leaves.

    With a thread for each of 64 CPUs under a quota of four, all wait for each other most of the time.
    """
    return {name: str(place.cpus) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")} if place.quota else {}


def own_key(model: ModelConfig, place: Place, variable: str, *flags: str) -> str:
    """The key of this start, unless the model's own settings say which key its engine asks for; then ""."""
    return "" if variable in model.env or has_flag(model, *flags) else place.key


def has_flag(model: ModelConfig, *flags: str) -> bool:
    """Whether the model's own arguments have one of these flags, which then is not added."""
    return any(argument.partition("=")[0] in flags for argument in model.extra_args)

"""What can be known of models before an engine starts: their footprints, and which models can never work.

The daemon logs it at its start and at each reload, and serves the other models;
``vllmd --check`` prints it and fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.core.types import Device
from vllmd.daemon.fitness import kind_of
from vllmd.daemon.homes import Homes, unknown_user
from vllmd.engines import looks
from vllmd.engines.base import Engine, Place
from vllmd.engines.estimate import Estimate, estimate, overfull_pins, too_large
from vllmd.engines.facts import READING
from vllmd.errors import ConfigError
from vllmd.foreign import each_within
from vllmd.frozen import frozen
from vllmd.gpu import gpus
from vllmd.place import host_memory
from vllmd.sizes import in_words as size

log = logging.getLogger("vllmd")

MOST_TOLD = 100  # models whose arithmetic is logged at a start or a reload


@frozen
class ModelCheck:
    """A model with its engine kind and its estimated footprint.

    ``problem``: why it can never run; "" if it can. ``kind``: the kind of model that its files are of, see ``fitness``.
    """

    model: ModelConfig
    engine: Engine
    estimate: Estimate
    problem: str
    kind: str = ""


@frozen
class Machine:
    """Where models are to run. Sizes are held against ``gpus`` alone: what is too large for the CPU runs slowly."""

    devices: Sequence[Device]
    homes: Homes
    run_dir: Path

    @property
    def gpus(self) -> Sequence[Device]:
        """The machine's devices without the CPU."""
        return gpus(self.devices)


def look(
    models: Iterable[ModelConfig], machine: Machine, engine_of: Callable[[ModelConfig], Engine]
) -> list[ModelCheck]:
    """Look at each model; reads their files."""
    memory = host_memory()
    with looks.shared():
        return each_within(READING, lambda model: _check_model(model, machine, engine_of, memory), list(models))


def _check_model(
    model: ModelConfig, machine: Machine, engine_of: Callable[[ModelConfig], Engine], memory: int
) -> ModelCheck:
    allowed = [device for device in machine.gpus if not model.devices or device.index in model.devices]
    device_memory = min((device.memory for device in allowed), default=0)
    expected = estimate(model, machine.homes.hub(model), device_memory, memory)
    engine = engine_of(model)
    problem = unknown_user(model) or _refusal(model, engine, machine) or too_large(model, expected, machine.gpus)
    return ModelCheck(model, engine, expected, problem, kind_of(model, machine.homes.hub(model)))


def _refusal(model: ModelConfig, engine: Engine, machine: Machine) -> str:
    """Why the engine kind refuses the model's settings, "" if it does not; found by preparing a start for nothing."""
    devices = machine.gpus[: engine.device_count(model)]
    place = Place(
        run_dir=machine.run_dir / "check-000000",
        device_ids=tuple(device.id for device in devices),
        memory=min((device.memory for device in devices), default=0),
        device_memory=min((device.memory for device in devices), default=0),
        port=1,
    )
    try:
        engine.launch(model, place)
    except ConfigError as error:
        return error.message
    return ""


def wrong(prospects: Iterable[ModelCheck]) -> list[str]:
    """Everything that can never work, one sentence each."""
    return [each.problem for each in prospects if each.problem]


def doubtful(prospects: Sequence[ModelCheck], machine: Machine) -> list[str]:
    """Warnings: what works, but hardly as intended."""
    pinned = [(each.model, each.estimate) for each in prospects if each.model.pin]
    overfull = overfull_pins(pinned, machine.gpus)
    notes = [f"{each.model.name}: {note}" for each in prospects for note in each.estimate.notes]
    return [*notes, *([overfull] if overfull else [])]


def say(prospects: Sequence[ModelCheck], machine: Machine) -> None:
    """Into the log: what is wrong, what is doubtful, then the arithmetic of the first ``MOST_TOLD`` models.

    journald does not keep up with ten thousand lines at once, and what it does not read in time is lost.
    """
    for mistake in wrong(prospects):
        log.error("%s", mistake)
    for doubt in doubtful(prospects, machine):
        log.warning("%s", doubt)
    for each in prospects[:MOST_TOLD]:
        log.info("%s: expected to take %s per device: %s", each.model.name, size(each.estimate.footprint.awake),
                 each.estimate.why, extra={"journal": {"MODEL": each.model.replica_of or each.model.name}})  # fmt: skip
    if more := prospects[MOST_TOLD:]:
        log.info("`vllmd --check` tells what %d more models are expected to take", len(more))

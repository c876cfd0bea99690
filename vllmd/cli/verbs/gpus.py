"""Show the devices: memory promised, reserved, held by other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from vllmd.api.answers import DeviceNow, ModelLine, Status
from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_UNAVAILABLE

HEAD = ("DEVICE", "MEMORY", "PROMISED", "FREE", "RESERVE", "EXTERNAL", "MODELS", "NOTE")
RIGHT = ("DEVICE", "MEMORY", "PROMISED", "FREE", "RESERVE", "EXTERNAL")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    status = Admin(arguments).status()
    trouble = status.trouble
    if trouble:
        show.say(f"the devices do not answer: {trouble}", sys.stderr)
    if arguments.json:
        print(show.as_json(status.devices))
    elif status.devices:
        print(table(status))
    elif not trouble:
        why = status.source or "NVML found none, and none are declared"
        show.say(f"there are no devices ({why}); they may be declared, see devices in vllmd.yaml(5)")
    return EX_UNAVAILABLE if trouble else 0


def table(status: Status) -> str:
    """A row for each device."""
    rows = [row(device, status.models, status.devices) for device in status.devices]
    return show.table(HEAD, rows, RIGHT, beneath=("MODELS", "NOTE"))


def row(device: DeviceNow, models: Sequence[ModelLine], all_devices: Sequence[DeviceNow] = ()) -> tuple[str, ...]:
    free = device.memory - device.promised - device.reserve - device.external
    engines = [line for model in models for line in model.replicas or (model,)]
    held = [line.name for line in engines if device.index in line.devices]
    sizes = (device.memory, device.promised, max(0, free), device.reserve, device.external)
    note = "; ".join(notes(device, all_devices))
    return str(device.index), *map(show.size, sizes), ", ".join(held) or show.EMPTY, note


def notes(device: DeviceNow, all_devices: Sequence[DeviceNow]) -> Iterator[str]:
    """What is wrong with a device, its name, its sensors, and its place in the machine."""
    if device.wedged:
        yield f"avoided: {device.wedged}"
    if device.throttled:
        yield f"slowed down: {device.throttled}"
    if device.name:
        yield device.name
    figures = ((device.power, "W"), (device.temperature, "\N{DEGREE SIGN}C"))
    if sensors := " ".join(f"{value:.0f}{unit}" for value, unit in figures if value is not None):
        yield sensors
    if device.utilisation is not None:
        yield f"{device.utilisation:.0f}% busy"
    if device.links:
        yield f"linked to {show.numbers(device.links)}"
    beside = [other.index for other in all_devices if device.switch and other.switch == device.switch]
    if len(beside) > 1:
        yield f"switch with {show.numbers([index for index in beside if index != device.index])}"
    if device.node is not None:
        yield f"node {device.node}" + (f" (CPUs {show.numbers(device.cpus)})" if device.cpus else "")

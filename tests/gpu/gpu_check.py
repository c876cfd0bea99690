"""``make gpu-check``: what vllmd believes of a GPU, held against a real one.

For a machine with an NVIDIA GPU, Python 3.11 or newer, torch, nvidia-ml-py and vllmd's own dependencies; no
systemd, no network, no vLLM. Eight minutes at most, and less where time is short: parts for which there is no time
are left out, and said. ``tests/gpu/check`` has the parts, each of which says what it looks at::

    python3 tests/gpu/gpu_check.py [--device N] [--only PART ...] [--seconds 480] [--markdown FILE] [--facts FILE]

Exit status: 0 all held, 1 something did not, 77 there is no GPU to check (``make`` reports that one as ``Error 77``).
It takes device memory by plain allocations, touches no other process and none of the card's settings.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from vllmd.config.types import Config  # noqa: E402
from vllmd.core.types import Device  # noqa: E402
from vllmd.gpu import Devices, DeviceSample, open_devices  # noqa: E402

NO_GPU = 77  # the status by which automake and meson mean: skipped
# Each part with the seconds that it may need; the most telling first.
PARTS = {"readings": 90, "attribution": 30, "turns": 110, "forks": 40, "transformers": 60, "copies": 50}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the table, return the exit status."""
    options = _parser().parse_args(arguments)
    devices = open_devices(Config(), os.environ)
    print(f"devices: {devices.source} ({devices.note})", flush=True)
    if devices.source != "nvml":
        print("gpu-check: there is no NVIDIA GPU to check here")
        return NO_GPU
    if importlib.util.find_spec("torch") is None:
        print("gpu-check: torch is not installed for this Python, so nothing can hold device memory")
        return NO_GPU
    device, sample = _chosen(devices, options.device)
    print(f"device {device.index}: {device.name} {device.id}, {device.memory} bytes, {sample.used} in use, "
          f"{sample.power} W, {sample.utilisation} % busy, {len(sample.processes)} processes", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gc-") as folder:
        return _check(options, devices, device, Path(folder))


def _check(options: argparse.Namespace, devices: Devices, device: Device, folder: Path) -> int:
    from tests.gpu.check.bench import Bench, Table

    bench = Bench(devices, device, folder, Table(lambda line: print(line, flush=True)),
                  time.monotonic() + options.seconds, options.load, int(options.copy * (1 << 30)), options.settle,
                  transformers=_transformers(), torch=_library_path())  # fmt: skip
    for part in options.only or PARTS:
        run_part(bench, part)
    text = bench.table.markdown()
    if options.markdown:
        options.markdown.write_text(heading(devices, device) + text)
    if options.facts:
        options.facts.write_text(json.dumps(bench.facts, indent=1))
    bad = [row for row in bench.table.rows if row.held is False]
    print(f"\ngpu-check: {'all held' if not bad else f'{len(bad)} of {len(bench.table.rows)} did not hold:'}")
    for row in bad:
        print(f"  {row.part}: {row.what}: wanted {row.wanted}, seen {row.seen}")
    return 1 if bad else 0


def run_part(bench: object, part: str) -> None:
    """One part; whatever it throws is a row, and the next part has its turn."""
    from tests.gpu.check.bench import Bench

    assert isinstance(bench, Bench)
    bench.table.part = part
    if bench.left < PARTS[part] / 2:
        bench.table.figure("the whole part", f"skipped: {bench.left:.0f} s left")
        return
    began = time.monotonic()
    try:
        run: Callable[[Bench], None] = importlib.import_module(f"tests.gpu.check.{part}").run
        run(bench)
    except Exception as error:  # what a part cannot do is a finding, too
        traceback.print_exc()
        bench.table.add("the whole part", "runs", f"{type(error).__name__}: {error}".splitlines()[0][:300], False)
    bench.table.figure("seconds", f"{time.monotonic() - began:.0f}")


def heading(devices: Devices, device: Device) -> str:
    """Which card, which driver, when."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return f"{today}, {device.name}, {devices.note}, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs\n\n"


def _transformers() -> Sequence[str]:
    """The command of this Python's transformers, or the one that the environment names."""
    if given := os.environ.get("GPU_CHECK_TRANSFORMERS"):
        return given.split()
    found = shutil.which("transformers", path=str(Path(sys.executable).parent)) or shutil.which("transformers")
    return [sys.executable, found] if found else []


def _library_path() -> dict[str, str]:
    """What an engine of another user's clean environment would not have, and needs here to find the driver."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "GPU_CHECK_DEVICE") if name in os.environ}


def _chosen(devices: Devices, index: int | None) -> tuple[Device, DeviceSample]:
    """The device asked for, or the one with the most free memory."""
    sample = devices.sample()
    for failed, why in sample.failed.items():
        print(f"device {failed} cannot be read: {why}")
    readable = [device for device in devices.inventory() if device.index in sample.devices]
    wanted = [device for device in readable if index in (None, device.index)]
    if not wanted:
        raise SystemExit(f"gpu-check: no readable device {'' if index is None else index}")
    device = max(wanted, key=lambda device: sample.devices[device.index].free)
    return device, sample.devices[device.index]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check vllmd's view of a real NVIDIA GPU.")
    add = parser.add_argument
    add("--device", type=int, help="its number, as nvidia-smi has it; default: the one with most free memory")
    add("--only", nargs="+", choices=list(PARTS), help="these parts only, in this order")
    add("--seconds", type=float, default=480.0, help="the time that all of it may take")
    add("--load", type=float, default=60.0, help="seconds of load on the two models that take turns")
    add("--copy", type=float, default=20.0, help="GiB that are copied")
    add("--settle", type=float, default=15.0, help="seconds that an idle device is given to go down to its idle power")
    add("--markdown", type=Path, help="write the table there as well")
    add("--facts", type=Path, help="write there what driver and kernel tell of themselves")
    return parser


if __name__ == "__main__":
    sys.exit(main())

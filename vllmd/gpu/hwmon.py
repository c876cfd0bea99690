"""What a kernel driver tells of power and heat in hwmon, which has millionths of watts and joules, and millidegrees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllmd.frozen import frozen


@frozen
class Hwmon:
    """``folder``: the device's ``hwmon``. What is not told, or cannot be read now, is None."""

    folder: Path

    def watts(self) -> float | None:
        """What it draws, averaged where the driver does that."""
        return next((value / 1e6 for name in ("power1_average", "power1_input") for value in self._all(name)), None)

    def joules(self) -> float | None:
        """What it has drawn since its driver was loaded."""
        return next((value / 1e6 for value in self._all("energy1_input")), None)

    def celsius(self) -> float | None:
        """Degrees of the hottest sensor; None where none tells."""
        return max((value / 1000 for value in self._all("temp[0-9]*_input")), default=None)

    def overheated(self) -> str:
        """Which sensor is at its critical temperature; "" if none is."""
        for path in self._paths("temp[0-9]*_crit"):
            limit, now = _number(path), _number(path.with_name(path.name.replace("_crit", "_input")))
            if limit and now is not None and now >= limit:
                label = _text(path.with_name(path.name.replace("_crit", "_label"))) or path.name.partition("_")[0]
                return f"its sensor {label} is at the critical {limit / 1000:.0f} \N{DEGREE SIGN}C"
        return ""

    def _paths(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(f"hwmon*/{pattern}"))

    def _all(self, pattern: str) -> Iterator[int]:
        yield from (value for path in self._paths(pattern) if (value := _number(path)) is not None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None

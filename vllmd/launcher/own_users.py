"""Users that are made up: a number out of a range for each model that asks for one, and a home that keeps it.

The home is the record. It lies in a folder that is root's, where nobody can rename or remove another's, and belongs to
the number that was given; so the next launcher finds every user again without a file of its own, the caches in it keep
working, and a number is free again when somebody has deleted the home. No such user is in passwd: nobody logs in as
one, and one that the system's administrator has since made there is passed over.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from dataclasses import dataclass, field

PREFIX = "own:"  # of ``StartOrder.user``
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}\Z")
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})\Z")


@dataclass
class OwnUsers:
    """``first`` to ``last``: user ids, each also a group's. ``homes``: the folder of their homes."""

    first: int
    last: int
    homes: str
    _given: dict[str, int] = field(default_factory=dict)  # by us, whose homes may not have been made yet

    @classmethod
    def told(cls, numbers: str, homes: str) -> OwnUsers | None:
        """From the command line's ``FIRST-LAST``. Raises ValueError, in words."""
        if not numbers:
            return None
        match = _RANGE.match(numbers)
        if match is None or not 1000 <= int(match[1]) <= int(match[2]) < 1 << 31:
            raise ValueError(
                f"--own-users {numbers}: right are two user ids such as 60800-61183, the first at least 1000"
            )
        if not homes.startswith("/") or os.path.normpath(homes) != homes or homes == "/":
            raise ValueError("--own-users needs --own-homes DIR, an absolute path")
        return cls(int(match[1]), int(match[2]), homes)

    def home(self, name: str) -> str:
        """The home of a user."""
        return f"{self.homes}/{name}"

    def number(self, name: str) -> int:
        """The user id that a name has, or now gets. Raises ValueError, in words."""
        if not NAME.match(name):
            raise ValueError(f"{name!r} cannot be the name of a user of its own")
        taken = {**self._given, **self._taken()}
        if name in taken:
            self._check(name, taken[name])
            return taken[name]
        used = set(taken.values())
        free = (number for number in range(self.first, self.last + 1) if number not in used and not _is_known(number))
        number = next(free, None)
        if number is None:
            raise ValueError(f"all user ids from {self.first} to {self.last} have homes in {self.homes}")
        self._given[name] = number
        return number

    def noted(self, name: str) -> int | None:
        """The user id that a name has; None if it has none."""
        number = {**self._given, **self._taken()}.get(name)
        return number if number is not None and self.first <= number <= self.last else None

    def everybody(self) -> dict[str, int]:
        """The users that have a number, by name; none where the homes cannot be seen."""
        try:
            names = (*self._given, *self._taken())
        except ValueError:
            return {}
        found = {name: self.noted(name) for name in names if NAME.match(name)}
        return {name: number for name, number in found.items() if number is not None and not _is_known(number)}

    def _check(self, name: str, number: int) -> None:
        if not self.first <= number <= self.last or _is_known(number):
            raise ValueError(f"{self.home(name)} belongs to the user id {number}, which is none of these users")

    def _taken(self) -> dict[str, int]:
        """The owners of the homes that are there. Raises ValueError where they cannot be seen."""
        found = {}
        try:
            with os.scandir(self.homes) as entries:
                for entry in entries:
                    told = entry.stat(follow_symlinks=False)
                    # Whatever else lies there under that name is nobody's home, and must not become one.
                    found[entry.name] = told.st_uid if stat.S_ISDIR(told.st_mode) else 0
        except OSError as error:
            raise ValueError(f"cannot read {self.homes}: {error.strerror}") from None
        return found


def _is_known(number: int) -> bool:
    """Whether the system has a user of that number."""
    try:
        pwd.getpwuid(number)
    except KeyError:
        return False
    return True

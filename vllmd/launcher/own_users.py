"""Models' own users (as systemd's DynamicUser=): a user id out of a range, and a home that belongs to it.

The home is the record of the id. It lies in a folder of root's, where no user can rename or remove that of another, and
belongs to its user id; so the next launcher finds every user again without a file of its own, the caches in the home
stay usable, and an id is free again when its home is deleted. These users are not in passwd: no login is possible, and
an id that the system's administrator has since used there is skipped.
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
    """The range of user ids, ``first`` to ``last``, each also a group's, and the folder of their ``homes``."""

    first: int
    last: int
    homes: str
    _allocated: dict[str, int] = field(default_factory=dict)  # by this launcher; the homes may not have been made yet

    @classmethod
    def parse(cls, numbers: str, homes: str) -> OwnUsers | None:
        """From the command line's ``FIRST-LAST``; None for "". Raises ValueError, with a message for operators."""
        if not numbers:
            return None
        match = _RANGE.match(numbers)
        if match is None or not 1000 <= int(match[1]) <= int(match[2]) < 1 << 31:
            raise ValueError(f"--own-users {numbers} must be two user ids such as 60800-61183, the first at least 1000")
        if not homes.startswith("/") or os.path.normpath(homes) != homes or homes == "/":
            raise ValueError("--own-users needs --own-homes DIR, an absolute path")
        return cls(int(match[1]), int(match[2]), homes)

    def home(self, name: str) -> str:
        """The home of a user."""
        return f"{self.homes}/{name}"

    def allocate(self, name: str) -> int:
        """The user id of ``name``, a free one at the first call. Raises ValueError, with a message for operators."""
        if not NAME.match(name):
            raise ValueError(f"{name!r} cannot be the name of a model's own user")
        known = {**self._allocated, **self._owners()}
        if name in known:
            number = known[name]
            if not self.first <= number <= self.last or _is_known(number):
                wanted = f"{self.first} to {self.last} that nobody else has"
                raise ValueError(f"{self.home(name)} belongs to the user id {number}, which is not one of {wanted}")
            return number
        used = set(known.values())
        free = (number for number in range(self.first, self.last + 1) if number not in used and not _is_known(number))
        free_number = next(free, None)
        if free_number is None:
            raise ValueError(f"all user ids from {self.first} to {self.last} have homes in {self.homes}")
        self._allocated[name] = free_number
        return free_number

    def find(self, name: str) -> int | None:
        """The user id of ``name``; None if it has none."""
        number = {**self._allocated, **self._owners()}.get(name)
        return number if number is not None and self.first <= number <= self.last else None

    def all(self) -> dict[str, int]:
        """Name -> user id of every user; empty where the homes cannot be read."""
        try:
            names = (*self._allocated, *self._owners())
        except ValueError:
            return {}
        numbers = {name: self.find(name) for name in names if NAME.match(name)}
        return {name: number for name, number in numbers.items() if number is not None and not _is_known(number)}

    def _owners(self) -> dict[str, int]:
        """Name -> owner of every home. Raises ValueError where they cannot be read."""
        owners = {}
        try:
            with os.scandir(self.homes) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    # A file or a link under that name is no home, and must not become one: root's, so never allocated.
                    owners[entry.name] = status.st_uid if stat.S_ISDIR(status.st_mode) else 0
        except OSError as error:
            raise ValueError(f"cannot read {self.homes}: {error.strerror}") from None
        return owners


def _is_known(number: int) -> bool:
    """Whether the system has a user of that number."""
    try:
        pwd.getpwuid(number)
    except KeyError:
        return False
    return True

"""A lease on a model, renewed while it is meant to last, so that a program that dies does not keep its model."""

from __future__ import annotations

import getpass
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable

from vllmd.client.sync import Client
from vllmd.errors import UnknownModel, VllmdError

log = logging.getLogger("vllmd.client")

KEEP = 60.0  # seconds that a lease outlives its last renewal
RENEW = 20.0  # seconds between renewals


class Holding:
    """One lease of one program on one model. Methods may be called from any thread."""

    def __init__(self, client: Client, model: str, introduce: Callable[[], None]) -> None:
        """``introduce`` makes the model known again to a daemon that was started anew."""
        self._client, self._model, self._introduce = client, model, introduce
        self.lease = f"{_user()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._renewing: threading.Event | None = None  # set to end the present renewals
        self._deadline: float | None = None

    @property
    def remaining(self) -> float | None:
        """Seconds until it ends by itself; None while it is renewed, or is no more."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def kept(self) -> bool:
        """Whether a thread renews the lease, so that it does not end."""
        return self._renewing is not None

    def keep(self) -> None:
        """Take it, and renew it until told otherwise; a countdown is off."""
        with self._lock:
            self._client.lease_model(self._model, self.lease, KEEP)
            self._deadline = None
            if self._renewing is None:
                self._renewing = threading.Event()
                threading.Thread(target=self._renew, args=(self._renewing,), name="lease", daemon=True).start()

    def count_down(self, seconds: float) -> None:
        """Have it end in ``seconds``, whatever becomes of this program; the last lease takes its model along."""
        with self._lock:
            self._end_renewals()
            self._client.lease_model(self._model, self.lease, seconds)
            self._deadline = time.monotonic() + seconds

    def give_back(self) -> None:
        """Give the lease back now; the last one to go stops the model."""
        with self._lock:
            self._end_renewals()
            self._deadline = None
            self._client.release_model(self._model, self.lease, stop=True)

    def forget(self) -> None:
        """Stop renewing; the daemon is gone, or will let the lease run out."""
        with self._lock:
            self._end_renewals()
            self._deadline = None

    def _end_renewals(self) -> None:
        if self._renewing:
            self._renewing.set()
            self._renewing = None

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(RENEW):
            with self._lock:
                if ended.is_set():
                    return
                try:
                    self._client.lease_model(self._model, self.lease, KEEP)
                except UnknownModel:
                    self._lease_again()
                except VllmdError as error:  # it may be restarting: the next renewal will tell
                    log.info("%s: its lease was not renewed: %s", self._model, error.message)

    def _lease_again(self) -> None:
        try:
            self._introduce()
            self._client.lease_model(self._model, self.lease, KEEP)
        except VllmdError:
            pass


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        return str(os.getuid())

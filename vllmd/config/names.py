"""Names that are safe wherever systemd, a file system or a socket needs one."""

from __future__ import annotations

import re
import secrets

RANDOM_DIGITS = 6


def readable(model: str) -> str:
    """The model's name in [a-z0-9-], at most 40 characters; different models may share it."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower())[:40].strip("-") or "model"


def instance_name(model: str) -> str:
    """A name for one run of a model's engine: readable and never used twice."""
    return f"{readable(model)}-{secrets.token_hex(RANDOM_DIGITS // 2)}"


def unit_pattern(model: str) -> str:
    """The glob that matches the scopes of all the model's runs, for ``journalctl --unit=``."""
    return f"vllmd-model-{readable(model)}-{'[0-9a-f]' * RANDOM_DIGITS}.scope"

"""Models that nobody configured: those in the engines' Hugging Face cache, with the settings of ``defaults``.

They are looked for at start and at each reload. A repository that a configured
model loads already, under whatever name, is not offered twice.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from vllmd.config.checks import is_good_name
from vllmd.config.offers import names_of
from vllmd.config.types import Config, ModelConfig
from vllmd.hub import Found, discover, is_repository

log = logging.getLogger("vllmd.discovery")


def with_discovered(config: Config, cache: Path) -> Config:
    """``config`` with the models of ``cache`` (see ``vllmd.hub``) added, if it asks for them. Reads their files."""
    if not config.discover:
        return config
    taken = {name for model in config.models.values() for name in (model.name, model.source, *model.aliases)}
    taken |= {*names_of(config), *config.pools}
    there = [one for one in discover(cache) if one.name not in taken]
    wrong = [one for one in there if not (is_good_name(one.name) and is_repository(one.name))]
    for one in wrong:  # engines may write there: a folder's name could be a path, a flag, or several lines
        log.warning("%s is left out: it is not named like a repository", one.path)
    found = {one.name: _model(config, one) for one in there if one not in wrong}
    log.info("%d models discovered in %s: %s", len(found), cache, ", ".join(found) or "none")
    return replace(config, models={**config.models, **found})


def _model(config: Config, found: Found) -> ModelConfig:
    template = config.template_of(found.engine) if found.engine else config.template
    return replace(template, name=found.name, where=f"found in {found.path}")

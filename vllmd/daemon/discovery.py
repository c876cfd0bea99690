"""Models that the configuration does not name: those in the engines' Hugging Face cache, with ``defaults``' settings.

They are looked for at start and at each reload. A repository that a configured
model loads already, under whatever name, is not offered twice.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from vllmd.config.checks import is_good_name
from vllmd.config.offers import names_of
from vllmd.config.types import Config
from vllmd.foreign import shown
from vllmd.hub import discover

log = logging.getLogger("vllmd.discovery")


def with_discovered(config: Config, cache: Path) -> Config:
    """``config`` with the models of ``cache`` (see ``vllmd.hub``) added, if ``discover`` is on. Reads their files."""
    if not config.discover:
        return config
    taken = {name for model in config.models.values() for name in (model.name, model.source, *model.aliases)}
    taken |= {*names_of(config), *config.pools}
    there = [one for one in discover(cache) if one.name not in taken]
    wrong = [one for one in there if not is_good_name(one.name)]
    for one in wrong:
        log.warning("%s is left out: it is not named like a repository", shown(one.name))
    discovered = {}
    for one in there:
        if one not in wrong:
            template = config.template_of(one.engine) if one.engine else config.template
            discovered[one.name] = replace(template, name=one.name, where=f"found in {one.path}")
    log.info("%d models discovered in %s: %s", len(discovered), cache, ", ".join(discovered) or "none")
    return replace(config, models={**config.models, **discovered})

"""Names of models to be fetched, and the sources that they mean.

::

    smollm2, qwen3:0.6b               a well-known name (``known.py``)
    ORG/NAME                          a repository of the hub
    ORG/NAME:QUANT                    of a repository with GGUF files the one of that quantisation
    ORG/NAME/FOLDER/FILE.gguf         that file of it

``hf.co/`` or the hub's address may stand before a name. Names come from outside: anything else is refused, so that none
becomes a path, an option or an address.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field

from vllmd.errors import BadRequest
from vllmd.frozen import frozen
from vllmd.hub import is_repository
from vllmd.store.known import KNOWN, Wheel

LONGEST_CHARS = 300
_PREFIX = re.compile(r"(?:https?://)?(?:hf\.co|(?:www\.)?huggingface\.co)/", re.IGNORECASE)
_QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,127}", re.ASCII)
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", re.ASCII)


@frozen
class Hub:
    """A repository of the hub, or of it one quantisation or one file."""

    repository: str
    quantization: str = ""
    file: str = ""
    revision: str = "main"

    @property
    def owner(self) -> str:
        return self.repository.partition("/")[0]

    def __str__(self) -> str:
        return f"{self.repository}{':' * bool(self.quantization)}{self.quantization}{'/' * bool(self.file)}{self.file}"


@frozen
class Wanted:
    """A model to be fetched: its name, and its sources, of which the first that works is used.

    ``about``: its bytes roughly, 0 where they are not known before the source has been asked.
    """

    name: str
    sources: Sequence[Hub | Wheel]
    about: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)


def wanted(text: str, *, device: bool = False) -> Wanted:
    """The model that a name means. ``device``: there is a GPU, and vLLM, which loads a well-known model's repository.

    Raises BadRequest, which says what would be right.
    """
    name = text.strip()
    if not name or len(name) > LONGEST_CHARS:
        raise BadRequest("name a model: smollm2, or a repository such as Qwen/Qwen3-0.6B", param="model")
    short = name.lower().removesuffix(":latest")
    known = KNOWN.get(short)
    if known is None:
        source = _hub(_PREFIX.sub("", name, count=1))
        return Wanted(str(source), (source,))
    if device and known.repository:
        return Wanted(short, (Hub(known.repository),), known.size)
    hub = (_hub(known.gguf),) if known.gguf else ()
    wheel = (known.wheel,) if known.wheel else ()
    return Wanted(short, (*wheel, *hub), known.gguf_size, known.settings)


def _hub(name: str) -> Hub:
    """The repository that a name means on the hub. Raises BadRequest for what is none."""
    parts = name.split("/")
    if len(parts) < 2:
        import difflib  # for mistakes only

        near = difflib.get_close_matches(name.lower(), KNOWN, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"well-known are {', '.join(KNOWN)}"
        raise BadRequest(f"{name!r} is no well-known name and no repository, which is ORG/NAME; {hint}", param="model")
    last, _, quantization = parts[1].partition(":") if len(parts) == 2 else (parts[1], "", "")
    repository, file = f"{parts[0]}/{last}", "/".join(parts[2:])
    right = "right are ORG/NAME, ORG/NAME:QUANT and ORG/NAME/FILE.gguf"
    if not (_OWNER.fullmatch(parts[0]) and _OWNER.fullmatch(last) and is_repository(repository)):
        raise BadRequest(f"{name!r} names no repository; {right}", param="model")
    if quantization and not _QUANTIZATION.fullmatch(quantization):
        raise BadRequest(f"{quantization!r} is no quantisation; one is Q4_K_M", param="model")
    if file and not (file.endswith(".gguf") and all(_PART.fullmatch(part) for part in parts[2:])):
        raise BadRequest(f"{file!r} is no file that can be fetched by itself; {right}", param="model")
    if name.endswith(("/", ":")):
        raise BadRequest(f"{name!r} breaks off; {right}", param="model")
    return Hub(repository, quantization, file)

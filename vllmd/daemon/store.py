"""The models that operators fetch, add and remove; and those that requests have fetched, where that is allowed.

Who writes what, and why so. A model's files belong to the engines' user: ``downloads`` has them fetched and removed by
a process of that user. That a model is served stands in a file of the daemon's own state, one for each model
(``Config.added``), never in the administrator's: the daemon could not write there, and what it could write an
administrator would have to doubt. It says no more than what model it is, of which kind of engine, and by which other
names, so whoever may add models cannot have a program of his choice run by it; that is written by root, by hand. What
model it is can be a file of this machine or a repository: engines take addresses, too, which are root's to say.

``downloads`` is imported only when it is needed: most daemons fetch nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.api.answers import Added, Cached, CachedModel, Pulled, Reloaded, Removed, failure
from vllmd.api.answers import Download as DownloadLine
from vllmd.config.names import readable
from vllmd.config.types import Config, ModelConfig
from vllmd.daemon.changes import Changes
from vllmd.daemon.current import Current, Later, RuntimeEnvironment
from vllmd.daemon.state_files import write_whole
from vllmd.errors import BadRequest, ConfigError, Conflict, Forbidden, NotFound, UnknownModel, Unsupported, VllmdError

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd
    from vllmd.daemon.downloads import Download, Downloads
    from vllmd.launcher.client import ExitReport
    from vllmd.store.names import Wanted

log = logging.getLogger("vllmd.store")

HEAD = "# Written by vllmctl add; vllmctl rm removes it. Settings for the model may be added here: vllmd.yaml(5).\n"
REQUESTED = "# A request had it fetched.\n"  # stands after the head
MOST_REQUESTED = 64  # models that are here because a request had them fetched
MAY_SAY = ("engine", "model", "aliases", "display_name", "description", "max_model_len")
MAY_BE = ("vllm", "llama.cpp", "sglang", "transformers", "tei")  # kinds of engine that load a model's files
GGUF_KIND = "llama.cpp"
_REPOSITORY = r"(?a)(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::[A-Za-z0-9][\w.-]*)?"
AGAIN = 60.0  # seconds for which a failure is remembered


class _AlreadyServed(Conflict):
    """The model is configured already, so there is nothing to add."""


class ModelStore:
    """Implements ``vllmd.admin.control.Store``."""

    def __init__(
        self,
        current: Current,
        runtime: RuntimeEnvironment,
        back: Later[BackEnd],
        changes: Changes,
        reload: Callable[[], Awaitable[Reloaded]],
    ) -> None:
        self._current, self._runtime, self._back, self._changes = current, runtime, back, changes
        self._reload = reload
        self._writing = asyncio.Lock()
        self._made: Downloads | None = None
        self._refused: dict[str, tuple[float, VllmdError | None]] = {}  # name -> when and why a request's failed

    # -- for the daemon itself

    @property
    def active(self) -> int:
        """The number of downloads that run or wait."""
        return self._made.active if self._made else 0

    def ended(self, report: ExitReport) -> bool:
        """Whether the process that ended was a download's."""
        return self._made is not None and self._made.ended(report)

    def lines(self) -> list[DownloadLine]:
        """The downloads, as they are shown."""
        return self._made.lines() if self._made else []

    @property
    def _downloads(self) -> Downloads:
        if self._made is None:
            from vllmd.daemon.downloads import Downloads  # see the head of this file

            self._made = Downloads(
                self._current, self._runtime, self._back, self._changes.mark_changed, self._changes.tell
            )
        return self._made

    # -- fetching

    async def pull(self, name: str, *, add: bool, detached: bool) -> AsyncGenerator[Pulled, None]:
        """Fetch a model's files and, with ``add``, serve the model. Yields the progress, line by line.

        The last line has ``done``, or ``error``. Raises BadRequest before the first one for what is no model's name.
        """
        wanted = await self.wanted_for(name)
        if wanted.name in self._current.config.models and add:
            yield Pulled(wanted.name, "done", done=True, added=False)
            return
        download = self._downloads.begin(wanted, detached=detached)
        async with contextlib.aclosing(self._downloads.follow(download)) as lines:
            async for line in lines:
                yield _pulled(line)
        try:
            yield await self._end(download, wanted, add=add)
        except VllmdError as error:
            yield Pulled(wanted.name, "failed", done=True, error=failure(error))

    async def _check_room(self, config: Config) -> None:
        """Check that requests have not added as many models as they may. Raises Forbidden."""
        if config.added is not None and await asyncio.to_thread(_requested, config.added) >= MOST_REQUESTED:
            what = f"requests have added {MOST_REQUESTED} models, and no more are; vllmctl rm takes one out"
            raise Forbidden(f"{what}, vllmctl pull fetches others", param="model")

    async def _end(self, download: Download, wanted: Wanted, *, add: bool, requested: bool = False) -> Pulled:
        """Wait for a download and, with ``add``, serve the model. Returns the last line of the pull."""
        result = await self._downloads.finished(download)
        if requested and result.get("called") != wanted.name:  # the download may be one that an operator has begun
            raise Forbidden(f"a request has {wanted.name} fetched only by its own name", param="model")
        settings = settings_of(result, wanted)
        line = download.line()
        if add:
            with contextlib.suppress(_AlreadyServed):  # by another caller who waited for the same download
                await self.add(wanted.name, settings, ours=True, requested=requested)
        return replace(_pulled(line), model=wanted.name, done=True, added=add, settings=settings, seconds=line.elapsed)

    async def wanted_for(self, name: str) -> Wanted:
        """The files that a name means. On a machine with a device and vLLM well-known names mean the files for vLLM."""
        from vllmd.gpu import gpus
        from vllmd.store.names import wanted

        back = await self._back.wait()
        return wanted(name, device=bool(gpus(back.memory.inventory)) and await asyncio.to_thread(_has_vllm))

    def stop(self, model: str) -> DownloadLine:
        """End a download. Raises NotFound."""
        download = self._made.running(model) if self._made else None
        if self._made is None or download is None:
            raise NotFound(f"nothing called {model!r} is being downloaded; vllmctl ps shows what is")
        self._made.cancel(download)
        return download.line()

    # -- fetching on request

    def may_fetch(self, name: str) -> bool:
        """Whether a request for this name may have the model fetched: its owner is one of ``pull.owners``.

        Only ORG/NAME and ORG/NAME:QUANT are: each other name of the same would add one more model.
        """
        pull = self._current.config.pull
        if not pull.on_request or not pull.owners or self._current.broken:
            return False
        from vllmd.store.names import wanted

        try:
            meant = wanted(name)
        except BadRequest:
            return False
        owners = _owners(meant)
        plain = [str(source) for source in meant.sources] == [name] and name.count("/") == 1  # ORG/NAME[:QUANT]
        return plain and bool(owners) and owners <= set(pull.owners)

    async def fetch(self, name: str) -> None:
        """Fetch and serve a model, once for all concurrent callers. Raises why that failed, to each of them.

        For ``AGAIN`` seconds the same failure is raised again: each try is a process, and a question to the hub.
        """
        at, error = self._refused.get(name, (0.0, None))
        if error is not None and time.monotonic() - at < AGAIN:
            raise error
        wanted = await self.wanted_for(name)
        owners = _owners(wanted)  # others than in ``may_fetch``, if a device makes the name mean other files
        if not owners or not owners <= set(self._current.config.pull.owners):
            what = f"{name} would be fetched from {', '.join(sorted(owners)) or 'no hub'}"
            raise Forbidden(f"{what}, of which a request may have nothing fetched", param="model")
        await self._check_room(self._current.config)
        download = self._downloads.begin(wanted, largest=self._current.config.pull.largest, exact=True)
        if not download.followers:
            log.info("%s is fetched, for a request asks for it", name)
        try:
            await self._end(download, wanted, add=True, requested=True)
        except VllmdError as failed:
            if not isinstance(failed, Conflict):  # which means that all callers have left
                self._refused = {
                    key: value for key, value in self._refused.items() if time.monotonic() - value[0] < AGAIN
                }
                self._refused[name] = time.monotonic(), type(failed)(failed.message, retry_after=AGAIN)
            raise

    def how_far(self, name: str) -> str:
        """The progress that waiting clients are told: ``fetching 35 %``."""
        download = self._made.running(name) if self._made else None
        if download is None:
            return ""
        total = download.total
        return f"fetching {min(100, 100 * download.done // total)} %" if total else "fetching"

    # -- adding and removing

    async def add(
        self, name: str, settings: Mapping[str, object], *, ours: bool = False, requested: bool = False
    ) -> Added:
        """Serve a model from now on. ``ours``: the settings are vllmd's own. ``requested``: by a client's request.

        Raises BadRequest, Conflict, ConfigError, Forbidden.
        """
        from vllmd.config.edit import document
        from vllmd.config.runtime_model import runtime_model

        async with self._writing:
            config = self._configuration()
            if name in config.models:
                raise _AlreadyServed(f"{name!r} is configured already, in {config.models[name].where or 'memory only'}")
            if not ours:
                _check(name, settings)
            if requested:
                await self._check_room(config)
            runtime_model(name, settings, config, trusted=True)
            if config.added is None:
                raise Unsupported("this vllmd has no folder for models that are added")
            path = config.added / f"{readable(name)}.yaml"
            if path.exists():  # of another name that reads the same
                path = path.with_stem(f"{readable(name)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}")
            if path.exists():
                raise Conflict(f"{path} is there, and has another model than {name!r}")
            text = HEAD + REQUESTED * requested + document(name, settings)
            try:
                await asyncio.to_thread(write_whole, path, text, public=True)
            except OSError as error:
                raise Conflict(f"{path} cannot be written: {error.strerror}") from None
            try:
                await self._reload()
            except ConfigError:
                await asyncio.to_thread(path.unlink)
                raise
            log.info("%s was added: %s", name, path)
            return Added(name, str(path), dict(settings))

    async def copy(self, model: str, name: str) -> Added:
        """Serve a model's files under another name as well, with the defaults of its kind of engine."""
        known = self._configuration().models.get(model)
        if known is None:
            raise UnknownModel(f"no model {model!r} is configured", param="model")
        return await self.add(name, {"engine": known.engine, "model": known.source})

    async def remove(self, model: str, *, files: bool, dry: bool = False) -> Removed:
        """Serve a model no more, and with ``files`` remove its files, if no other model needs them.

        ``dry``: only say what would be removed. Raises UnknownModel, Conflict.
        """
        async with self._writing:
            config, name = self._configuration(), model
            known = config.models.get(name)
            paths, kept = await asyncio.to_thread(self._files, config, name, known) if files else ((), "")
            if known is None and not paths:
                raise UnknownModel(f"no model {name!r} is configured, or in the cache", param="model")
            file = _added(config, known) if known is not None and not known.where.startswith("found in ") else None
            removed, size = tuple(map(str, paths)), await asyncio.to_thread(_sizes, paths)
            removal = Removed(name, str(file or ""), removed, kept, size)
            if dry:
                return removal
            if file is not None:
                await asyncio.to_thread(file.unlink)
                await self._reload()
                log.info("%s was removed: %s", name, file)
            if paths:
                removal = replace(removal, freed=await self._downloads.remove(name, list(paths)))
                if config.discover:
                    await self._reload()
            return removal

    async def contents(self) -> Cached:
        """The contents of the engines' caches, with the models that are loaded from them."""
        contents = await asyncio.to_thread(self._contents)
        return Cached(tuple(contents), self._current.config.pull.endpoint or "")

    # -- files

    def _configuration(self) -> Config:
        if self._current.broken:
            raise Conflict("the configuration is invalid; vllmctl config check says where")
        return self._current.config

    def _hub(self) -> Path:
        from vllmd.daemon.expectations import paths_of

        return paths_of(self._current.config, self._runtime).homes.hub(ModelConfig(""))

    def _contents(self) -> list[CachedModel]:
        from vllmd.daemon.downloads import files_of
        from vllmd.hub import discover, ggufs_of

        hub = self._hub()
        users = _users(self._current.config)
        contents = []
        for one in discover(hub):
            tags = tuple(sorted(ggufs_of(one.path))) if one.engine else ()
            names = tuple(name for source, name in users if source.partition(":")[0] == one.name)
            contents.append(CachedModel(one.name, str(one.path), one.size, one.kind, one.engine, tags, names))
        with contextlib.suppress(OSError):
            for path in sorted(files_of(hub).glob("*/*.gguf")):
                names = tuple(name for source, name in users if source == str(path))
                size = path.stat().st_size
                contents.append(CachedModel(path.name, str(path), size, "generate", GGUF_KIND, (), names))
        return contents

    def _files(self, config: Config, name: str, model: ModelConfig | None) -> tuple[tuple[Path, ...], str]:
        """The files to be removed with a model (or a repository of the cache), and why the others stay."""
        from vllmd.daemon.downloads import files_of
        from vllmd.hub import cached_files, is_repository

        source, hub = model.source if model else name, self._hub()
        others = [(other, user) for other, user in _users(config) if user != name]
        same = [user for other, user in others if other == source]
        if same:
            return (), f"{source} is also the model of {', '.join(same)}: its files stay"
        if source.startswith("/"):
            path = Path(source)
            if path.parent.parent == files_of(hub):
                return (path.parent,), ""
            return (), f"{source} is not in the engines' cache: it stays"
        repository, _, tag = source.partition(":")
        if not is_repository(repository):
            return (), f"{source} is no repository of the cache: nothing of it is removed"
        shared = [user for other, user in others if other.partition(":")[0] == repository]
        paths = cached_files(hub, repository, tag, whole=not shared)
        return paths, f"other files of {repository} stay, for {', '.join(shared)}" if shared else ""


def _requested(folder: Path) -> int:
    """How many models of those that were added are here for a request."""
    number, head = 0, (HEAD + REQUESTED).encode()
    for path in folder.glob("*.yaml"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            number += file.read(len(head)) == head
    return number


def _owners(wanted: Wanted) -> set[str]:
    """The owners of the repositories that it would be fetched from."""
    from vllmd.store.names import Hub

    return {source.owner for source in wanted.sources if isinstance(source, Hub)}


def _pulled(line: DownloadLine) -> Pulled:
    """A download's line, in the form of the answer to a pull."""
    return Pulled(line.model, line.phase, line.source, line.completed, line.total, line.rate, line.elapsed, line.behind)


def settings_of(result: Mapping[str, object], wanted: Wanted) -> dict[str, object]:
    """The settings of a model whose files have come."""
    settings = dict(wanted.settings)
    if result.get("path"):
        return {**settings, "engine": GGUF_KIND, "model": str(result["path"])}
    repository, tag, file = (str(result.get(name) or "") for name in ("repository", "quantization", "file"))
    if file:
        return {**settings, "engine": GGUF_KIND, "model": f"{result['snapshot']}/{file}"}
    if tag:
        return {**settings, "engine": GGUF_KIND, "model": f"{repository}:{tag}"}
    return {**settings, **({"model": repository} if repository != wanted.name else {})}


def _has_vllm() -> bool:
    """Whether engines would find vLLM."""
    from vllmd.engines.environments import in_path, in_use

    return in_use("vllm") is not None or in_path(ModelConfig(""), "vllm") is not None


def _check(model: str, settings: Mapping[str, object]) -> None:
    """Raises Forbidden for settings that only a file of the administrator's may have."""
    for name in settings:
        if name not in MAY_SAY:
            raise Forbidden(f"{name} is for the administrator to say, in vllmd.yaml; here may be: {', '.join(MAY_SAY)}")
    if settings.get("engine") not in (None, *MAY_BE):
        raise BadRequest(
            f"engine {settings['engine']!r} cannot be added; right are {', '.join(MAY_BE)}", param="engine"
        )
    source = settings.get("model") or model
    if isinstance(source, str) and not is_source(source):
        what = "right are an absolute path without ~, and a repository as ORG/NAME or ORG/NAME:TAG"
        raise Forbidden(
            f"a model from {source!r} is for the administrator to say, in vllmd.yaml; {what}", param="model"
        )


def is_source(text: str) -> bool:
    """Whether ``text`` is a path of this machine or a repository; no engine takes it for an address or a home."""
    if text.startswith("/"):
        return "~" not in text and "://" not in text
    return re.fullmatch(_REPOSITORY, text) is not None


def _added(config: Config, model: ModelConfig) -> Path:
    """The file that vllmd has written for the model. Raises Conflict where another one configures it."""
    from vllmd.config.edit import models_of

    source, _, line = model.where.rpartition(":")
    path = Path(source if line.isdecimal() else model.where)
    if config.added is not None and path.parent == config.added and path.is_file():
        text = path.read_text("utf-8")
        if text.startswith(HEAD) and models_of(text) == [model.name]:
            return path
    what = f"{model.name!r} is configured in {model.where}" if model.where else f"{model.name!r} is in memory only"
    raise Conflict(f"{what}: take it out there, then vllmctl reload")


def _users(config: Config) -> list[tuple[str, str]]:
    """What is loaded, and by which model."""
    users = []
    for model in config.models.values():
        for each in (model, *(model.replicas.of if model.replicas else ())):
            if (each.source, model.name) not in users:
                users.append((each.source, model.name))
    return users


def _sizes(paths: tuple[Path, ...]) -> int:
    """Bytes of what would be removed."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            inner = [Path(at, name) for at, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
            total += sum(each.lstat().st_size if path.is_dir() else each.stat().st_size for each in inner)
    return total

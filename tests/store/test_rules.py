"""What may be added, and what may be fetched for a request: the daemon's store alone, no process, no socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.api.answers import Reloaded
from vllmd.config.types import Config, ModelConfig, PullConfig
from vllmd.core.types import Device
from vllmd.daemon.current import Later
from vllmd.daemon.store import MOST_REQUESTED, ModelStore
from vllmd.errors import Forbidden


def store(folder: Path, **config: Any) -> ModelStore:
    """One that adds to a folder, and reloads nothing."""

    async def reload() -> Reloaded:
        return Reloaded()

    current: Any = SimpleNamespace(config=Config(added=folder / "models.d", **config), broken=None)
    runtime: Any = SimpleNamespace()
    changes: Any = SimpleNamespace(mark_changed=lambda: None, tell=lambda decision: None)
    back: Any = Later()
    back.set(SimpleNamespace(memory=SimpleNamespace(inventory=(Device(0, "GPU-a", 80 << 30, runtime="cuda"),))))
    return ModelStore(current, runtime, back, changes, reload)


@pytest.mark.parametrize(
    "source",
    ["s3://bucket/m", "http://h/m", "gs://b/m", "~root/m", "~/m", "/~root/m", "./m", "../m", "a/../b", "a/b/c", "a/--b",
     "hf://a/b", "file:///etc", "m", "-a/b", "a/b:", "a/b\n"],
)  # fmt: skip
def test_a_model_that_is_added_comes_from_this_machine_or_a_repository(tmp_path: Path, source: str) -> None:
    """Engines load addresses as well: whether the name or the setting says one, it is root's to say."""
    it = store(tmp_path)
    with pytest.raises(Forbidden, match="for the administrator to say"):
        asyncio.run(it.add("x", {"engine": "vllm", "model": source}))
    with pytest.raises(Forbidden, match="for the administrator to say"):
        asyncio.run(it.add(source, {"engine": "vllm"}))
    with pytest.raises(Forbidden, match="for the administrator to say"):
        asyncio.run(store(tmp_path, models={"m": ModelConfig("m", engine="vllm", model=source)}).copy("m", "x"))
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_added_is(tmp_path: Path) -> None:
    """A file, a repository, one quantisation of it; with a name of its own or the repository's."""
    it = store(tmp_path)
    for number, source in enumerate(("/models/m.gguf", "org/m", "org/m.1:Q4_K_M")):
        assert asyncio.run(it.add(f"m{number}", {"engine": "llama.cpp", "model": source})).settings["model"] == source
    assert Path(asyncio.run(it.add("org/m", {"engine": "vllm"})).file).is_file()


def test_the_owner_is_looked_at_of_what_is_really_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device and vLLM a well-known name means another repository, of somebody else."""
    monkeypatch.setattr("vllmd.daemon.store._has_vllm", lambda: True)
    it = store(tmp_path, pull=PullConfig(on_request=True, owners=("bartowski",)))
    with pytest.raises(Forbidden, match="smollm2 would be fetched from HuggingFaceTB, of which a request may"):
        asyncio.run(it.fetch("smollm2"))


def test_a_request_has_one_name_for_what_it_has_fetched(tmp_path: Path) -> None:
    """A repository, or a quantisation of it; no address, no file of it, no well-known name."""
    it = store(tmp_path, pull=PullConfig(on_request=True, owners=("org", "bartowski", "HuggingFaceTB")))
    assert it.may_fetch("org/m") and it.may_fetch("org/m:Q8_0")
    for name in ("other/m", "hf.co/org/m", " org/m", "org/m/m-Q8_0.gguf", "smollm2", "SmolLM2:latest", "org/m:", "org"):
        assert not it.may_fetch(name), name


def test_requests_add_so_many_models_and_operators_more(tmp_path: Path) -> None:
    """Whoever may ask for any model adds none without end; what was added is counted over restarts."""
    pull, full = (
        PullConfig(on_request=True, owners=("org",)),
        f"requests have added {MOST_REQUESTED} models, and no more",
    )

    async def fill(it: ModelStore) -> None:
        for number in range(MOST_REQUESTED):
            await it.add(f"org/m{number}", {}, ours=True, requested=True)

    asyncio.run(fill(store(tmp_path, pull=pull)))
    again = store(tmp_path, pull=pull)
    with pytest.raises(Forbidden, match=full):
        asyncio.run(again.add("org/more", {}, ours=True, requested=True))
    with pytest.raises(Forbidden, match=full):
        asyncio.run(again.fetch("org/more"))
    Path(asyncio.run(again.add("org/more", {})).file).unlink()
    next((tmp_path / "models.d").iterdir()).unlink()
    asyncio.run(again.add("org/more", {}, ours=True, requested=True))

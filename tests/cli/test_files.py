"""The verbs that work on files: config, assign, import. Nothing is ever half written.

V is the Ollama-like manager; P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.fake_daemon import fake_daemon, model, status
from vllmd.cli import main
from vllmd.config.loader import load
from vllmd.core.types import Device
from vllmd.gpu.inventory import NoDevices
from vllmd.sizes import GiB


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration that the verbs find."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("# ours\nmodels:\n  Qwen/Qwen3-0.6B:  # small\n    devices: 0\n")
    monkeypatch.setenv("VLLMD_CONFIG", str(file))
    monkeypatch.setattr("vllmd.gpu.present.open_devices", lambda config, env: NoDevices("whatever machine this is"))
    return file


def test_config_check(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Valid: how many models, from where, and what of their programs is missing. Invalid: every problem, status 78."""
    file.write_text(file.read_text() + "    command: /nowhere/vllm\n")
    assert main(["config", "check"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        f"valid: 1 models, read from {file}",
        "vllmd --check looks at model files and devices as well",
    ]
    assert told.err.startswith("warning: Qwen/Qwen3-0.6B: there is no command '/nowhere/vllm'")
    file.write_text("polcy: lru\nreserve: x\n")
    assert main(["config", "check"]) == 78
    assert [line.split(": ")[:2] for line in capsys.readouterr().err.splitlines()] == [
        [f"{file}:1", "polcy"],
        [f"{file}:2", "reserve"],
    ]


def test_config_check_of_another_file_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For editors and CI: place, key, problem, what is accepted."""
    other = tmp_path / "other.yaml"
    other.write_text("a:\n  b: 1\n")
    assert main(["config", "check", str(other), "--json"]) == 78
    problem = json.loads(capsys.readouterr().out)["problems"][0]
    assert (problem["file"], problem["line"], problem["column"], problem["key"]) == (str(other), 1, 1, "a")


def test_config_check_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, not silently the defaults."""
    assert main(["config", "check", str(tmp_path / "none")]) == 78
    assert capsys.readouterr().err == f"{tmp_path}/none: there is no such file\n"


def test_config_show_and_schema(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in effect, with its origin; the schema as JSON."""
    assert main(["config", "show"]) == 0
    assert f"    devices: [0]  # {file}:4" in capsys.readouterr().out.splitlines()
    assert main(["config", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["Qwen/Qwen3-0.6B"]["devices"] == [0]
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "vllmd.yaml(5)"


def test_config_show_of_a_model_that_can_never_fit(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon serves the others by this configuration: it is in effect, and shown."""
    file.write_text("devices: [{memory: 8GiB}]\nmodels: {big: {gpu_memory: 20GiB}, m: {}}\n")
    assert main(["config", "show"]) == 0
    shown = capsys.readouterr()
    assert "gpu_memory: 20GiB" in shown.out
    assert shown.err.startswith(f"{file}:2: models.big.gpu_memory: it needs 20 GiB")


def test_V_assign_writes_yaml(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Devices and memory; comments stay; an end of the name is enough."""
    file.chmod(0o640)
    assert main(["assign", "Qwen3-0.6B", "--devices", "0,1", "--gpu-memory", "0.5"]) == 0
    assert file.read_text() == (
        "# ours\nmodels:\n  Qwen/Qwen3-0.6B:  # small\n    gpu_memory: 0.5\n    devices: [0, 1]\n"
    )
    assert file.stat().st_mode & 0o777 == 0o640
    assert capsys.readouterr().out == (
        f"Qwen/Qwen3-0.6B: devices: [0, 1], gpu_memory: 0.5 written to {file}\nvllmctl reload puts it into force\n"
    )


def test_assign_knows_a_replica(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be a new model of that name otherwise."""
    file.write_text("models: {m: {engine: sim, replicas: 2}}\n")
    assert main(["assign", "m@2", "--devices", "1"]) == 64
    assert (
        capsys.readouterr().err
        == "vllmctl: m@2 is a replica: its settings are those of m, and in its list of replicas\n"
    )


def test_V_assign_finds_the_file_in_models_d(file: Path) -> None:
    """Where the model is configured, there it is changed; a flat file of V's, too."""
    (file.parent / "models.d").mkdir()
    extra = file.parent / "models.d" / "v.yaml"
    extra.write_text("BAAI/bge-m3:\n  dtype: auto\n")
    before = file.read_text()
    assert main(["assign", "BAAI/bge-m3", "--devices", "auto"]) == 0
    assert extra.read_text() == "BAAI/bge-m3:\n  devices: auto\n  dtype: auto\n"
    assert file.read_text() == before


def test_V_assign_restart(file: Path, tmp_path: Path) -> None:
    """Reload, and start it again if it was loaded."""
    answers = {
        "GET /admin/status": (200, status(model("Qwen/Qwen3-0.6B", "running"))),
        "POST /admin/reload": (200, {"changed": ["Qwen/Qwen3-0.6B"]}),
        "POST /admin/models/Qwen%2FQwen3-0.6B/load?wait=true": (200, {"done": True}),
    }
    with fake_daemon(answers, tmp_path / "s") as daemon:
        assert main(["--socket", str(tmp_path / "s"), "assign", "Qwen3-0.6B", "--devices", "1", "--restart"]) == 0
    assert [what for what, _, _ in daemon.seen] == list(answers)


def test_assign_that_would_not_be_valid_changes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon never finds a file that vllmctl broke."""
    file.write_text("devices: [{memory: 8GiB}]\nmodels: {m: {pin: true}}\n")
    before = file.read_text()
    assert main(["assign", "m", "--devices", "3"]) == 78
    assert file.read_text() == before
    assert capsys.readouterr().err == (
        "vllmctl: nothing was changed, for it would not be valid:\n"
        f"{file}:2: models.m.devices: there is no device 3; there is only 0\n"
    )


SMALL = "device 0 has 8 GiB less a reserve of 512 MiB: 7.5 GiB"
BOTH = f"{SMALL}; device 1 has 24 GiB less a reserve of 512 MiB: 23.5 GiB"


@pytest.mark.parametrize(
    ("settings", "asked", "room"),
    [
        (["--devices", "auto", "--gpu-memory", "100GiB"], "100 GiB", BOTH),
        (["--devices", "auto", "--gpu-memory", "0.99"], "23.76 GiB", BOTH),
        (["--devices", "0", "--gpu-memory", "12GiB"], "12 GiB", SMALL),
    ],
)
def test_assign_refuses_what_no_device_has(
    settings: list[str],
    asked: str,
    room: str,
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPUs are asked, which no file declares: with what they have it is said at once, not at the next start."""
    there = tuple(Device(index, str(index), size * GiB, GiB // 2) for index, size in enumerate((8, 24)))
    monkeypatch.setattr("vllmd.gpu.present.present", lambda config: there)
    before = file.read_text()
    assert main(["assign", "Qwen3-0.6B", *settings]) == 78
    refused = "vllmctl: nothing was changed, for Qwen/Qwen3-0.6B could never be loaded: "
    assert capsys.readouterr().err == f"{refused}it needs {asked} on 1 device; {room}\n"
    assert main(["assign", "Qwen3-0.6B", "--devices", "3"]) == 78
    assert capsys.readouterr().err == f"{refused}there is no device 3; there are 0, 1\n"
    assert file.read_text() == before
    assert main(["assign", "Qwen3-0.6B", "--devices", "auto", "--gpu-memory", "20GiB"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        (2, f"it needs 12 GiB on each of 2 devices; {BOTH}"),
        (4, "it needs 4 devices, and there are 2 for it (tensor_parallel_size times pipeline_parallel_size)"),
    ],
)
def test_assign_names_what_several_devices_lack(
    ranks: int, why: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a device that has enough: the one that has not, or that there are too few."""
    there = tuple(Device(index, str(index), size * GiB, GiB // 2) for index, size in enumerate((8, 24)))
    monkeypatch.setattr("vllmd.gpu.present.present", lambda config: there)
    file.write_text(f"models:\n  m:\n    tensor_parallel_size: {ranks}\n")
    assert main(["assign", "m", "--gpu-memory", "12GiB"]) == 78
    assert capsys.readouterr().err == f"vllmctl: nothing was changed, for m could never be loaded: {why}\n"


def test_assign_heeds_no_variable_of_the_shell(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it hides from the programs of the operator is the daemon's all the same."""
    environments: list[dict[str, str]] = []

    def open_devices(config: object, env: dict[str, str]) -> NoDevices:
        environments.append(env)
        return NoDevices("")

    monkeypatch.setattr("vllmd.gpu.present.open_devices", open_devices)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert main(["assign", "Qwen3-0.6B", "--devices", "0"]) == 0
    assert environments == [{}]


def test_assign_mends_one_of_two_models_that_can_never_be_loaded(file: Path) -> None:
    """The other one is in nobody's way, as when the daemon reads the file; a third one is assigned all the same."""
    file.write_text(
        "devices: [{memory: 8GiB}]\nmodels:\n  a: {gpu_memory: 20GiB}\n  b: {gpu_memory: 30GiB}\n  c: {pin: true}\n"
    )
    assert main(["assign", "c", "--gpu-memory", "1GiB"]) == 0
    assert main(["assign", "a", "--gpu-memory", "9GiB"]) == 78
    for name in "ba":
        assert main(["assign", name, "--gpu-memory", "4GiB"]) == 0
    assert load(file, env={}).warnings == ()


def test_assign_asks_only_the_devices_of_this_machine(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of another host is no matter of theirs; for one that takes too many their number is the reason."""
    monkeypatch.setattr("vllmd.gpu.present.present", lambda config: (Device(0, "0", 8 * GiB, GiB // 2),))
    file.write_text("models:\n  far: {host: elsewhere.example}\n  two: {tensor_parallel_size: 2}\n")
    assert main(["assign", "far", "--devices", "3", "--gpu-memory", "20GiB"]) == 0
    capsys.readouterr()
    assert main(["assign", "two", "--devices", "auto"]) == 78
    needs = "it needs 2 devices, and there is 1 for it (tensor_parallel_size times pipeline_parallel_size)"
    assert capsys.readouterr().err.endswith(f"two could never be loaded: {needs}\n")


def test_assign_on_a_full_disk_leaves_the_file(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced in one step or not at all."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = file.read_text()
    assert main(["assign", "Qwen3-0.6B", "--devices", "1"]) == 73
    assert file.read_text() == before
    assert sorted(path.name for path in file.parent.iterdir()) == ["vllmd.yaml"]
    assert capsys.readouterr().err == f"vllmctl: {file} cannot be written: No space left on device; it is as it was\n"


VLLAMA = "Qwen/Qwen3-0.6B: {gpu_memory_utilization: 0.85, devices: [0], extra_args: {}, port: 33301}\n"
PROXY = """\
gpu: {gpu_id: 0}
proxy: {api_key: secret}
models:
  chat: {model_path: meta/Llama, param_count: 7, precision: fp16, warm: true}
"""
SWAP = """\
healthCheckTimeout: 500
macros: {vllm: /opt/vllm/bin/vllm serve}
startPort: 5800
models:
  qwen:
    cmd: ${vllm} Qwen/Qwen3-0.6B --port ${PORT} --max-model-len 4096
    aliases: [q]
    ttl: 300
    env: ["A=b=c"]
    proxy: http://127.0.0.1:9999
  other: {cmd: "llama-server --port ${PORT} -m $HOME/m", checkEndpoint: /ok}
"""


def imported(tmp_path: Path, system: str, text: str) -> Path:
    """The models.d file that ``import`` makes of the text."""
    source, made = tmp_path / "source.yaml", tmp_path / "made" / "vllmd.yaml"
    source.write_text(text)
    made.parent.mkdir()
    assert main(["import", system, str(source), "-o", str(made)]) == 0
    return made


def test_import_vllama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """V's flat file; what is unknown here is said."""
    found = load(imported(tmp_path, "vllama", VLLAMA), env={}).models["Qwen/Qwen3-0.6B"]
    assert (found.gpu_memory, found.devices) == (0.85, (0,))
    assert capsys.readouterr().err == "warning: Qwen/Qwen3-0.6B.port: 33301\n"


def test_import_vllm_proxy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """P's models; where its daemon-wide settings go; no key is printed."""
    found = load(imported(tmp_path, "vllm-proxy", PROXY), env={}).models["chat"]
    assert (found.source, found.param_count, found.precision) == ("meta/Llama", 7.0, "fp16")
    err = capsys.readouterr().err
    assert "gpu.gpu_id: 0; in vllmd.yaml it is defaults.devices\n" in err
    assert "models.chat.warm: True\n" in err
    assert "secret" not in err


def test_import_llama_swap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands that run vLLM become vllm models, others the engine ``command``."""
    config = load(imported(tmp_path, "llama-swap", SWAP), env={})
    found = config.models["qwen"]
    other = config.models["other"]
    assert (other.engine, other.options) == ("command", {"health": "/ok"})
    assert other.command == ("llama-server", "--port", "${PORT}", "-m", "$$HOME/m")
    assert (found.source, found.command, found.aliases) == ("Qwen/Qwen3-0.6B", ("/opt/vllm/bin/vllm",), ("q",))
    assert (found.extra_args, found.env) == (("--max-model-len", "4096"), {"A": "b=c"})
    assert (found.idle.sleep_after, found.idle.stop_after, found.start_timeout) == (None, 300.0, 500.0)
    assert capsys.readouterr().err.splitlines() == [
        "warning: startPort: 5800",
        "warning: models.qwen.proxy: http://127.0.0.1:9999",
    ]


WRONG = [
    ("vllama", "- a\n", 65, "this is no configuration of vllama: it is not a mapping"),
    ("vllama", "a: [\n", 65, "line 2: not valid YAML"),
    ("vllm-proxy", "models: [1]\n", 65, "the models are not a mapping"),
    ("llama-swap", "models: {a: {}}\n", 65, "models.a: cmd is missing"),
    ("llama-swap", "{}\n", 65, "there are no models in it"),
]


@pytest.mark.parametrize(("system", "text", "code", "message"), WRONG)
def test_import_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], system: str, text: str, code: int, message: str
) -> None:
    """What it is not, in words."""
    source = tmp_path / "source.yaml"
    source.write_text(text)
    assert main(["import", system, str(source)]) == code
    assert capsys.readouterr().err == f"vllmctl: {source}: {message}\n"


def test_import_never_overwrites_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An existing file is the administrator's; a missing source is named."""
    source = tmp_path / "source.yaml"
    source.write_text(VLLAMA)
    assert main(["import", "vllama", str(source), "-o", str(source)]) == 73
    assert "exists; --force overwrites it" in capsys.readouterr().err
    assert main(["import", "vllama", str(tmp_path / "none")]) == 66
    assert capsys.readouterr().err == f"vllmctl: there is no {tmp_path}/none\n"

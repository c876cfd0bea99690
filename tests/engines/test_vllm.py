"""The vllm kind: what it runs, with what, and the calls that mean sleep and wake."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Launch, Place
from vllmd.engines.vllm import SUN_PATH, Vllm, memory_share
from vllmd.errors import ConfigError
from vllmd.sizes import GiB

ON_GPU = Vllm(accelerator=lambda: True)
ON_CPU = Vllm(accelerator=lambda: False)
GPU = Place(Path("/run/x"), ("GPU-a",), 20 * GiB, 80 * GiB)
CPU = Place(Path("/run/x"))


def launch(place: Place = GPU, engine: Vllm = ON_GPU, **settings: object) -> Launch:
    return engine.launch(ModelConfig("m", **settings), place)  # type: ignore[arg-type]


def test_it_serves_on_a_private_socket_under_the_configured_name() -> None:
    """Never on TCP: vLLM's development routes have no key."""
    order = launch(model="org/model")
    assert order.argv[:7] == ("vllm", "serve", "org/model", "--uds", "/run/x/engine.sock", "--served-model-name", "m")
    assert order.listen.uds == "/run/x/engine.sock"


def test_its_environment() -> None:
    """Development mode for the sleep calls, its own sockets in the run directory, only its devices, its token."""
    env = launch(Place(Path("/run/x"), ("GPU-a", "GPU-b"), GiB, 2 * GiB), hf_token="hf_x").env
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert env["VLLM_RPC_BASE_PATH"] == "/run/x"
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("GPU-a,GPU-b", "PCI_BUS_ID")
    assert env["HF_TOKEN"] == "hf_x"


@pytest.mark.parametrize(
    ("version", "told", "refused"),
    [
        ("0.22.0", "0,1", False),
        ("0.22.0", "GPU-a,GPU-b", True),
        ("0.23.1", "MIG-a", True),
        ("0.24.0", "GPU-a,GPU-b", False),
        ("0.33.0rc1", "MIG-a", False),
        ("nightly", "GPU-a", False),  # nobody knows: its own words tell
    ],
)
def test_a_version_that_takes_numbers_alone_is_not_given_ids(
    version: str, told: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would die of them a minute later, in int()."""
    python = tmp_path / "vllm" / version / "bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    place = Place(Path("/run/x"), tuple(told.split(",")), GiB, 2 * GiB, visible={"CUDA_VISIBLE_DEVICES": told})
    if refused:
        with pytest.raises(ConfigError, match=r"takes devices by their numbers alone.*engine install"):
            launch(place)
    else:
        assert launch(place).env["CUDA_VISIBLE_DEVICES"] == told


def test_without_a_token_or_devices_it_gets_neither() -> None:
    """A token reaches the engine it was configured for and no other."""
    assert {"HF_TOKEN", "CUDA_VISIBLE_DEVICES"}.isdisjoint(launch(CPU).env)


@pytest.mark.parametrize(
    ("command", "start"),
    [
        ((), ("vllm", "serve", "m")),
        (("/opt/vllm/bin/vllm",), ("/opt/vllm/bin/vllm", "serve", "m")),
        (("vllm", "serve"), ("vllm", "serve", "m")),
        (("python", "-m", "vllm.server"), ("python", "-m", "vllm.server", "--model", "m")),
        (("python", "-m", "vllmd.simengine", "serve"), ("python", "-m", "vllmd.simengine", "serve", "m")),
    ],
)
def test_the_command_is_configurable(command: tuple[str, ...], start: tuple[str, ...]) -> None:
    """A virtual environment's program, a module (which takes the model by flag), a wrapper."""
    assert launch(command=command).argv[: len(start)] == start


def test_the_models_settings_become_flags() -> None:
    """Each only if it says something."""
    argv = launch(
        tensor_parallel_size=2, pipeline_parallel_size=3, dtype="half", max_model_len=512, trust_remote_code=True,
        extra_args=("--seed", "1"), gpu_memory=0.5,
    ).argv  # fmt: skip
    assert argv[7:] == (
        "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3", "--dtype", "half", "--max-model-len", "512",
        "--trust-remote-code", "--gpu-memory-utilization", "0.5", "--enable-sleep-mode", "--seed", "1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("configured", "place", "share"),
    [
        (0.9, GPU, 0.9),
        (None, GPU, 0.25),
        (20 * GiB, GPU, 0.25),
        (None, Place(Path("/r"), ("0",), 2 * GiB, 3 * GiB), 0.6666),
        (None, Place(Path("/r"), ("0",), 0, 80 * GiB), None),
        (0.9, CPU, None),
    ],
)
def test_the_share_of_memory(configured: float | int | None, place: Place, share: float | None) -> None:
    """Literal where configured as a share; else what was promised, rounded down; on a CPU it would mean host memory."""
    assert memory_share(ModelConfig("m", gpu_memory=configured), place) == share


def test_an_own_utilization_among_the_extra_arguments_wins() -> None:
    """Two of the same flag would be a guess of vLLM's."""
    argv = launch(extra_args=("--gpu-memory-utilization=0.3",)).argv
    assert [part for part in argv if part.startswith("--gpu-memory")] == ["--gpu-memory-utilization=0.3"]


def test_a_cache_of_fixed_size_keeps_the_utilization() -> None:
    """vLLM's check of free memory uses the utilization even then."""
    argv = launch(options={"kv_cache_memory": "8GiB"}).argv
    assert argv[argv.index("--kv-cache-memory-bytes") + 1] == str(8 * GiB)
    assert "--gpu-memory-utilization" in argv


@pytest.mark.parametrize(
    ("engine", "sleep_mode", "flag", "levels", "passed"),
    [
        (ON_GPU, None, "auto", {1, 2}, True),
        (ON_GPU, False, "auto", set(), False),
        (ON_CPU, None, "auto", set(), False),
        (ON_CPU, True, "auto", {1, 2}, False),
        (ON_CPU, True, "always", {1, 2}, True),
        (ON_GPU, True, "never", {1, 2}, False),
    ],
)
def test_when_it_can_sleep_and_when_the_flag_is_passed(
    engine: Vllm, sleep_mode: bool | None, flag: str, levels: set[int], passed: bool
) -> None:
    """The flag ends vLLM on a CPU, where the calls still pause and answer: they can be rehearsed there."""
    model = ModelConfig("m", sleep_mode=sleep_mode, options={"sleep_flag": flag})
    assert engine.sleep_levels(model) == levels
    assert ("--enable-sleep-mode" in engine.launch(model, GPU).argv) is passed


def test_a_path_too_long_for_a_socket_is_refused_before_the_start() -> None:
    """vLLM would fail after loading for minutes; its own sockets are longer by a UUID."""
    fits = Path("/" + "r" * (SUN_PATH - 1 - 37))
    assert launch(Place(fits)).env["VLLM_RPC_BASE_PATH"] == str(fits)
    with pytest.raises(ConfigError, match=r"a\.yaml:2: the socket path .* has 108 bytes, at most 107 are possible"):
        launch(Place(Path(f"{fits}r")), where="a.yaml:2")


def test_own_sockets_may_live_elsewhere() -> None:
    """A way out when the run directory is deep."""
    deep = Place(Path("/" + "r" * 90))
    assert launch(deep, options={"rpc_dir": "/tmp"}).env["VLLM_RPC_BASE_PATH"] == "/tmp"


def test_an_unknown_option_names_the_nearest() -> None:
    """With the file, the key and what is known."""
    with pytest.raises(ConfigError) as error:
        launch(options={"sleep_flags": "auto"}, where="a.yaml:9")
    assert error.value.message.startswith(
        "a.yaml:9: models.m.options.sleep_flags: unknown option; did you mean sleep_flag? (known: "
    )


@pytest.mark.parametrize("options", [{"sleep_flag": "maybe"}, {"kv_cache_memory": "much"}, {"kv_cache_memory": True}])
def test_a_wrong_option_says_what_is_right(options: dict[str, object]) -> None:
    """Not passed on for vLLM to stumble over."""
    with pytest.raises(ConfigError, match=r"models\.m\.options\.\w+: .*(right are|such as)"):
        launch(options=options)


def test_sleeping_waits_for_what_runs_or_freezes_it() -> None:
    """Never vLLM's default mode, which cuts answers under status 200."""
    assert [call.path for call in ON_GPU.sleep(1, freeze=False)] == ["/sleep?level=1&mode=wait"]
    assert [call.path for call in ON_GPU.sleep(2, freeze=True)] == ["/sleep?level=2&mode=keep"]


def test_waking_from_level_2_reloads_the_weights_between_the_tags() -> None:
    """Any other order serves garbage."""
    calls = ON_GPU.wake(2)
    assert [call.path for call in calls if not call.optional] == [
        "/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache",
    ]  # fmt: skip
    assert calls[1].json == {"method": "reload_weights"}


def test_waking_from_level_1_is_one_call() -> None:
    """The weights come back from host memory."""
    assert [call.path for call in ON_GPU.wake(1)] == ["/wake_up"]


def test_probes_never_touch_the_model() -> None:
    """A request to a sleeper would hang."""
    asleep = ON_GPU.asleep()
    assert asleep is not None
    assert (ON_GPU.ready(ModelConfig("m")).path, asleep.path) == ("/health", "/is_sleeping")


@pytest.mark.parametrize("runner", [(), ("--runner", "pooling")])
def test_it_lists_the_route_of_embeddings(runner: tuple[str, ...]) -> None:
    """Whatever it is started for: which of them a model serves vLLM says itself once it runs."""
    assert "/v1/embeddings" in ON_CPU.routes(ModelConfig("m", extra_args=runner))


def test_development_routes_are_not_public() -> None:
    """/sleep for everybody would be a way to stop everybody's work."""
    public = ON_GPU.routes(ModelConfig("m"))
    assert {"/v1/chat/completions", "/v1/embeddings", "/v1/realtime", "/tokenize"} <= public
    assert {"/sleep", "/wake_up", "/collective_rpc", "/server_info", "/pause"}.isdisjoint(public)

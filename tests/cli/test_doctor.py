"""``vllmctl doctor`` on machines that are ill in known ways."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fake_daemon import fake_daemon, model, status
from tests.gpu.trees import write
from vllmd.cli import examine_devices, main
from vllmd.cli.examine import accounts, configuration, driver, memory, place, python, systemd, units
from vllmd.cli.examine_engines import vllm_on_cpu
from vllmd.cli.examined import Host
from vllmd.cli.verbs.doctor import is_known
from vllmd.config import loader
from vllmd.config.findings import Reading
from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device
from vllmd.engines import vllm_cpu
from vllmd.gpu import DeviceSample, NoDevices, Sample, Trouble, Unanswered


def machine(root: Path, answers: dict[str, str] | None = None, **over: Any) -> Host:
    """A machine below ``root`` on which commands answer from a table, by their last words."""

    def run(*command: str) -> str:
        line = " ".join(command)
        return next((answer for end, answer in (answers or {}).items() if line.endswith(end)), "")

    settings: dict[str, Any] = {"run": run, "has_module": lambda name: True, "devices": lambda here: NoDevices("none")}
    return Host(root=root, **{**settings, **over})


def make(root: Path, *paths: str) -> None:
    """Files, and directories where a path ends with a slash; open to everybody."""
    for path in paths:
        target = root / path.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            target.mkdir(exist_ok=True)
        else:
            target.write_text("")
            target.chmod(0o666)


SOCKETS = ("/run/vllmd/admin.sock", "/run/vllmd/read.sock")
WELL = {
    "systemctl --version": "systemd 252 (252.39-1~deb12u1)",
    "is-active vllmd.socket": "active",
    "is-active vllmd-admin.socket": "active",
    "is-active vllmd-read.socket": "active",
    "is-active vllmd-installer.socket": "active",
    "is-active vllmd-launcher.socket": "active",
}


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    """Nothing but ok."""
    make(tmp_path, "/run/systemd/system/", "/sys/fs/cgroup/cgroup.controllers", "/var/lib/vllmd-engine/")
    make(tmp_path, "/run/vllmd/", "/run/vllmd-engine/", "/var/lib/vllmd-engines/")
    make(tmp_path, *SOCKETS)
    make(tmp_path, "/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/etc/passwd")
    (tmp_path / "etc/passwd").write_text("vllmd:x:1:1\nvllmd-engine:x:2:2\n")
    host = machine(tmp_path, WELL)
    found = [f for question in (python, systemd, units, accounts, driver) for f in question(host)]
    assert {verdict for verdict, _, _ in found} == {"ok"}


def test_what_the_package_made_and_somebody_removed(tmp_path: Path) -> None:
    """Folders, groups and sockets' files, each with the command that makes it again."""
    make(tmp_path, "/run/systemd/system/", "/sys/fs/cgroup/cgroup.controllers", "/etc/passwd", "/etc/group")
    (tmp_path / "etc/passwd").write_text("vllmd:x:1:1\nvllmd-engine:x:2:2\n")
    (tmp_path / "etc/group").write_text("vllmd:x:1:\nvllmd-read:x:2:\nvllmd-admin:x:2:\n")
    make(tmp_path, "/run/vllmd/", "/run/vllmd/read.sock", "/var/lib/vllmd-engine/", "/var/lib/vllmd-engines/")
    host = machine(tmp_path, WELL)
    assert [f for question in (units, accounts) for f in question(host) if f[0] != "ok"] == [
        ("bad", "vllmd-admin.socket listens at /run/vllmd/admin.sock, which is not there any more",
         "systemctl restart vllmd-admin.socket"),
        ("bad", "there is no group vllmd-sockets", "systemd-sysusers, then systemctl restart vllmd.socket"),
        ("bad", "/run/vllmd-engine is missing", "systemd-tmpfiles --create"),
    ]  # fmt: skip


def test_packages_that_are_missing(tmp_path: Path) -> None:
    """With the command that installs them."""
    host = machine(tmp_path, has_module=lambda name: name not in ("h11", "pystemd"))
    assert list(python(host)) == [
        ("bad", "Python packages are missing: python3-h11, python3-pystemd", "apt install python3-h11 python3-pystemd")
    ]


def test_an_old_systemd_without_unified_control_groups(tmp_path: Path) -> None:
    """Both are said."""
    make(tmp_path, "/run/systemd/system/", *SOCKETS)
    assert [what for _, what, _ in systemd(machine(tmp_path, {"--version": "systemd 247 (247.3)"}))] == [
        "systemd is version 247",
        "control groups are of version 1: no engine can be started",
    ]


def test_hybrid_control_groups_are_a_warning(tmp_path: Path) -> None:
    """Engines run there; some limits do nothing."""
    make(tmp_path, "/run/systemd/system/", *SOCKETS, "/sys/fs/cgroup/unified/cgroup.controllers")
    host = machine(tmp_path, {"--version": "systemd 252 (252)"})
    assert [(verdict, "oom_policy" in what) for verdict, what, _ in systemd(host)] == [("ok", False), ("warning", True)]


def test_no_systemd_is_no_fault(tmp_path: Path) -> None:
    """A container works, with the fallback."""
    assert [verdict for verdict, _, _ in systemd(machine(tmp_path))] == ["warning"]
    assert list(units(machine(tmp_path))) == []


def test_sockets_that_do_not_listen_failed_units_and_leftovers(tmp_path: Path) -> None:
    """Each with the command that helps."""
    make(tmp_path, "/run/systemd/system/", *SOCKETS)
    answers = {
        **WELL,
        "is-active vllmd.socket": "inactive",
        "is-failed vllmd.service": "failed",
        "vllmd-model-*.scope": "vllmd-model-q-1.scope loaded active running x",
    }
    found = [finding for finding in units(machine(tmp_path, answers)) if finding[0] != "ok"]
    assert found == [
        ("bad", "vllmd.socket is inactive", "systemctl enable --now vllmd.socket"),
        ("bad", "vllmd.service has failed", "journalctl -u vllmd.service, then systemctl reset-failed vllmd.service"),
        ("warning", "1 engines run, but no daemon manages them: vllmd-model-q-1.scope",
         "the next request or systemctl start vllmd takes them over"),
    ]  # fmt: skip


def test_users_that_are_missing(tmp_path: Path) -> None:
    """For the system's daemon only; a user's own needs none."""
    make(tmp_path, "/run/systemd/system/", *SOCKETS)
    assert [what for _, what, _ in accounts(machine(tmp_path))] == [
        "there is no user vllmd",
        "there is no user vllmd-engine",
    ]
    assert list(accounts(machine(tmp_path, user=True))) == []


def test_a_machine_without_a_gpu_is_fine_where_devices_are_declared(tmp_path: Path) -> None:
    """What was advised has been done."""
    (tmp_path / "vllmd.yaml").write_text("devices: [{memory: 80GiB}]")
    env = {"VLLMD_CONFIG": str(tmp_path / "vllmd.yaml")}
    assert list(driver(machine(tmp_path, env=env))) == []
    (tmp_path / "vllmd.yaml").write_text("")
    assert [verdict for verdict, _, _ in driver(machine(tmp_path, env=env))] == ["warning"]


def test_a_program_that_is_missing_is_said_once() -> None:
    """It was looked for; that the start failed for want of it says nothing more."""
    what = "m has failed: there is no command 'vllm': looked in /usr/bin"
    assert is_known(("bad", what, ""), "m: there is no command 'vllm' for vllmd-engine: looked in /usr/bin")
    assert not is_known(("bad", what, ""), "n: there is no command 'vllm' for vllmd-engine: looked in /usr/bin")
    assert not is_known(("bad", "m has failed: out of memory", ""), "m: there is no command 'vllm'")


def test_a_model_that_can_never_fit_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a file declares the devices the configuration's finding has it, be it of a replica; others are told."""
    (tmp_path / "vllmd.yaml").write_text(
        "devices: [{memory: 80GiB}]\n"
        "models:\n  org/m: {gpu_memory: 90GiB}\n  org/r: {replicas: {of: [{devices: [3]}]}}\n  org/n: {}\n"
    )
    monkeypatch.setenv("VLLMD_CONFIG", str(tmp_path / "vllmd.yaml"))
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    told = status(*(model(name, never="it needs 90 GiB") for name in ("org/m", "org/r", "org/n")))
    with fake_daemon({"GET /admin/status": (200, told)}, tmp_path / "admin.sock"):
        assert main(["doctor"]) == 69
    said = capsys.readouterr().out
    assert [name for name in ("org/m", "org/r", "org/n") if f"{name} can never be loaded" in said] == ["org/n"]


def test_a_driver_without_its_device_nodes(tmp_path: Path) -> None:
    """The engines may not load the module by themselves."""
    make(tmp_path, "/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/nvidiactl")
    (tmp_path / "dev/nvidia0").chmod(0o600)
    assert [what for verdict, what, _ in driver(machine(tmp_path)) if verdict == "bad"] == [
        "/dev/nvidia0 is not open to everybody",
        "/dev/nvidia-uvm is missing",
    ]


def findings(tmp_path: Path, **files: str) -> dict[str, str]:
    """What is wrong with the GPUs of a machine with these files, and the command that mends it."""
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o666)
    return {what: advice for verdict, what, advice in driver(machine(tmp_path)) if verdict == "bad"}


CARD = {"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n", "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n"}
NVIDIA = {"proc/driver/nvidia/version": "", "dev/nvidia0": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""}


def test_a_card_whose_driver_is_not_loaded(tmp_path: Path) -> None:
    """Not a machine without a GPU."""
    ((what, advice),) = findings(tmp_path, **CARD).items()
    assert "NVIDIA card at 0000:01:00.0, but its driver is not loaded" in what
    assert advice.startswith("modprobe nvidia")


def test_a_driver_upgrade_without_a_reboot(tmp_path: Path) -> None:
    """NVML refuses then; the numbers of module and library tell why."""
    library = {"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.2": "", "sys/module/nvidia/version": "570.1\n"}
    found = findings(tmp_path, **NVIDIA, **library)
    assert found == {"the driver was upgraded: module 570.1 is loaded, the library is 580.2": "reboot"}


def test_wsl_without_windows_library(tmp_path: Path) -> None:
    """/dev/dxg is all that there is of the GPU."""
    assert next(iter(findings(tmp_path, **{"dev/dxg": ""}).values())).startswith("wsl --update")
    assert findings(tmp_path, **{"usr/lib/wsl/lib/libnvidia-ml.so.1": ""}) == {}


def test_engines_that_may_not_use_amds_driver(tmp_path: Path) -> None:
    """/dev/kfd and the render nodes belong to the group render, unless they are open to everybody."""
    files = {"dev/kfd": "", "etc/passwd": "vllmd-engine:x:2:2\n", "etc/group": "render:x:105:\n"}
    assert list(findings(tmp_path, **files).values()) == ["udevadm trigger --subsystem-match=drm --subsystem-match=kfd"]
    assert findings(tmp_path, **{"dev/dri/renderD128": ""}) == {}
    (tmp_path / "dev/kfd").chmod(0o660)
    assert list(findings(tmp_path).values()) == ["usermod -aG render,video vllmd-engine"]
    assert findings(tmp_path, **{"etc/group": "render:x:105:other,vllmd-engine\n"}) == {}
    assert list(findings(tmp_path, **{"etc/group": "video:x:44:\n"}).values()) == ["systemd-sysusers"]


def test_a_card_of_amds_whose_driver_is_not_loaded(tmp_path: Path) -> None:
    """And a compute driver without its node."""
    card = {"sys/bus/pci/devices/0000:03:00.0/vendor": "0x1002\n", "sys/bus/pci/devices/0000:03:00.0/class": "0x030000"}
    assert findings(tmp_path, **card) == {}  # a desktop may well do without
    (told,) = [found for found in driver(machine(tmp_path)) if "AMD" in found[1]]
    assert told[0] == "warning" and told[2].startswith("modprobe amdgpu")
    (tmp_path / "sys/class/kfd").mkdir(parents=True)
    ((what, advice),) = findings(tmp_path).items()
    assert "there is no /dev/kfd" in what and advice.startswith("udevadm trigger")


def answering(devices: list[Device], sample: Sample) -> Any:
    """What the daemon would be told."""
    found = NoDevices("")
    found._inventory, found.readable, found.sample = tuple(devices), True, lambda: sample  # type: ignore[method-assign]
    return lambda here: found


def test_each_device_that_answers_is_a_line(tmp_path: Path) -> None:
    """What is wrong with it is said, with the one command."""
    devices = [Device(index, f"GPU-{index}", 80 << 30, name="H100") for index in range(4)]
    hot = DeviceSample(80 << 30, 0, 80 << 30, throttled="hardware thermal slowdown")
    well = DeviceSample(80 << 30, 0, 80 << 30)
    sample = Sample(
        {0: well, 1: hot, 2: well}, {3: "GPU is lost"}, {2: "2 uncorrectable ECC errors"}, {3: "GPU is lost"}
    )
    found = list(driver(machine(tmp_path, devices=answering(devices, sample))))
    assert [(verdict, what.partition(": ")[2], advice.partition(" keeps")[0]) for verdict, what, advice in found] == [
        ("ok", "80GiB", ""),
        ("warning", "it is slowed down: hardware thermal slowdown", "look after its cooling and its power"),
        ("bad", "2 uncorrectable ECC errors", "vllmctl drain 2"),
        ("bad", "GPU is lost", "vllmctl drain 3"),
    ]


def test_devices_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cause and cure; one that hangs keeps nobody from reading the rest."""
    silent = Unanswered("nvml", Trouble("NVML: Driver/library version mismatch", "reboot"))
    assert list(driver(machine(tmp_path, devices=lambda here: silent))) == [
        ("bad", "NVML: Driver/library version mismatch", "reboot")
    ]
    monkeypatch.setattr(examine_devices, "PATIENCE_SECONDS", 0.05)
    stuck = threading.Event()
    ((verdict, what, _),) = driver(machine(tmp_path, devices=lambda here: stuck.wait(60) and NoDevices("")))
    stuck.set()
    assert verdict == "bad" and "has not answered" in what


def test_a_place_that_is_too_narrow(tmp_path: Path) -> None:
    """CPUs, tasks and ports, each with the command that widens it."""
    (tmp_path / "vllmd.yaml").write_text("")
    host = machine(tmp_path, env={"VLLMD_CONFIG": str(tmp_path / "vllmd.yaml")})
    assert list(place(host)) == []
    group = "sys/fs/cgroup"
    write(tmp_path, **{"proc/self/cgroup": "0::/", f"{group}/cpu.max": "50000 100000", f"{group}/pids.max": "100"})
    write(tmp_path, **{"proc/sys/net/ipv4/ip_unprivileged_port_start": "40000"})
    assert [(verdict, what) for verdict, what, _ in place(host)] == [
        ("warning", "control groups leave engines 0.5 of a CPU"),
        ("warning", "only 100 processes and threads may run here; an engine has some hundred"),
        ("bad", "engines' ports 33300-34300 are below 40000, where only root may listen"),
    ]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before a download fails halfway."""
    make(tmp_path, "/var/lib/vllmd-engine/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 29}))
    assert list(memory(machine(tmp_path))) == [
        ("warning", "only 0.5GiB are free in /var/lib/vllmd-engine", "models are kept there")
    ]
    make(tmp_path, "/var/lib/vllmd/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    assert "who used what" in list(memory(machine(tmp_path)))[1][2]


def test_a_configuration_whose_command_and_model_are_missing(tmp_path: Path) -> None:
    """Found without starting anything."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("models: {m: {command: /opt/vllm, model: /srv/m}, h: {engine: sim, model: /home/ann/m}}")
    make(tmp_path, "/home/ann/m/")
    host = machine(tmp_path, env={"VLLMD_CONFIG": str(file)})
    assert [what for verdict, what, _ in configuration(host) if verdict != "ok"] == [
        "m: there is no /srv/m",
        "h: /home/ann/m lies in somebody's home",
        "m: there is no command '/opt/vllm'",
    ]


def test_what_vllm_lacks_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, or no vLLM, it is not asked."""
    monkeypatch.setattr(vllm_cpu, "has_accelerator", lambda: False)
    monkeypatch.setattr(vllm_cpu, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(vllm_cpu, "_LIBRARIES", ("/nowhere",))
    vllm, other = (Config(models={"m": ModelConfig("m", engine=engine)}) for engine in ("vllm", "sim"))
    assert list(vllm_on_cpu(vllm)) == [
        ("bad", "vLLM runs on the CPU here: its worker does not start without libnuma.so.1", "apt install libnuma1"),
        ("warning", "vLLM runs on the CPU here: it runs without compiling (--enforce-eager), which is slower",
         "apt install g++"),
    ]  # fmt: skip
    assert list(vllm_on_cpu(other)) == []
    monkeypatch.setattr(vllm_cpu, "has_accelerator", lambda: True)
    assert list(vllm_on_cpu(vllm)) == []


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, the daemon last; with anything bad the status says so."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("polcy: lru")
    monkeypatch.setenv("VLLMD_CONFIG", str(file))
    told = {**status(), "event_loop": "asyncio"}
    with fake_daemon({"GET /admin/status": (200, told)}, tmp_path / "s"):
        assert main(["doctor", "--socket", str(tmp_path / "s")]) == 69
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "ok       the daemon answers; engines are run by systemd; its event loop is asyncio"
        assert any(line.startswith(f"bad      {file}:1: polcy: there is no such setting") for line in lines)
        main(["doctor", "--json", "--socket", str(tmp_path / "s")])
        assert json.loads(capsys.readouterr().out)[-1]["verdict"] == "ok"


def test_right_after_installing_nothing_is_red(tmp_path: Path) -> None:
    """The launcher's socket is static: it is down until vllmd first runs, and enabling it would do nothing."""
    make(tmp_path, "/run/systemd/system/", *SOCKETS)
    fresh = {**WELL, "is-active vllmd-launcher.socket": "inactive", "is-active vllmd.service": "inactive"}
    assert {verdict for verdict, _, _ in units(machine(tmp_path, fresh))} == {"ok"}
    sick = {**fresh, "is-active vllmd.service": "active"}
    assert [finding for finding in units(machine(tmp_path, sick)) if finding[0] != "ok"] == [
        ("bad", "vllmd-launcher.socket does not listen", "systemctl start vllmd-launcher.socket")
    ]


def test_units_of_a_user(tmp_path: Path) -> None:
    """They have no socket for onlookers, and other commands help."""
    make(tmp_path, "/run/systemd/system/", *SOCKETS)
    answers = {"is-active vllmd.socket": "inactive", "is-active vllmd-admin.socket": "active"}
    found = list(units(machine(tmp_path, answers, user=True)))
    assert found == [
        ("bad", "vllmd.socket is inactive", "systemctl --user enable --now vllmd.socket"),
        ("ok", "vllmd-admin.socket listens", ""),
    ]


def test_units_that_are_not_installed(tmp_path: Path) -> None:
    """systemctl calls them inactive, too, and cannot enable them."""
    make(tmp_path, "/run/systemd/system/", *SOCKETS)
    answers = {"is-active vllmd.socket": "inactive", "--value vllmd.socket": "not-found", **WELL}
    answers["is-active vllmd.socket"] = "inactive"
    found = [finding for finding in units(machine(tmp_path, answers)) if finding[0] == "bad"]
    assert found == [("bad", "vllmd.socket is not installed", "install vllmd anew")]


def test_a_file_that_the_daemon_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor, who is root, can."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("models: {}")
    monkeypatch.setenv("VLLMD_CONFIG", str(file))
    host = machine(tmp_path, readable_by=lambda user, path: user != "vllmd")
    assert (
        "bad",
        f"the daemon's user vllmd cannot read {file}",
        f"chown root:vllmd {file} && chmod 640 {file}",
    ) in list(configuration(host))


def test_the_configuration_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ten thousand models that takes a second; and what is found is found of one and the same."""
    (tmp_path / "vllmd.yaml").write_text("devices: [{memory: 80GiB}]\nmodels: {m: {}}\n")
    monkeypatch.setenv("VLLMD_CONFIG", str(tmp_path / "vllmd.yaml"))
    readings, read = list[object](), loader.read

    def counted(*given: Any, **more: Any) -> Reading:
        readings.append(given)
        return read(*given, **more)

    monkeypatch.setattr(loader, "read", counted)
    with fake_daemon({"GET /admin/status": (200, status())}, tmp_path / "s"):
        main(["doctor", "--socket", str(tmp_path / "s")])
    assert len(readings) == 1
    assert "with 1 models" in capsys.readouterr().out


def test_models_and_devices_that_are_not_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that has failed or can never fit, and a device that is avoided, are what the doctor is asked about."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    told = status(model("bad", "error", failure="it died\nTraceback"), model("big", failure="it needs 90 GiB"))
    told["devices"][0]["wedged"] = "1 GiB did not come back"
    with fake_daemon({"GET /admin/status": (200, told)}, tmp_path / "admin.sock"):
        assert main(["doctor"]) == 69
    said = capsys.readouterr().out
    assert "bad      bad has failed: it died; vllmctl why bad; vllmctl logs bad\n" in said
    assert "bad      big cannot be loaded: it needs 90 GiB\n" in said
    assert "bad      device 0 is avoided: 1 GiB did not come back; vllmctl gpus\n" in said


@pytest.mark.parametrize(
    ("line", "code"),
    [({"state": "stopped"}, 0), ({"state": "stopped", "never": "it needs 90 GiB"}, 69), ({"state": "error"}, 69)],
)
def test_status_of_a_model_says_by_its_exit_whether_it_can_be_used(
    line: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script asks for no more: a model that can never be loaded answers as few requests as one that has failed."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    with fake_daemon({"GET /admin/status": (200, status(model("m", **line)))}, tmp_path / "admin.sock"):
        assert main(["status", "m"]) == code

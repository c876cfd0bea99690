"""The container images, built by buildah as their files say and run once: a real model answers (`make images`).

It takes minutes and the network (Debian's packages, PyPI), so it is no part of `make check`. What is not as their users
have it: the base image is the tests' own Debian, as there may be no registry of images; the engine is llama.cpp, by the
build arguments that the files offer; nothing isolates the steps of the build but chroot; and the image with systemd is
booted by systemd-nspawn.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RealLlama
from tests.machine import container
from tests.machine.container import REPOSITORY, Machine
from tests.packaging.test_install import SMOLLM2, answers

pytestmark = pytest.mark.images
LIMIT = 1800.0  # seconds for a build
BASE = "localhost/vllmd-tests-debian"
ARGUMENTS = ("--build-arg=ENGINE=llama.cpp", "--build-arg=BUILD=cpu")
ASK = {
    "model": "smollm2",
    "max_tokens": 12,
    "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
}


def buildah(*argv: str, timeout: float = LIMIT) -> str:
    done = subprocess.run(["buildah", *argv], capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)
    assert done.returncode == 0, f"buildah {shlex.join(argv)}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """The tests' Debian 12 as an image."""
    if os.geteuid() != 0:
        pytest.skip("building images needs root")
    made = buildah("from", "scratch")
    folder = buildah("mount", made)
    subprocess.run(["cp", "-a", f"{container.cache()}/tree-bookworm/.", folder], check=True)
    buildah("umount", made)
    buildah("commit", "--rm", made, BASE)
    yield BASE
    buildah("rmi", "--force", BASE)


@pytest.fixture
def image(base: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The container made of an image that is built of the file named by the test's parameter."""
    name = f"localhost/vllmd-tests-{request.param.lower()}"
    # What this machine needs to reach the network is no part of the files: it is lent to the steps.
    lent = [f"--volume={path}:{path}:ro" for path in ("/etc/resolv.conf", "/etc/ssl/certs") if Path(path).exists()]
    file = f"packaging/container/{request.param}"
    buildah(
        "build", "--isolation=chroot", f"--from={base}", "--pull-never", *ARGUMENTS, *lent, "-f", file, "-t", name, "."
    )
    made = buildah("from", "--pull-never", name)
    yield made
    buildah("rm", made)
    buildah("rmi", "--force", name)


@pytest.mark.parametrize("image", ["Containerfile.plain"], indirect=True)
def test_the_plain_image_answers(image: str, llama: RealLlama, tmp_path: Path) -> None:
    """Its user, its entry point, its command, but for the port."""
    settings = json.loads(buildah("inspect", "--type=container", image))["OCIv1"]["config"]
    (tmp_path / "vllmd.yaml").write_text(SMOLLM2)
    binds = [f"--volume={tmp_path}/vllmd.yaml:/etc/vllmd/vllmd.yaml:ro", f"--volume={llama.model}:/srv/smollm2.gguf:ro"]
    command = [*settings["Entrypoint"], *settings["Cmd"][:-1], "18258"]
    with subprocess.Popen(
        ["buildah", "run", "--isolation=chroot", *binds, image, "--", *command], stderr=subprocess.PIPE, text=True
    ) as served:
        try:
            assert "The capital of France is Paris." in _asked(18258, served)
        finally:
            inside = subprocess.run(["pgrep", "-f", "vllmd serve --host 0.0.0.0 --port 18258"],
                                    capture_output=True, text=True).stdout.split()  # fmt: skip
            for pid in inside:
                subprocess.run(["kill", pid], check=False)
            served.wait(120)


def _asked(port: int, served: subprocess.Popen[str]) -> str:
    """The answer, once somebody listens."""
    end = time.monotonic() + 120
    while time.monotonic() < end and served.poll() is None:
        done = subprocess.run(
            ["curl", "-sS", "--max-time", "120", f"http://127.0.0.1:{port}/v1/chat/completions", "-H",
             "Content-Type: application/json", "-d", json.dumps(ASK)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout
        time.sleep(0.2)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("image", ["Containerfile"], indirect=True)
def test_the_image_with_systemd_answers(image: str, package: Path, llama: RealLlama) -> None:
    """Booted: the socket listens, the first request wakes the daemon, and another engine can be installed beside."""
    machine = Machine(binds={llama.model: "/srv/smollm2.gguf"}, lower=buildah("mount", image))
    try:
        machine.boot()
        machine.write("/etc/vllmd/vllmd.yaml", SMOLLM2)
        assert machine.run("systemctl is-active vllmd.socket").stdout.strip() == "active"
        assert answers(machine, 33258)
        assert "cpu" in machine.out("vllmctl engine list")
        assert machine.run("vllmctl engine rollback llama.cpp", check=False).returncode == 65
        machine.stop()
    finally:
        machine.remove()
        buildah("umount", image)

"""A real vLLM (on the CPU, with a tiny model) behind an installed vllmd, for all tests here that want one.

One start of vLLM takes half a minute, so they share a machine and its two engines: a model that generates, and the same
model as one that embeds. A third one can never start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import booted_or_skip
from tests.e2e.site import BASE, Site
from tests.machine import container
from tests.machine.container import MODEL_INSIDE, VLLM_INSIDE
from tests.vllm_on_cpu import ENV, FORKING

START_LIMIT = 840.0  # seconds; two engines at once, on a machine that others use, too
FORKING_INSIDE = "/opt/forking"

# stream_interval: a chunk has four tokens, so that how vLLM cuts a stream hardly depends on the timing.
CONFIG = f"""
server: {{idle_exit: never}}
idle: {{sleep_after: never, stop_after: never}}
devices: []
models:
  lab/tiny:
    engine: vllm
    command: [{VLLM_INSIDE}/bin/vllm]
    model: {MODEL_INSIDE}
    max_model_len: 512
    sleep_mode: true
    extra_args:
      enforce_eager: true
      max_num_seqs: 8
      stream_interval: 4
      enable_auto_tool_choice: true
      tool_call_parser: hermes
      structured_outputs_config: '{{"backend": "xgrammar", "disable_any_whitespace": true}}'
    env: {json.dumps({**ENV, "VLLM_ENABLE_RESPONSES_API_STORE": "1"})}
    start_timeout: 14m
    queue_timeout: 14m
  lab/embedder:
    engine: vllm
    command: [{VLLM_INSIDE}/bin/vllm]
    model: {MODEL_INSIDE}
    max_model_len: 512
    extra_args: {{runner: pooling, enforce_eager: true, max_num_seqs: 8}}
    env: {json.dumps({**ENV, "PYTHONPATH": FORKING_INSIDE})}
    start_timeout: 14m
    queue_timeout: 14m
  lab/wrong:
    engine: vllm
    command: [{VLLM_INSIDE}/bin/vllm]
    model: /no/such/model
    env: {json.dumps(ENV)}
"""


@pytest.fixture(scope="session")
def vllm_site(package: Path) -> Iterator[Site]:
    """The machine, with nothing loaded yet."""
    if len(container.vllm_binds()) < 2:
        pytest.skip("no vLLM environment or no tiny model here (packaging/dev/setup vllm model)")
    with booted_or_skip() as machine:
        container.install(machine, package)
        machine.copy_in(FORKING / "sitecustomize.py", f"{FORKING_INSIDE}/sitecustomize.py")
        site = Site(machine)
        site.configure(CONFIG)
        yield site
        machine.run("systemctl stop vllmd.service", check=False)


@pytest.fixture(scope="session")
def loaded_site(vllm_site: Site) -> Site:
    """Both engines have been started, by a first request to each at the same time; the first as at users' machines."""
    requests = [("completions", {"model": "lab/tiny", "prompt": "a", "max_tokens": 1})]
    requests += [("embeddings", {"model": "lab/embedder", "input": "a"})]
    lines = [f"curl -sf {BASE}/v1/{path} --json '{json.dumps(body)}'" for path, body in requests]
    for process in [vllm_site.machine.popen(line) for line in lines]:
        said, _ = process.communicate(timeout=START_LIMIT)
        assert process.returncode == 0, said + vllm_site.machine.journal()[-20000:]
    return vllm_site

"""The plainest daemon there is: one engine started and called as its kind says."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence

import httpx

from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of
from vllmd.engines.base import Call, Place

LIMIT = 60.0  # seconds for anything that the stand-in does


class Driven:
    """An engine started and called as the contract says, by the plainest daemon there is."""

    def __init__(self, model: ModelConfig, place: Place, limit: float = LIMIT) -> None:
        self.model, self.engine, self.limit = model, engine_of(model), limit
        launch = self.engine.launch(model, place)
        self.log = place.run_dir / "log"
        with self.log.open("wb") as log:
            env = os.environ | dict(launch.env) | dict(model.env)
            self.popen = subprocess.Popen(
                launch.argv, stdout=log, stderr=log, env=env, cwd=launch.cwd or None, start_new_session=True
            )
        self.launch = launch
        # Engines close idle connections after 5 s, as httpx does: whoever keeps none cannot meet that moment.
        once = httpx.Limits(max_keepalive_connections=0)
        transport = httpx.HTTPTransport(uds=launch.listen.uds or None, limits=once)
        base = "http://engine" if launch.listen.uds else f"http://{launch.listen.host}:{launch.listen.port}"
        key = {"Authorization": f"Bearer {launch.listen.key}"} if launch.listen.key else {}
        self.http = httpx.Client(transport=transport, base_url=base, timeout=limit, headers=key)

    def call(self, call: Call) -> httpx.Response:
        response = self.http.request(call.method, call.path, json=call.json, timeout=call.timeout)
        assert response.status_code == call.expect
        return response

    def call_all(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.call(call)

    def wait_ready(self) -> Driven:
        deadline = time.monotonic() + self.limit
        while not self._is_ready():
            assert self.popen.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def _is_ready(self) -> bool:
        probe = self.engine.ready(self.model)
        try:
            return self.http.request(probe.method, probe.path, timeout=probe.timeout).status_code == probe.expect
        except httpx.ConnectError:
            return False

    def is_asleep(self) -> bool:
        probe = self.engine.asleep()
        assert probe is not None
        return bool(self.call(probe).json()["is_sleeping"])

    def chat(self, model: str = "") -> str:
        body = {
            "model": model or self.engine.served_name(self.model),
            "messages": [{"role": "user", "content": "hello you"}],
        }
        reply = self.http.post("/v1/chat/completions", json=body | {"temperature": 0, "max_tokens": 16})
        return str(reply.json()["choices"][0]["message"]["content"])

    def end(self) -> str:
        """End it as its kind says; what it logged."""
        self.popen.send_signal(self.launch.stop_signal)
        self.popen.wait(self.limit)
        return self.log.read_text()

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def close(self) -> None:
        """End it and all that it started."""
        self.http.close()
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(LIMIT)

"""Stand-ins for the engines that cannot run here: each speaks the part of its HTTP API that its kind relies on.

They are programs: ``python standins.py KIND ARGUMENT...`` takes the real program's
command line, refuses what that does not have, and answers as its documentation says:

- sglang: "SGLang for RL Systems", "Server Arguments" (docs.sglang.io), http_server.py
- triton: tritonserver's protocol extension "Model Repository", "Model Management", KServe's predict protocol v2
- comfyui: server.py and main.py of ComfyUI, comfy/cli_args.py
- tei: text-embeddings-inference's "CLI arguments" and router/src/http/server.rs
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

Answer = tuple[int, object]
Route = Callable[[Any], Answer]


class StandIn:
    """A server with a table of routes; ``POST /standin`` sets what no API of the real one does."""

    FLAGS: ClassVar[Mapping[str, str]] = {}  # its flags; the value says of which kind: text, int, flag

    def __init__(self, argv: list[str]) -> None:
        self.options = self._parse(argv)
        self.calls: list[str] = []
        self.key = ""  # that clients must show, on all paths but those of health
        self.routes: dict[str, Route] = {"GET /standin": lambda body: (200, self.told())}

    def _parse(self, argv: list[str]) -> argparse.Namespace:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for flag, kind in self.FLAGS.items():
            if kind == "flag":
                parser.add_argument(flag, action="store_true")
            else:
                parser.add_argument(flag, type=int if kind == "int" else str)
        return parser.parse_args(argv)

    def told(self) -> object:
        """What it was started with and asked, for the tests."""
        wanted = ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "PROMETHEUS_PORT", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION")
        env = {name: os.environ[name] for name in wanted if name in os.environ}
        return {"options": vars(self.options), "calls": self.calls, "env": env}

    def port(self) -> int:
        return int(self.options.port)

    def answer(self, method: str, path: str, body: Any) -> Answer:
        """By the table; 404 and 405 as web frameworks do."""
        if path != "/standin":
            self.calls.append(f"{method} {path}")
        if route := self.routes.get(f"{method} {path}"):
            return route(body)
        known = any(name.endswith(f" {path}") for name in self.routes)
        return (405, {"detail": "Method Not Allowed"}) if known else (404, {"detail": "Not Found"})


class Sglang(StandIn):
    """Memory saver, health without generation."""

    FLAGS: ClassVar[Mapping[str, str]] = {
        "--model-path": "text",
        "--served-model-name": "text",
        "--host": "text",
        "--port": "int",
        "--dtype": "text",
        "--context-length": "int",
        "--tp-size": "int",
        "--pp-size": "int",
        "--trust-remote-code": "flag",
        "--mem-fraction-static": "text",
        "--enable-memory-saver": "flag",
        "--enable-weights-cpu-backup": "flag",
        "--config": "text",
    }

    def __init__(self, argv: list[str]) -> None:
        super().__init__([word for word in argv if word != "serve"])  # sglang serve
        if self.options.config:  # server_args_config_parser.py: a YAML file of options
            name, _, value = Path(self.options.config).read_text().strip().partition(": ")
            assert self.options.config.endswith(".yaml")
            assert name == "api-key"
            self.key = value
        self.resident = {"weights", "kv_cache"}
        self.garbage = False  # the weights came back without their contents
        self.routes |= {
            "GET /health": lambda body: (200, ""),
            "POST /release_memory_occupation": self.release,
            "POST /resume_memory_occupation": self.resume,
            "POST /update_weights_from_disk": self.update,
            "POST /v1/chat/completions": self.chat,
        }

    def release(self, body: Any) -> Answer:
        if not isinstance(body, dict):
            return 422, {"detail": "a JSON object is required"}
        if not self.options.enable_memory_saver:
            return 400, {"error": {"message": "memory saver is disabled"}}
        self.resident -= set(body.get("tags") or ("weights", "kv_cache"))
        return 200, None

    def resume(self, body: Any) -> Answer:
        if not isinstance(body, dict):
            return 422, {"detail": "a JSON object is required"}
        tags = set(body.get("tags") or ("weights", "kv_cache"))
        self.garbage |= "weights" in tags - self.resident and not self.options.enable_weights_cpu_backup
        self.resident |= tags
        return 200, None

    def update(self, body: Any) -> Answer:
        if "weights" not in self.resident or body.get("model_path") != self.options.model_path:
            return 400, {"success": False, "message": "no weights to update, or no such model"}
        self.garbage = False
        return 200, {"success": True, "message": "Succeeded to update model weights."}

    def chat(self, body: Any) -> Answer:
        if self.resident != {"weights", "kv_cache"}:
            return 500, {"error": "released"}
        if body["model"] != self.options.served_model_name:
            return 404, {"error": f"no model {body['model']}"}
        said = "!!!!" if self.garbage else body["messages"][-1]["content"]
        return 200, {"choices": [{"message": {"role": "assistant", "content": said}}]}


class Triton(StandIn):
    """Explicit model control of the models in a real repository folder."""

    FLAGS: ClassVar[Mapping[str, str]] = {
        "--model-repository": "text",
        "--model-control-mode": "text",
        "--load-model": "text",
        "--http-address": "text",
        "--http-port": "int",
        "--allow-grpc": "text",
        "--allow-metrics": "text",
        "--exit-timeout-secs": "int",
    }

    def __init__(self, argv: list[str]) -> None:
        super().__init__(argv)
        names = sorted(os.listdir(self.options.model_repository))
        wanted = self.options.load_model
        if self.options.model_control_mode != "explicit" or wanted not in names:
            sys.exit(f"error: failed to load '{wanted}', no such model")
        self.loaded = {wanted}
        self.routes |= {
            "GET /v2/health/live": lambda body: (200, ""),
            "POST /v2/repository/index": lambda body: (200, self.index(names)),
        }
        for name in names:
            self.routes |= {
                f"GET /v2/models/{name}/ready": lambda body, name=name: (200 if name in self.loaded else 400, ""),
                f"POST /v2/repository/models/{name}/load": lambda body, name=name: self.load(name),
                f"POST /v2/repository/models/{name}/unload": lambda body, name=name: self.unload(name, body),
                f"POST /v2/models/{name}/infer": lambda body, name=name: self.infer(name, body),
            }

    def port(self) -> int:
        return int(self.options.http_port)

    def index(self, names: list[str]) -> object:
        return [{"name": name, "state": "READY" if name in self.loaded else "UNAVAILABLE"} for name in names]

    def load(self, name: str) -> Answer:
        self.loaded.add(name)
        return 200, ""

    def unload(self, name: str, body: Any) -> Answer:
        parameters = (body or {}).get("parameters", {})
        if not isinstance(parameters.get("unload_dependents", False), bool):
            return 400, {"error": "attempt to access JSON non-boolean as boolean"}
        self.loaded.discard(name)
        return 200, ""

    def infer(self, name: str, body: Any) -> Answer:
        if name not in self.loaded:
            return 400, {"error": f"Request for unknown model: '{name}' is not found"}
        return 200, {"model_name": name, "outputs": body["inputs"]}


class Comfyui(StandIn):
    """A queue whose jobs last until ``POST /standin`` ends them."""

    FLAGS: ClassVar[Mapping[str, str]] = {"--listen": "text", "--port": "int", "--disable-auto-launch": "flag"}

    def __init__(self, argv: list[str]) -> None:
        super().__init__(argv)
        self.running: list[str] = []
        self.freed = 0
        self.free_next = False
        self.routes |= {
            "GET /system_stats": lambda body: (200, {"system": {}, "devices": []}),
            "GET /queue": lambda body: (200, {"queue_running": self.running, "queue_pending": []}),
            "POST /prompt": self.prompt,
            "POST /free": self.free,
            "POST /standin": self.finish,
        }

    def prompt(self, body: Any) -> Answer:
        if "prompt" not in body:
            return 400, {"error": "no prompt", "node_errors": []}
        self.running.append("p1")
        return 200, {"prompt_id": "p1", "number": 1, "node_errors": {}}

    def free(self, body: Any) -> Answer:
        self.free_next = bool(body.get("unload_models") and body.get("free_memory"))
        if not self.running:
            self.freed += self.free_next
        return 200, None

    def finish(self, body: Any) -> Answer:
        self.running.clear()
        self.freed += self.free_next
        return 200, {"freed": self.freed}


class Tei(StandIn):
    """Embeddings of two numbers."""

    FLAGS: ClassVar[Mapping[str, str]] = {
        "--model-id": "text",
        "--served-model-name": "text",
        "--hostname": "text",
        "--port": "int",
        "--dtype": "text",
        "--pooling": "text",
        "--max-batch-tokens": "int",
        "--auto-truncate": "flag",
    }

    def __init__(self, argv: list[str]) -> None:
        super().__init__(argv)
        self.key = os.environ.get("API_KEY", "")
        if self.options.dtype not in (None, "float16", "float32"):
            sys.exit(f"error: invalid value '{self.options.dtype}' for '--dtype <DTYPE>'")
        self.routes |= {
            "GET /health": lambda body: (200, ""),
            "POST /embed": lambda body: (200, [self.embedding(text) for text in _texts(body["inputs"])]),
            "POST /v1/embeddings": self.embeddings,
        }

    def embedding(self, text: str) -> list[float]:
        return [float(len(text)), 1.0]

    def embeddings(self, body: Any) -> Answer:
        data = [
            {"object": "embedding", "index": index, "embedding": self.embedding(text)}
            for index, text in enumerate(_texts(body["input"]))
        ]
        return 200, {"object": "list", "data": data, "model": self.options.served_model_name}


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def serve(one: StandIn) -> None:
    """Until SIGTERM or SIGINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._exchange()

        def do_POST(self) -> None:
            self._exchange()

        def _exchange(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            content: object
            shown = self.headers.get("Authorization") or ""
            if one.key and path != "/health" and shown != f"Bearer {one.key}":
                status, content = 401, {"error": "Unauthorized"}
            else:
                status, content = one.answer(self.command, path, json.loads(data) if data else None)
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", one.port()), Handler)
    server.daemon_threads = True

    def stop(number: int, frame: object) -> None:
        print(f"ends on {signal.Signals(number).name}", flush=True)
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"listening on {one.port()}", flush=True)
    server.serve_forever()


KINDS = {"sglang": Sglang, "triton": Triton, "comfyui": Comfyui, "tei": Tei}

if __name__ == "__main__":
    serve(KINDS[sys.argv[1]](sys.argv[2:]))

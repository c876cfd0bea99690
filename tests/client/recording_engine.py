"""In vLLM's place: writes every body that it gets beside its socket, and answers with a tool call."""

from __future__ import annotations

import json
import socket
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

TOOL_CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        }
    ],
}

SOCKET = Path(sys.argv[sys.argv.index("--uds") + 1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/chat/completions":
            SOCKET.with_name("body.json").write_bytes(body)
        self.answer(ANSWER)

    def answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "unix"


class Server(ThreadingUnixStreamServer):
    address_family = socket.AF_UNIX
    request_queue_size = 100


if __name__ == "__main__":
    Server(str(SOCKET), Handler).serve_forever()

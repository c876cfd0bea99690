"""The documentation is the route table's, valid, and true."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.admin.site import Site, running
from vllmd.admin.openapi import document
from vllmd.admin.page import PAGE
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.routing import Route

CONFIG = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}, {{memory: 80GiB, file: {folder}/gpu1}}]
server: {{idle_exit: never}}
idle: never
auth: {{keys: [{{name: boss, key: b-secret, scopes: [models, admin]}}]}}
models:
  org/tiny: {{engine: sim, aliases: [t], gpu_memory: 20GiB, options: {{load_time: 0.1s}}}}
  org/other: {{engine: sim, gpu_memory: 20GiB, options: {{load_time: 0.1s}}}}
"""
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "unsupported_method,negative_data_rejection"
)
# Streams have no end, a model that programs bring along may run what it likes, models are not made or fetched, and
# whoever drains all devices waits for a model until somebody gives one back.
LEFT_OUT = "/admin/(events|logs|guests|devices|suspend|store/pull)|/api/(create|copy|push|blobs|delete|pull)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with running(folder, CONFIG.format(folder=folder)) as site:
        yield site


def test_it_is_valid_openapi_and_complete(site: Site) -> None:
    """Every operation has a summary, says who may use it, and has its own identifier."""
    schema = site.ask("GET", "/openapi.json").json
    OpenAPIV31SpecValidator(schema).validate()
    operations = [operation for methods in schema["paths"].values() for operation in methods.values()]
    assert len(operations) > 50
    assert all(operation["summary"] and operation["description"] for operation in operations)
    identifiers = [operation["operationId"] for operation in operations]
    assert len(set(identifiers)) == len(identifiers)
    takes = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert takes["application/json"]["schema"]["required"] == ["model"]
    assert {"/v1/chat/completions", "/api/v1/gpus", "/metrics", "/admin/models/{model}/load"} <= set(schema["paths"])


def test_what_is_not_described_is_relayed() -> None:
    """Routes of engines need no words of ours to be in the document."""

    async def handler(exchange: Exchange) -> None:
        raise NotImplementedError

    made = document([Route("POST", "/v1/{id:path}/x", handler, "models", "summary")])
    operation = made["paths"]["/v1/{id}/x"]["post"]
    assert operation["parameters"][0]["name"] == "id"
    assert "Relayed" in operation["description"]
    OpenAPIV31SpecValidator(made).validate()


def test_the_page_needs_nothing_from_elsewhere(site: Site) -> None:
    """It works on a machine without the internet, and runs nothing that an answer contains."""
    answer = site.ask("GET", "/docs")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} <= set(policy)
    assert re.findall(r"https?://", PAGE) == []
    assert "innerHTML" not in PAGE


def test_the_pages_script_is_whole() -> None:
    """Every bracket outside of its texts is closed."""
    script = re.sub(r'"[^"\n]*"', "", PAGE.partition("<script>")[2].partition("</script>")[0])
    for opening, closing in ("{}", "()", "[]"):
        assert script.count(opening) == script.count(closing) > 5


def test_fuzzed_requests_are_answered_as_documented(site: Site) -> None:
    """schemathesis makes up requests, valid and not: no server errors, and every answer is one that was promised."""
    url, key = f"http://127.0.0.1:{site.port}/openapi.json", "Authorization: Bearer b-secret"
    tool = Path(sys.executable).parent / "schemathesis"
    command = [
        tool,
        "run",
        url,
        "-H",
        key,
        "--include-path-regex",
        "^/(admin|api|health|ping|version|metrics|v1/models)",
    ]
    command += ["--exclude-path-regex", LEFT_OUT, "-c", CHECKS, "--phases", "examples,coverage,fuzzing", "-n", "10"]
    command += ["--request-timeout", "20", "--no-color", "--seed", "1", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=site.folder, timeout=540)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d{3,} generated", done.stdout), done.stdout
    assert site.ask("GET", "/health").json["status"] == "ok"
    assert "Traceback" not in site.log

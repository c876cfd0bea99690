"""What an administrator reads when the configuration is wrong: every message, word for word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllmd.config.loader import load
from vllmd.config.settings import MODEL
from vllmd.config.shape import MOST_LISTED, spellings
from vllmd.errors import ConfigError

GPU = "devices: [{memory: 80GiB}]\n"
SHARE = "a share such as 0.35 or 35%, a size such as 20GiB, or auto"
SIZE = "a size such as 20GiB or 512MiB"
NEVER = "a duration such as 300, 5m or 1h30m, or never"
SECTIONS = (
    "server, auth, devices, reserve, host_memory, idle, records, policy, log_level, engines, defaults, discover, "
    "pull, models, pools"
)
WHEN_FREE = "true, false, or a mapping"
SHARES = "a mapping such as {0.95: 0.80, 0.85: 0.70}, or none"
ENERGY = "an energy above 0 with its unit, such as 5Wh; accepted: an energy such as 5Wh, 0.2kWh or 900J, or never"
IDLE = "sleep_after, level, deepen_after, stop_after, energy"

GOLDEN = [
    # ---- YAML itself
    (
        "a: [1",
        "vllmd.yaml:2: this is not valid YAML: did not find expected ',' or ']', at the end of the file "
        "(while parsing a flow sequence that begins on line 1)",
    ),
    (
        "models: {m: {}}\nidle:\n\tlevel: 2",
        "vllmd.yaml:3: this is not valid YAML: a tab stands before its first word; indent by spaces",
    ),
    ("- a", "vllmd.yaml:1: a list is not a mapping; accepted: a mapping of sections"),
    ("reserve: 1GiB\nreserve: 2GiB", "vllmd.yaml:2: 'reserve' is given twice, first on line 1; keep one of them"),
    ("models: &a {x: *a}", "vllmd.yaml:1: this anchor contains itself"),
    ("? [a]\n: 1", "vllmd.yaml:1: a key must be plain text"),
    # ---- keys
    ("polcy: lru", f'vllmd.yaml:1: polcy: there is no such setting; did you mean "policy"? accepted: {SECTIONS}'),
    (
        "models: {m: {gpu_memry: 1}}",
        'vllmd.yaml:1: models.m.gpu_memry: there is no such setting; did you mean "gpu_memory"?',
    ),
    (
        "models: {m: {zzz: 1}}",
        "vllmd.yaml:1: models.m.zzz: there is no such setting; flags of the engine belong in extra_args; accepted: "
        f"{', '.join(spellings(MODEL)[:MOST_LISTED])} and others, see vllmd.yaml(5)",
    ),
    (
        "org/name: {devices: 0}",
        "vllmd.yaml:1: org/name: there is no such setting; models belong beneath models:; accepted: " + SECTIONS,
    ),
    (
        "idle:\n  sleep-after: 5m",
        f'vllmd.yaml:2: idle.sleep-after: there is no such setting; did you mean "sleep_after"? accepted: {IDLE}',
    ),
    (
        "gpu:\n  gpu: 1",
        'vllmd.yaml:2: gpu.gpu: there is no such setting; did you mean "gpu_id"? '
        "accepted: gpu_id, reserved_memory_mb, memory_utilization",
    ),
    (
        "models:\n  m: {gpu_memory: 0.5, gpu_memory_utilization: 0.6}",
        "vllmd.yaml:2: models.m.gpu_memory_utilization: gpu_memory is the same setting, given in {dir}/vllmd.yaml:2",
    ),
    (
        "reserve: 1GiB\ngpu: {reserved_memory_mb: 5}",
        "vllmd.yaml:2: gpu.reserved_memory_mb: reserve is the same setting, given in {dir}/vllmd.yaml:1",
    ),
    # ---- other names
    (
        "models: {a: {aliases: [b], adapters: {b: /x}}}",
        "vllmd.yaml:1: models.a.adapters.b: 'b' is an alias of 'a' already",
    ),
    (
        "models: {a: {adapters: {c: /x}}, b: {variants: {c: {}}}}",
        "vllmd.yaml:1: models.b.variants.c: 'c' is an adapter of 'a' already",
    ),
    (
        "models: {a: {extra_args: [--lora-modules, l=/x], variants: {l: {}}}}",
        "vllmd.yaml:1: models.a.variants.l: 'l' is an adapter of 'a' already",
    ),
    (
        "models: {a: {adapters: {b: {}}}}",
        "vllmd.yaml:1: models.a.adapters.b: path is missing: its folder, or a repository id",
    ),
    (
        "models: {a: {engine: tei, adapters: {b: /x}}}",
        "vllmd.yaml:1: models.a.adapters: the engine tei has no adapters here; llama.cpp, vllm have",
    ),
    (
        "models: {a: {request: {set: {model: b}}}}",
        "vllmd.yaml:1: models.a.request.set: the member model cannot be set: it says which model gets the request; "
        "accepted: a mapping such as {temperature: 0.7}",
    ),
    ("models: {a: {}}\npools: {p: [a, p]}", "vllmd.yaml:2: pools.p.models: 'p' is the pool itself"),
    (
        "models: {a: {}}\npools:\n  p: [a]\n  q: [p]",
        "vllmd.yaml:4: pools.q.models: 'p' is a pool, and a pool is made of models",
    ),
    (
        "models: {alpha: {}}\npools: {p: [alpah]}",
        "vllmd.yaml:2: pools.p.models: there is no model 'alpah'; did you mean \"alpha\"?",
    ),
    ("models: {a: {}, b: {}}\npools: {a: [b]}", "vllmd.yaml:2: pools.a: 'a' is a model already"),
    ("pools: {p: []}", "vllmd.yaml:1: pools.p.models: it names no model"),
    # ---- shapes
    ("server: 8080", "vllmd.yaml:1: server: a number is not a mapping; accepted: a mapping"),
    ("models: [a]", "vllmd.yaml:1: models: a list is not a mapping; accepted: models by name"),
    ("models: {m: 3}", "vllmd.yaml:1: models.m: a number is not a mapping; accepted: a mapping of settings"),
    (
        "devices: 80GiB",
        "vllmd.yaml:1: devices: text is not a list; accepted: a list of mappings with memory, name, file",
    ),
    ("devices: [{name: a}]", "vllmd.yaml:1: devices[0]: memory is missing; accepted: a size such as 80GiB"),
    (
        "models: {m: {request: {set: {model: x}}}}",
        "vllmd.yaml:1: models.m.request.set: the member model cannot be set: it says which model gets the request; "
        "accepted: a mapping such as {temperature: 0.7}",
    ),
    # ---- sizes
    (
        "devices: [{memory: 80}]",
        f"vllmd.yaml:1: devices[0].memory: 80 bytes is too small; write 80GiB if GiB were meant; accepted: {SIZE}",
    ),
    ("reserve: -1GiB", "vllmd.yaml:1: reserve: '-1GiB' is not a size; accepted: 0 or a size such as 512MiB"),
    (
        "host_memory: 9000PiB",
        "vllmd.yaml:1: host_memory: 9000PiB is more memory than any machine has; "
        "accepted: a size such as 20GiB, or auto",
    ),
    (
        "models: {m: {gpu_memory: 1.5}}",
        f"vllmd.yaml:1: models.m.gpu_memory: 1.5 is not between 0 and 1; accepted: {SHARE}",
    ),
    (
        "models: {m: {gpu_memory: 150%}}",
        f"vllmd.yaml:1: models.m.gpu_memory: 150% is not between 0 and 100%; accepted: {SHARE}",
    ),
    (
        "models: {m: {gpu_memory: lots}}",
        f"vllmd.yaml:1: models.m.gpu_memory: 'lots' is not a share of the memory or a size; accepted: {SHARE}",
    ),
    (
        GPU + "reserve: 2GiB\nmodels: {m: {gpu_memory: 79GiB}}",
        "vllmd.yaml:3: models.m.gpu_memory: it needs 79 GiB on 1 device; "
        "device 0 has 80 GiB less a reserve of 2 GiB: 78 GiB",
    ),
    # ---- times
    ("idle: {energy: 5}", f"vllmd.yaml:1: idle.energy: 5 is not {ENERGY}"),
    ("idle: {energy: 0Wh}", f"vllmd.yaml:1: idle.energy: '0Wh' is not {ENERGY}"),
    ("idle: {sleep_after: -5}", f"vllmd.yaml:1: idle.sleep_after: -5 is negative; accepted: {NEVER}"),
    ("idle: {sleep_after: 0}", f"vllmd.yaml:1: idle.sleep_after: 0 is too short; accepted: {NEVER}"),
    ("idle: {sleep_after: 1000d}", f"vllmd.yaml:1: idle.sleep_after: 1000d is more than a year; accepted: {NEVER}"),
    ("idle: {sleep_after: soon}", f"vllmd.yaml:1: idle.sleep_after: 'soon' is not a duration; accepted: {NEVER}"),
    ("idle: {level: 4}", "vllmd.yaml:1: idle.level: 4 is out of range; accepted: 1, 2, or 3 (stop)"),
    (
        "models:\n  m:\n    idle: {sleep_after: 10m, stop_after: 5m}",
        "vllmd.yaml:2: models.m.idle: stop_after (5m) comes before sleep_after (10m)",
    ),
    # ---- devices
    (
        GPU + "models: {m: {devices: 3}}",
        "vllmd.yaml:2: models.m.devices: there is no device 3; there is only 0",
    ),
    (
        GPU + "models: {m: {tensor_parallel_size: 2}}",
        "vllmd.yaml:2: models.m.tensor_parallel_size: it needs 2 devices, and there is 1 for it "
        "(tensor_parallel_size times pipeline_parallel_size)",
    ),
    (
        GPU + "models: {m: {tensor_parallel_size: 4, local_devices: 2}}",
        "vllmd.yaml:2: models.m.local_devices: it needs 2 devices, and there is 1 for it",
    ),
    (
        "models: {m: {tensor_parallel_size: 2, local_devices: 3}}",
        "vllmd.yaml:1: models.m.local_devices: 3 is more than tensor_parallel_size times pipeline_parallel_size, 2",
    ),
    (
        "models: {m: {devices: [0, 0]}}",
        "vllmd.yaml:1: models.m.devices: 0 is listed twice: devices are numbers from 0; "
        "accepted: auto, or device numbers such as [0, 1]",
    ),
    (
        "models: {m: {devices: gpu0}}",
        "vllmd.yaml:1: models.m.devices: 'gpu0' is not a number: devices are numbers from 0; "
        "accepted: auto, or device numbers such as [0, 1]",
    ),
    # ---- words and addresses
    ("policy: best", "vllmd.yaml:1: policy: 'best' is not one of them; accepted: adaptive, lru"),
    ("models: {m: {pin: maybe}}", "vllmd.yaml:1: models.m.pin: 'maybe' is not a yes or a no; accepted: true or false"),
    ("server: {port: 70000}", "vllmd.yaml:1: server.port: 70000 is out of range; accepted: a whole number, 0 to 65535"),
    (
        "server: {listen: 'localhost'}",
        "vllmd.yaml:1: server.listen: 'localhost' is not an address with a port from 0 to 65535; "
        "accepted: addresses such as 127.0.0.1:33258, [::1]:33258 or /run/vllmd.sock",
    ),
    (
        "server: {listen: '::1:8080'}",
        "vllmd.yaml:1: server.listen: '::1:8080': an IPv6 address is written in brackets; accepted: [::1]:8080",
    ),
    (
        "server: {host: 'localhost:80'}",
        "vllmd.yaml:1: server.host: 'localhost:80' is not a host name or address (the port goes into port); "
        "accepted: a host name or address",
    ),
    ("server: {port: 1, listen: '2'}", "vllmd.yaml:1: server: give either listen or host and port, not both"),
    (
        "server:\n  listen: 0.0.0.0:8080",
        "vllmd.yaml:2: server.listen: 0.0.0.0:8080 can be reached by others and auth.keys has no key; add one there, "
        "or set auth.allow_anonymous if everybody may use it",
    ),
    (
        "engines: {port_start: 5000, port_end: 4000}",
        "vllmd.yaml:1: engines.port_end: the last port, 4000, is before the first, 5000",
    ),
    # ---- names
    ("models: {a: {}, b: {aliases: [a]}}", "vllmd.yaml:1: models.b.aliases: 'a' is the name of a model"),
    (
        "models: {a: {aliases: [x]}, b: {aliases: [x]}}",
        "vllmd.yaml:1: models.b.aliases: 'x' is an alias of 'a' already",
    ),
    (
        "models: {' ': {}}",
        "vllmd.yaml:1: models. : a model's name has 1 to 200 printable characters without spaces at its ends, "
        "the first of them not '-', without backslash, and '.' or '..' is no part between slashes",
    ),
    (
        "models: {org/../m: {}}",  # which could be asked, and be unloaded by nobody: no path may have it
        "vllmd.yaml:1: models.org/../m: a model's name has 1 to 200 printable characters without spaces at its ends, "
        "the first of them not '-', without backslash, and '.' or '..' is no part between slashes",
    ),
    (
        'models: {"a\\\\b": {}}',
        "vllmd.yaml:1: models.a\\b: a model's name has 1 to 200 printable characters without spaces at its ends, "
        "the first of them not '-', without backslash, and '.' or '..' is no part between slashes",
    ),
    (
        "models: {a: {aliases: [--trust-remote-code]}}",
        "vllmd.yaml:1: models.a.aliases: an alias has 1 to 200 printable characters without spaces at its ends, "
        "the first of them not '-', without backslash, and '.' or '..' is no part between slashes",
    ),
    (
        "models: {a: {model: --trust-remote-code}}",
        "vllmd.yaml:1: models.a.model: '--trust-remote-code' begins with '-': the engine would take it for a flag",
    ),
    (
        "models: {a: {dtype: --trust-remote-code}}",
        "vllmd.yaml:1: models.a.dtype: '--trust-remote-code' begins with '-': the engine would take it for a flag",
    ),
    # ---- waiting for a free device
    (
        "models: {m: {when_free: 5}}",
        "vllmd.yaml:1: models.m.when_free: a number is not a mapping; accepted: " + WHEN_FREE,
    ),
    (
        "models: {m: {when_free: {used_above: 5GiB}}}",
        'vllmd.yaml:1: models.m.when_free.used_above: there is no such setting; did you mean "used_below"? '
        "accepted: used_below, shares",
    ),
    (
        "models: {m: {when_free: {used_below: 10000}}}",
        "vllmd.yaml:1: models.m.when_free.used_below: 10000 bytes is too small; write 10000GiB if GiB were meant; "
        f"accepted: {SIZE}",
    ),
    (
        "models: {m: {when_free: {shares: {0.95: 0.8, 0.85: 0.9}}}}",
        f"vllmd.yaml:1: models.m.when_free.shares: where 0.85 is free it cannot take 0.9; accepted: {SHARES}",
    ),
    (
        "models: {m: {when_free: {shares: {0.95: 0.5, 0.85: 0.7}}}}",
        "vllmd.yaml:1: models.m.when_free.shares: it would take 0.7 where 0.85 is free, and less (0.5) where 0.95 is; "
        f"accepted: {SHARES}",
    ),
    (
        "models:\n  m:\n    when_free:\n      shares:\n        0.95: 0.8\n        95%: 0.8",
        f"vllmd.yaml:6: models.m.when_free.shares: the free ratio 0.95 is given twice; accepted: {SHARES}",
    ),
    (
        "models: {m: {when_free: {shares: {1.5: 0.8}}}}",
        f"vllmd.yaml:1: models.m.when_free.shares: 1.5 is not between 0 and 1; accepted: {SHARES}",
    ),
    (
        "models: {m: {when_free: {shares: {0.9: [1]}}}}",
        f"vllmd.yaml:1: models.m.when_free.shares: a list is not a ratio; accepted: {SHARES}",
    ),
    (
        "models: {m: {when_free: {shares: {}}}}",
        f"vllmd.yaml:1: models.m.when_free.shares: it is empty; accepted: {SHARES}",
    ),
    (
        "models: {m: {when_free: {shares: 0.8}}}",
        f"vllmd.yaml:1: models.m.when_free.shares: 0.8 is not a mapping from free ratio to share; accepted: {SHARES}",
    ),
    (
        "models: {m: {when_free: true, gpu_memory: 0.9}}",
        "vllmd.yaml:1: models.m.when_free: when_free.shares says how much it takes, and so does gpu_memory; "
        "drop that, or set the shares to none",
    ),
    (
        "models: {m: {when_free: true, extra_args: {gpu-memory-utilization: 0.9}}}",
        "vllmd.yaml:1: models.m.when_free: when_free.shares says how much it takes, and so does extra_args "
        "(--gpu-memory-utilization); drop that, or set the shares to none",
    ),
    # ---- secrets
    ("auth: {keys: [{name: a}]}", "vllmd.yaml:1: auth.keys[0]: the key is missing; accepted: key or key_file"),
    (
        "auth: {keys: [{key: 'sha256:12'}]}",
        "vllmd.yaml:1: auth.keys[0].key: sha256: is followed by 64 hexadecimal digits",
    ),
    (
        "auth: {keys: [{key_file: nothing}]}",
        "vllmd.yaml:1: auth.keys[0].key_file: {dir}/nothing: No such file or directory; "
        "accepted: a file that the daemon's user may read, or a systemd credential",
    ),
    ("auth: {keys: [{key: a, name: x}, {key: a, name: y}]}", "vllmd.yaml:1: auth.keys: 'y' and 'x' are the same key"),
    # ---- what engines get
    (
        "models: {m: {env: {1A: x}}}",
        "vllmd.yaml:1: models.m.env: '1A' cannot be the name of an environment variable; "
        "accepted: a mapping from variable to value",
    ),
    (
        'models: {m: {command: "a \'b"}}',
        "vllmd.yaml:1: models.m.command: quotes do not match: No closing quotation; "
        "accepted: a command as a list of words or one line",
    ),
]


SECRETS = [
    "auth: SECRET",
    "auth: {keys: SECRET}",
    "auth: {keys: [SECRET]}",
    "auth: {keys: [{key: [SECRET]}]}",
    "auth: {keys: [{key: {SECRET: 1}}]}",
    "auth: {keys: [{key: 'sha256:SECRET'}]}",
    'auth: {keys: [{key: "SECRET\\nx"}]}',
    "auth: {keys: [{key: SECRET]}",
    "auth: {keys: [{key: *SECRET}]}",
    "auth:\n  keys:\n\t- key: SECRET",
    "auth: {keys: [{key: !!python/name:SECRET x}]}",
    "auth: {keys: [{key: !!int SECRET}]}",
    'a: "SECRET',
    "&SECRET &b c",
    "models: SECRET",
    "models: {a: SECRET}",
    "models: {a: {env: 'HF_TOKEN=SECRET'}}",
    "models: {a: {env: [SECRET]}}",
    "models: {a: {env: {HF_TOKEN: [SECRET]}}}",
    "models: {a: {env: {A-B: SECRET}}}",
    'models: {a: {env: {A: "SECRET\\0"}}}',
    "models: {a: {hf_token: [SECRET]}}",
    "models: {a: {hf_token: SECRET, hf_token_file: f}}",
    "models: {a: {api_key: [SECRET]}}",
    "models: {a: {options: SECRET}}",
    "models: {a: {options: [SECRET]}}",
    "models: {a: {command: {SECRET: 1}}}",
    'models: {a: {command: "SECRET \'x"}}',
    'models: {a: {extra_args: "SECRET \'x"}}',
    "models: {a: {replicas: {of: [SECRET]}}}",
    "models: {a: {replicas: {of: [{key: SECRET}, {key: SECRET}]}}}",
    "proxy: {api_key: [SECRET]}",
]


@pytest.mark.parametrize("text", SECRETS)
def test_no_message_quotes_what_may_be_a_secret(tmp_path: Path, text: str) -> None:
    """It says where and what would be right; messages go to terminals, logs, status lines and clients."""
    (tmp_path / "vllmd.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "vllmd.yaml", env={})
    assert "SECRET" not in error.value.message
    assert "vllmd.yaml:" in error.value.message


def test_a_name_that_would_move_the_terminal_is_written_out(tmp_path: Path) -> None:
    """A path in a message has names in it that others may have chosen."""
    (tmp_path / "vllmd.yaml").write_text('models: {"a\\u001b[31m\\u202eb": {}}')
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "vllmd.yaml", env={})
    assert error.value.message.isprintable()


@pytest.mark.parametrize(("text", "message"), GOLDEN, ids=[text[:40] for text, _ in GOLDEN])
def test_message(tmp_path: Path, text: str, message: str) -> None:
    """Each mistake alone gives exactly this line, with file and line, key path and what would be right."""
    file = tmp_path / "vllmd.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load(file, env={}, strict=True)
    assert caught.value.message == f"{tmp_path}/" + message.replace("{dir}", str(tmp_path))


UNFIT = [
    (
        "{gpu_memory: 100GiB}",
        "gpu_memory: it needs 100 GiB on 1 device; device 0 has 80 GiB less a reserve of 512 MiB: 79.5 GiB",
    ),
    ("{devices: [3]}", "devices: there is no device 3; there is only 0"),
    (
        "{tensor_parallel_size: 2}",
        "it needs 2 devices, and there is 1 for it (tensor_parallel_size times pipeline_parallel_size)",
    ),
]


@pytest.mark.parametrize(("settings", "why"), UNFIT, ids=[why[:12] for _, why in UNFIT])
def test_a_model_that_can_never_fit_keeps_no_other_from_being_served(tmp_path: Path, settings: str, why: str) -> None:
    """A daemon starts with it, and says it as a warning; what else is wrong refuses the whole, with both told."""
    file = tmp_path / "vllmd.yaml"
    file.write_text(f"{GPU}models:\n  good: {{gpu_memory: 10GiB}}\n  bad: {settings}\n")
    config = load(file, env={})
    assert list(config.models) == ["good", "bad"]
    (warning,) = config.warnings
    assert warning.startswith(f"{file}:4: models.bad.")
    assert why in warning
    with pytest.raises(ConfigError, match=r":4: models\.bad\."):
        load(file, env={}, strict=True)
    file.write_text(f"{file.read_text()}nonsense: 1\n")
    with pytest.raises(ConfigError, match=r"(?s):4: models\.bad\..*:5: nonsense"):
        load(file, env={})


@pytest.mark.parametrize(
    "text",
    [
        f"models: {{m: {{gpu_memory: {'9' * 400}GiB}}}}",
        f"models: {{m: {{max_model_len: {'9' * 400}}}}}",
        f"models: {{m: {{engine: sim, options: {{max_num_seqs: 0x{'f' * 6000}}}}}}}",
        f"server: {{listen: 'localhost:{'9' * 5000}'}}",
        "server: {listen: 'localhost:\u00b2'}",  # a digit, and no number
    ],
    ids=["size", "number", "hexadecimal", "port", "superscript"],
)
def test_a_number_that_is_none_is_a_problem_with_its_line(tmp_path: Path, text: str) -> None:
    """Larger than Python converts, or a digit only by name: a mistake like any other, and no traceback."""
    (tmp_path / "vllmd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"vllmd.yaml:1: "):
        load(tmp_path / "vllmd.yaml", env={})


def test_all_problems_of_a_file_are_reported_in_order(tmp_path: Path) -> None:
    """Nobody should have to start the daemon once per mistake."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("policy: best\nidle:\n  level: 9\nmodels:\n  m:\n    devises: 0\n    dtype: [a]\n")
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    lines = [line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in caught.value.message.splitlines()]
    assert lines == ["vllmd.yaml:1", "vllmd.yaml:3", "vllmd.yaml:6", "vllmd.yaml:7"]


def test_a_default_that_is_wrong_is_reported_once(tmp_path: Path) -> None:
    """However many models inherit it."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("defaults: {dtype: [a]}\nmodels: {a: {}, b: {}, c: {}}\n")
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    assert caught.value.message == f"{file}:1: defaults.dtype: a list is not text; accepted: text"


def test_a_wrong_environment_variable_is_named(tmp_path: Path) -> None:
    """The place of a setting from the environment is its variable."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "no.yaml", env={"PROXY_PORT": "http"}, overrides={"log_level": "loud"})
    assert caught.value.message.splitlines() == [
        f"{tmp_path}/no.yaml: there is no such file",
        "command line --log-level: log_level: 'loud' is not one of them; accepted: debug, info, warning, error",
        "environment PROXY_PORT: server.port: 'http' is not a number; accepted: a whole number, 0 to 65535",
    ]


def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    """What the system says of a file that cannot be read is passed on."""
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, env={})


@pytest.mark.parametrize("what", ["fifo", "/dev/tty", "/dev/null", "nowhere"])
def test_what_is_no_file_in_models_d_is_not_read(tmp_path: Path, what: str) -> None:
    """Opening a FIFO waits for whoever writes, for ever, and a device may have no end; /dev/null masks a file."""
    (tmp_path / "models.d").mkdir()
    odd = tmp_path / "models.d/odd.yaml"
    os.mkfifo(odd) if what == "fifo" else odd.symlink_to(what)
    (file := tmp_path / "vllmd.yaml").write_text("models: {m: {}}")
    if what == "/dev/null":
        assert list(load(file, env={}).models) == ["m"]
        return
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    missing = "there is no such file" if what == "nowhere" else "this is a device, a FIFO or a socket, and no file"
    assert caught.value.message == f"{odd}: {missing}"


def test_bytes_that_are_not_utf8_have_a_line(tmp_path: Path) -> None:
    """A binary slip is found like any other."""
    file = tmp_path / "vllmd.yaml"
    file.write_bytes(b"policy: lru\n# \xff\n")
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    assert caught.value.message == f"{file}:2: this is not UTF-8 text"


def test_anchors_that_multiply_cost_nothing(tmp_path: Path) -> None:
    """A file whose anchors would unfold to 10**9 entries is read, and refused for what it says."""
    rows = ["a0: &a0 {x: 1}"] + [
        f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}" for i in range(1, 10)
    ]
    file = tmp_path / "vllmd.yaml"
    file.write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="a9: there is no such setting"):
        load(file, env={})


def test_nesting_without_end(tmp_path: Path) -> None:
    """No traceback, no crash."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("models: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    assert str(file) in caught.value.message


def test_models_d_that_is_a_file(tmp_path: Path) -> None:
    """What cannot be listed is said, not passed over."""
    (tmp_path / "models.d").write_text("")
    (tmp_path / "vllmd.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "vllmd.yaml", env={})
    assert caught.value.message == f"{tmp_path}/models.d: cannot be read: Not a directory"


@pytest.mark.parametrize("user", ["root", "0", "a b", "-x", "../x"])
def test_a_user_that_no_engine_may_be_is_refused(tmp_path: Path, user: str) -> None:
    """Root above all; the launcher would refuse it as well."""
    (tmp_path / "a.yaml").write_text(f"models: {{m: {{user: '{user}'}}}}")
    with pytest.raises(ConfigError, match="user who is not root, or own"):
        load(tmp_path / "a.yaml", env={})

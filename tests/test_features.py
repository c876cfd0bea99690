"""What the documents promise of the command line, the configuration, the scripts, the environment and Docker.

Each row is a promise and the tests that prove it, as FILE::TEST. A row without a
test, or with one that is not there any more, fails.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LOADING, OPERATING = "config/test_config_loading.py", "e2e/test_operating.py"

ROWS: dict[str, tuple[str, ...]] = {
    # ---- V: command line
    "V: serve --host --port binds there": (
        f"{OPERATING}::test_V_serve_binds_host_and_port_and_takes_its_engines_along",
        f"{LOADING}::test_V_serve_host_and_port",
    ),
    "V: info shows the server's facts": ("cli/test_verbs.py::test_V_info_shows_the_server",),
    "V: ps lists every model": ("cli/test_verbs.py::test_V_ps_lists_every_model", f"{OPERATING}::test_ps_is_quick"),
    "V: start starts or wakes, and says how it goes and where the log is": (
        "cli/test_verbs.py::test_V_start_waits_and_says_what_happens",
        "e2e/test_lifecycle.py::test_start_and_stop_by_hand",
    ),
    "V: stop clears an error": ("cli/test_with_daemon.py::test_an_engine_that_cannot_start_says_why",),
    "V: sleep --level 1, 2, 3": (
        "cli/test_verbs.py::test_V_verbs_on_a_model",
        "cli/test_with_daemon.py::test_V_a_day_of_a_model",
    ),
    "V: wake-up, wakeup and wake_up are the same": ("cli/test_verbs.py::test_V_verbs_on_a_model",),
    "V: assign --devices --gpu-memory writes the YAML": (
        "cli/test_files.py::test_V_assign_writes_yaml",
        "cli/test_files.py::test_V_assign_finds_the_file_in_models_d",
        "config/test_config_edit.py::test_V_assign_changes_only_the_setting",
    ),
    "V: assign --restart applies it": (
        "cli/test_files.py::test_V_assign_restart",
        "cli/test_with_daemon.py::test_V_assign_restart_of_a_running_model",
    ),
    "V: exit statuses": (f"{OPERATING}::test_every_verb_with_wrong_missing_and_excess_arguments",),
    # ---- V: YAML, configuration, ports, log
    "V: models.yaml, every key": (
        f"{LOADING}::test_V_yaml_every_key_of_its_models_file",
        f"{LOADING}::test_V_flat_file_dropped_into_models_d",
        "cli/test_files.py::test_import_vllama",
    ),
    "V: each key becomes a flag of the engine, booleans too": (
        f"{LOADING}::test_V_extra_args_become_argv",
        "engines/test_vllm.py::test_the_models_settings_become_flags",
    ),
    "V: devices become CUDA_VISIBLE_DEVICES": ("engines/test_vllm.py::test_its_environment",),
    "V: utilization is computed where it is not set": ("engines/test_vllm.py::test_the_share_of_memory",),
    "V: VllamaConfig: port, engine ports, unload timeout and mode, cache": (f"{LOADING}::test_V_config_every_setting",),
    "V: config_dir": (f"{LOADING}::test_V_config_dir",),
    "V: unload_mode 3 stops": ("core/test_idle.py::test_level_three_stops_at_once", f"{LOADING}::test_idle_rules"),
    "V: port 33258": (
        "packaging/test_deb.py::test_listens_without_running",
        f"{OPERATING}::test_V_P_M_ports_are_more_addresses_of_the_same_service",
    ),
    "V: engine ports: an occupied one is skipped, exhaustion is an error": (
        "daemon/test_fleet.py::test_ports_go_around",
    ),
    "V: log file {model}_{port}.log": (
        "daemon/test_logfile.py::test_lines_are_appended_under_a_name_without_slashes",
        f"{OPERATING}::test_P_logs_directory",
    ),
    # ---- P: configuration
    "P: gpu, proxy and models sections": (f"{LOADING}::test_P_config_every_section",),
    "P: import of its file": ("cli/test_files.py::test_import_vllm_proxy",),
    "P: a key for all": ("admin/test_keys.py::test_no_key_and_a_wrong_one_are_401",),
    "P: a key of one model": (
        f"{LOADING}::test_P_per_model_key",
        "admin/test_keys.py::test_a_key_for_some_models_is_for_those_only",
    ),
    "P: a Hugging Face token of one model": (
        f"{OPERATING}::test_P_hf_token_is_in_that_engines_environment_only",
        f"{LOADING}::test_hf_token_file",
    ),
    "P: port 8080": (f"{OPERATING}::test_V_P_M_ports_are_more_addresses_of_the_same_service",),
    # ---- P: environment
    "P: PROXY_PORT, IDLE_TIMEOUT, GPU_ID, RESERVED_MEMORY_MB, LOG_LEVEL": (
        f"{LOADING}::test_P_env_overrides_the_file",
        f"{OPERATING}::test_P_env_settings_come_from_a_drop_in",
    ),
    "P: a value equal to the default wins, too": (f"{LOADING}::test_P_env_equal_to_the_default_still_wins",),
    # ---- P: scripts
    "P: install.sh": ("packaging/test_deb.py::test_listens_without_running", "packaging/test_pip.py"),
    "P: start, stop, restart, status": (f"{OPERATING}::test_P_scripts_start_stop_restart_status",),
    "P: no strays after any of them": (
        f"{OPERATING}::test_P_scripts_start_stop_restart_status",
        "e2e/test_lifecycle.py::test_stop_leaves_no_process_of_any_engine",
        "packaging/test_deb.py::test_removal_stops_everything_and_purge_forgets",
    ),
    # ---- P: Docker, folders, documents
    "P: compose build, up, logs, down": ("packaging/test_container.py::test_P_compose_file_builds_these_images",),
    "P: it runs in a container, healthy": (
        "packaging/test_container.py::test_P_compose_plain_image_serves",
        "packaging/test_container.py::test_P_compose_systemd_image_serves",
    ),
    "P: logs and models directories, the level obeyed": (
        f"{OPERATING}::test_P_logs_directory",
        f"{OPERATING}::test_P_env_settings_come_from_a_drop_in",
    ),
    "P: the documents exist and their examples work": (
        "cli/test_manual.py::test_the_examples_in_the_manual_are_valid",
        "cli/test_manual.py::test_the_shipped_examples_are_valid",
        "cli/test_manual.py::test_mandoc_finds_nothing",
    ),
    # ---- S: waiting for a GPU
    "S: is_gpu_free, memory info, free ratio: it waits until a GPU is free, the ratio picks the fraction": (
        "daemon/test_when_free.py::test_S_is_gpu_free_starts_with_the_share_that_the_free_ratio_picks",
        "daemon/test_when_free.py::test_S_is_gpu_free_looks_at_all_gpus_of_a_model",
        "core/test_vacancy.py::test_the_free_ratio_picks_the_share",
    ),
    # ---- M: configuration
    "M: port 6004": (f"{OPERATING}::test_V_P_M_ports_are_more_addresses_of_the_same_service",),
    "M: a configuration file for commands, ports and paths; a change takes effect": (
        f"{OPERATING}::test_a_reload_under_load_replaces_only_what_changed",
        "engines/test_vllm.py::test_the_command_is_configurable",
    ),
}


@cache
def functions(file: str) -> frozenset[str]:
    """The test functions of a file; none if it is not there."""
    path = TESTS / file
    if not path.exists():
        return frozenset()
    found = ast.walk(ast.parse(path.read_text()))
    return frozenset(
        node.name
        for node in found
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


@pytest.mark.parametrize(("row", "proofs"), ROWS.items(), ids=list(ROWS))
def test_each_promise_has_its_tests(row: str, proofs: tuple[str, ...]) -> None:
    """What is renamed or deleted here takes its promise along, unless somebody notices."""
    assert proofs
    for proof in proofs:
        file, _, name = proof.partition("::")
        assert name in functions(file) if name else functions(file), f"{row}: there is no {proof}"


@pytest.mark.parametrize("file", sorted({proof.partition("::")[0] for proofs in ROWS.values() for proof in proofs}))
def test_what_is_named_after_a_document_is_listed(file: str) -> None:
    """A test called test_V_... or test_P_... proves a promise; here one finds which."""
    listed = {proof.partition("::")[2] for proofs in ROWS.values() for proof in proofs}
    assert {name for name in functions(file) if name.startswith(("test_V_", "test_P_"))} <= listed

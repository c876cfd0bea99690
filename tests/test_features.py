"""What five documents promise, and what proves it.

L is the Python library (ModelManager, ServerManager), V the Ollama-like manager of vLLM, M the API that starts, stops
and watches models on GPUs, S the choice of the fastest server, P the on-demand proxy with keys and its client.

Each row is a promise and the tests that prove it, as FILE::TEST. A row without a
test, or with one that is not there any more, fails.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
S, M = "replicas/test_s.py", "replicas/test_m.py"
LOADING, OPERATING = "config/test_config_loading.py", "e2e/test_operating.py"
MODEL_MANAGER, SERVER_MANAGER = "client/test_l_model_manager.py", "client/test_l_server_manager.py"
ENGINE_ARGS, TWO_USERS, DOCUMENTS = (
    "client/test_l_engine_args.py",
    "client/test_l_two_users.py",
    "client/test_documents.py",
)
SDK, SURFACE, SCHEDULING = "client/test_p_sdk.py", "admin/test_surface.py", "e2e/test_scheduling.py"
CONTAINERS, THROUGH_THE_DAEMON = "engines/test_containers.py", "engines/test_through_the_daemon.py"

ROWS: dict[str, tuple[str, ...]] = {
    # ---- L: the offline engine
    "L: ModelManager loads, generates and releases; with and by hand": (
        f"{MODEL_MANAGER}::test_L_with_loads_generates_and_releases",
        f"{MODEL_MANAGER}::test_L_tokenizer",
        f"{MODEL_MANAGER}::test_L_model_timer_releases",
        f"{MODEL_MANAGER}::test_L_model_manager_without_vllm",
        f"{MODEL_MANAGER}::test_L_the_real_vllm",
        f"{DOCUMENTS}::test_L_model_manager_as_in_the_document",
    ),
    "L: its end really frees the GPU": (
        f"{MODEL_MANAGER}::test_L_an_engine_that_is_killed_takes_its_core_along",
        f"{MODEL_MANAGER}::test_L_an_engine_that_hangs_is_ended",
        f"{MODEL_MANAGER}::test_L_a_killed_program_leaves_no_engine",
    ),
    "L: load_model() is idempotent": (f"{MODEL_MANAGER}::test_L_load_model_is_idempotent",),
    # ---- L: the served model
    "L: ServerManager is ready on enter, and its exit is managed": (
        f"{SERVER_MANAGER}::test_L_with_is_ready_on_enter",
        f"{SERVER_MANAGER}::test_L_without_a_daemon_a_private_one_serves",
        f"{SERVER_MANAGER}::test_L_a_private_daemon_dies_with_its_program",
        f"{SERVER_MANAGER}::test_L_a_program_that_ends_takes_its_private_daemon_along",
        f"{DOCUMENTS}::test_L_server_manager_as_in_the_document",
        f"{DOCUMENTS}::test_L_server_manager_by_hand_as_in_the_document",
        f"{DOCUMENTS}::test_L_server_manager_with_the_real_vllm",
    ),
    "L: start() is True when it serves, False for a bad model, and then no process is left": (
        f"{SERVER_MANAGER}::test_L_start_is_true_when_it_serves",
        f"{SERVER_MANAGER}::test_L_start_is_false_for_a_bad_model",
        f"{SERVER_MANAGER}::test_L_a_start_that_takes_too_long_leaves_nothing",
        f"{SERVER_MANAGER}::test_L_a_bad_model_leaves_no_private_daemon",
    ),
    "L: make_client() is the official client": (
        f"{SERVER_MANAGER}::test_L_with_is_ready_on_enter",
        f"{SERVER_MANAGER}::test_L_make_client_without_the_official_client",
    ),
    "L: server_name is org/name of the path": (
        f"{ENGINE_ARGS}::test_L_server_name",
        f"{ENGINE_ARGS}::test_L_server_name_can_be_given",
    ),
    "L: reset_shutdown_timer(5): alive at 4 s, gone at 7 s; reset at 3 s, alive at 7 s": (
        f"{SERVER_MANAGER}::test_L_reset_shutdown_timer",
        f"{SERVER_MANAGER}::test_L_a_timer_drains_first",
        f"{TWO_USERS}::test_L_two_users_share_one_model",
    ),
    "L: stop() is immediate, a second one harmless": (
        f"{SERVER_MANAGER}::test_L_stop_is_immediate_and_harmless_when_repeated",
    ),
    "L: auto_terminate delay, never, directly": (
        f"{SERVER_MANAGER}::test_L_auto_terminate_delay",
        f"{SERVER_MANAGER}::test_L_auto_terminate_never_lasts_as_long_as_the_program",
        f"{SERVER_MANAGER}::test_L_with_is_ready_on_enter",
        f"{SERVER_MANAGER}::test_L_a_mode_that_is_none",
        f"{SERVER_MANAGER}::test_L_a_daemon_that_dies_in_the_block_costs_no_second_error",
    ),
    "L: VLLMEngineArgs reach vLLM, the port answers": (
        f"{SERVER_MANAGER}::test_L_engine_args_reach_vllm",
        f"{SERVER_MANAGER}::test_L_a_port_that_is_taken",
        f"{SERVER_MANAGER}::test_L_a_port_that_nobody_used_is_closed_without_a_word",
        f"{SERVER_MANAGER}::test_L_other_arguments_are_said_not_ignored",
        f"{SERVER_MANAGER}::test_L_a_configured_model_is_used_as_configured",
        f"{ENGINE_ARGS}::test_L_false_lists_mappings_and_none",
        f"{ENGINE_ARGS}::test_L_a_name_that_vllm_does_not_have",
        f"{ENGINE_ARGS}::test_L_a_value_of_the_wrong_kind",
        f"{ENGINE_ARGS}::test_L_the_table_is_vllms_own",
        "client/test_runtime_models.py::test_L_arguments_of_the_document_are_harmless",
    ),
    "L: many models and users on one GPU, without contention": (
        f"{TWO_USERS}::test_L_two_users_share_one_model",
        f"{SERVER_MANAGER}::test_L_many_users_share_one_model",
        f"{SERVER_MANAGER}::test_L_two_models_of_two_users_take_turns_on_one_gpu",
        f"{SERVER_MANAGER}::test_L_a_killed_user_does_not_keep_the_model",
    ),
    "L: verbose prints progress": (
        f"{SERVER_MANAGER}::test_L_verbose",
        f"{SERVER_MANAGER}::test_L_progress_is_not_a_clock",
        f"{MODEL_MANAGER}::test_L_model_verbose",
    ),
    "L: multimodal messages and tool calls pass through": (
        f"{SERVER_MANAGER}::test_L_multimodal_and_tools_pass_through",
        f"{DOCUMENTS}::test_L_multimodal_as_in_the_document",
    ),
    # ---- P: the client
    "P: VLLMProxyClient and its async twin, with (base_url, api_key, timeout=300)": (
        f"{SDK}::test_P_the_names_and_the_signature",
        f"{SDK}::test_P_the_async_client_does_the_same",
        f"{SDK}::test_P_the_async_client_raises_the_same",
        f"{DOCUMENTS}::test_P_quick_start_as_in_the_document",
    ),
    "P: chat_completion is a dict, chat_completion_stream yields text": (
        f"{SDK}::test_P_chat_completion_is_a_dict",
        f"{SDK}::test_P_chat_completion_stream_yields_text",
        f"{SDK}::test_P_chunks_without_choices_and_comments_are_passed_over",
    ),
    "P: text_completion and embeddings; V's rerank and score": (
        f"{SDK}::test_P_text_completion_and_embeddings",
        f"{SDK}::test_P_rerank_and_score",
    ),
    "P: load, unload, list, get and health of the client": (
        f"{SDK}::test_P_load_unload_and_the_other_verbs",
        f"{SDK}::test_P_list_get_health",
    ),
    "P: an error chunk raises, and so does every error": (
        f"{SDK}::test_P_error_chunk_raises",
        f"{SDK}::test_P_an_answer_that_breaks_off_raises",
        f"{SDK}::test_P_every_error_answer_has_its_class",
    ),
    "P: OpenAI's own client works": (
        "e2e/test_conformance.py::test_the_openai_client_chats",
        "e2e/test_vllm.py::test_the_official_client_streams_a_chat",
    ),
    # ---- S
    "S: several servers start at once, where there is room": (
        f"{S}::test_S_concurrent_start_of_several_servers",
        "engines/test_several_servers.py::test_S_several_servers_start_at_once_where_there_is_room",
        "core/test_swaps.py::test_starts_on_one_device_wait_for_each_other",
        "daemon/test_engine_manager.py::test_ports_go_around",
    ),
    "S: Server lists, chat and embedding": (f"{S}::test_S_server_lists_of_chat_and_embedding_are_both_routed",),
    "S: get_fastest_server skips the slower": (
        f"{S}::test_S_get_fastest_server_skips_the_slower",
        f"{S}::test_S_everybodys_time_is_to_be_had_as_well",
        "cli/test_verbs.py::test_S_probe_shows_the_fastest_first",
    ),
    "S: get_all_latency, get_running_server_sizes": (
        f"{S}::test_S_get_all_latency_has_a_row_for_each_server",
        f"{S}::test_S_get_running_server_sizes_are_those_that_run",
    ),
    "S: BENCHMAK_MESSAGE": (f"{S}::test_S_benchmark_message_is_what_the_servers_are_asked",),
    "S: LATENCY_GROWING_RATE": (
        f"{S}::test_S_latency_growing_rate_sends_the_next_request_elsewhere",
        "replicas/test_four.py::test_nobody_sees_an_error_but_whose_stream_had_begun",
    ),
    "S: MAX_RETRY": (
        f"{S}::test_S_max_retry_one_server_dies_and_nobody_notices",
        f"{S}::test_S_max_retry_attempts_are_bounded",
    ),
    "S: turn_off_running_flag, INF": (f"{S}::test_S_turn_off_running_flag_when_all_are_down_and_on_again",),
    "S: get_completion_or_embedding": (f"{S}::test_S_get_completion_or_embedding",),
    "S: get_comond_infos, get_eno1_inet_address": (
        f"{S}::test_S_the_command_comes_from_the_configuration_and_only_this_hosts_servers_start",
    ),
    # ---- M: the API
    "M: GET /api/v1/gpus": (
        f"{SURFACE}::test_M_gpus_and_their_processes",
        f"{SURFACE}::test_without_a_gpu_that_can_be_read_gpus_is_501_and_nothing_else_fails",
        "gpu/test_nvml.py::test_inventory_has_uuid_size_reserve_and_name",
    ),
    "M: DELETE /api/v1/processes/{pid}": (
        f"{SURFACE}::test_M_killing_an_engines_process_ends_that_engine",
        f"{SURFACE}::test_M_a_stranger_is_killed_only_by_force_and_only_on_a_gpu",
    ),
    "M: POST /api/v1/models/start": (
        f"{M}::test_M_start_where_it_is_already",
        f"{M}::test_M_configured_replicas_are_put_where_they_are_wanted_and_no_more_come",
        f"{M}::test_M_an_instance_where_it_may_not_be",
        f"{M}::test_M_a_model_with_a_config_of_its_own_on_two_gpus",
        f"{SURFACE}::test_M_a_model_on_the_gpu_of_choice",
        f"{SURFACE}::test_M_a_wrong_start_is_refused",
        f"{SURFACE}::test_M_a_model_with_a_config_of_its_own",
    ),
    "M: POST /api/v1/models/stop takes that GPU's instance only, the last one the model": (
        f"{SURFACE}::test_M_a_model_on_the_gpu_of_choice",
        f"{M}::test_M_two_gpus_stop_one",
        f"{M}::test_M_an_instance_that_is_added_goes_with_its_stop",
        f"{M}::test_M_a_reload_forgets_what_was_added",
    ),
    "M: GET /api/v1/models/status and /{name}": (
        f"{M}::test_M_two_gpus_stop_one",
        f"{SURFACE}::test_M_a_model_on_the_gpu_of_choice",
        f"{SURFACE}::test_M_a_model_with_a_config_of_its_own",
    ),
    "M: a runner of somebody else's": (
        "engines/test_plugin.py::test_M_a_runner_of_a_third_party_is_started_looked_at_and_stopped",
    ),
    "M: Triton and ComfyUI are started, stopped and looked at": (
        f"{CONTAINERS}::test_M_triton_in_a_container_is_started_slept_and_stopped",
        f"{CONTAINERS}::test_M_a_container_whose_client_is_killed_is_stopped",
        f"{CONTAINERS}::test_M_a_forced_stop_stops_the_container_too",
        f"{CONTAINERS}::test_M_a_daemon_that_ends_stops_its_containers",
        f"{THROUGH_THE_DAEMON}::test_M_triton_is_asked_by_our_name_for_its_model",
        f"{THROUGH_THE_DAEMON}::test_M_comfyui_finishes_its_job_before_it_sleeps",
        "engines/test_stand_ins.py::test_triton_unloads_and_loads_one_model_of_a_repository",
        "engines/test_stand_ins.py::test_comfyui_frees_between_jobs_and_tells_that_it_works",
    ),
    "M: /docs and OpenAPI": (
        "admin/test_openapi.py::test_it_is_valid_openapi_and_complete",
        "admin/test_openapi.py::test_the_page_needs_nothing_from_elsewhere",
    ),
    # ---- V, P: models on demand
    "V: a model is found by its name, started or woken for a request": (
        "e2e/test_lifecycle.py::test_the_first_request_wakes_it_all_and_is_answered",
        f"{SURFACE}::test_one_model_by_any_of_its_names",
    ),
    "V: /v1/models has the models of the Hugging Face cache": (
        f"{SURFACE}::test_V_models_of_the_cache_are_offered_and_start",
    ),
    "V: the least recently used leaves, until there is enough room": (
        f"{SCHEDULING}::test_lru_evicts_the_one_that_was_used_longest_ago",
        "core/test_swaps.py::test_the_least_recently_used_leaves_first",
        "core/test_swaps.py::test_a_target_takes_as_many_victims_as_it_needs_and_no_more",
        "core/test_swaps.py::test_nobody_leaves_for_what_would_not_fit_even_then",
    ),
    "V: level 2 wakes in three steps, in order": (
        "daemon/test_engine_manager.py::test_a_wake_from_level_2_goes_step_by_step",
        "daemon/test_engine_manager.py::test_a_step_of_a_wake_that_fails_ends_it",
    ),
    "V: what a sleep freed is recorded and gates the wake": (
        "daemon/test_engine_manager.py::test_a_sleep_tells_what_came_free",
        "core/test_swaps.py::test_what_sleeping_freed_gates_the_wake",
    ),
    "V: engines end with the daemon": (
        f"{OPERATING}::test_V_serve_binds_host_and_port_and_takes_its_engines_along",
        "e2e/test_lifecycle.py::test_stop_leaves_no_process_of_any_engine",
        "launcher/test_sessions.py::test_a_killed_launcher_is_replaced_and_its_engines_are_gone",
    ),
    "V: it stops gracefully": ("e2e/test_lifecycle.py::test_a_running_stream_survives_a_restart",),
    "P: unused models are unloaded; a long stream is not cut": (
        "e2e/test_lifecycle.py::test_idle_sleeps_then_stops_then_the_daemon_exits_and_the_next_request_works",
        "core/test_idle.py::test_the_clock_starts_when_the_last_request_ends",
    ),
    "P: the reserve of a device is never promised": ("core/test_parts.py::test_what_is_held_is_not_free",),
    "P: GET /health and /metrics": (
        f"{SURFACE}::test_P_health",
        f"{SURFACE}::test_P_metrics_move",
    ),
    "P: POST /admin/models/{id}/load and /unload": (f"{SURFACE}::test_P_load_and_unload",),
    # ---- V: command line
    "V: serve --host --port binds there": (
        f"{OPERATING}::test_V_serve_binds_host_and_port_and_takes_its_engines_along",
        f"{LOADING}::test_V_serve_host_and_port",
    ),
    "V: info shows the server's facts": ("cli/test_verbs.py::test_V_info_shows_the_server",),
    "V: ps lists every model": (
        "cli/test_verbs.py::test_V_ps_lists_every_model",
        "cli/test_verbs.py::test_V_ps_says_what_brings_a_pinned_model_back_and_that_one_is_silent",
        "cli/test_verbs.py::test_ps_imports_little",
    ),
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
        "daemon/test_engine_manager.py::test_ports_go_around",
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
        "core/test_when_free.py::test_the_free_ratio_picks_the_share",
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
    """A test called test_L_..., test_V_... and so on proves a promise; here one finds which."""
    listed = {proof.partition("::")[2] for proofs in ROWS.values() for proof in proofs}
    assert {name for name in functions(file) if re.match("test_[LVMSP]_", name)} <= listed

"""One model's settings from a program instead of a file, laid over what ``defaults`` makes of every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllmd.config.checks import check
from vllmd.config.findings import Findings
from vllmd.config.loader import parse_model
from vllmd.config.nodes import Node, Where
from vllmd.config.settings import COMBINED, MODEL
from vllmd.config.types import Config, ModelConfig
from vllmd.errors import BadRequest

# What could run a program or read a file of the caller's choice as the engines' user, whom all users' prompts reach.
REFUSED = frozenset(
    {"command", "env", "hf_token_file", "limits", "options", "trust_remote_code", "api_key", "preload", "user"}
    | {"adapters", "runtime_adapters"}
)
# The flags of vLLM that cannot.
_HARMLESS = """
    --async-scheduling --block-size --convert --cpu-offload-gb --data-parallel-size --disable-custom-all-reduce
    --disable-log-stats --dtype --enable-auto-tool-choice --enable-chunked-prefill
    --enable-expert-parallel --enable-lora --enable-prefix-caching --enforce-eager
    --gpu-memory-utilization --kv-cache-dtype --kv-cache-memory-bytes --limit-mm-per-prompt
    --max-logprobs --max-lora-rank --max-loras --max-model-len --max-num-batched-tokens --max-num-seqs
    --mm-processor-kwargs --no-async-scheduling --no-enable-auto-tool-choice --no-enable-chunked-prefill
    --no-enable-prefix-caching --no-enforce-eager --pipeline-parallel-size --quantization --reasoning-parser
    --revision --runner --scheduling-policy --seed --swap-space --tensor-parallel-size --tokenizer-revision
    --tool-call-parser
"""
HARMLESS = frozenset(_HARMLESS.split())


def runtime_model(name: str, settings: Mapping[str, Any], config: Config, *, trusted: bool) -> ModelConfig:
    """The model, with the settings of vllmd.yaml(5) under its name.

    ``trusted``: whoever asks may run programs as the engines' user anyway. Raises BadRequest with all that is wrong.
    """
    if not trusted:
        _refuse_settings(settings)  # before anything is parsed: parsing reads the files that settings name
    where, findings = Where("request"), Findings()
    node = _node(settings, where)
    model, given = parse_model(name, node, findings)
    found = [str(problem) for problem in findings.problems()]
    if not found:
        template = config.template_of(model.engine) if "engine" in given else config.template
        model = _over(template, model, given)
        found = [] if trusted else list(_refused(model, given, template, config))
        together = replace(config, models={**config.models, name: model})
        found += [f"{path}: {what}" for _, path, what in check(together)]
    if found:
        raise BadRequest("\n".join(found))
    return model


def changed(name: str, settings: Mapping[str, Any], config: Config) -> ModelConfig:
    """A configured model with these settings instead of its own, for a plan. Raises BadRequest with what is wrong."""
    _refuse_settings(settings)
    findings = Findings()
    model, given = parse_model(name, _node(settings, Where("request")), findings)
    found = [str(problem) for problem in findings.problems()]
    if not found:
        model = _over(config.models[name], model, given)
        together = replace(config, models={**config.models, name: model})
        found = [f"{path}: {what}" for _, path, what in check(together) if path.startswith(f"models.{name}")]
    if found:
        raise BadRequest("\n".join(found))
    return model


def _over(template: ModelConfig, model: ModelConfig, given: frozenset[str]) -> ModelConfig:
    """What was given before what ``defaults`` says; what is combined in files is combined here."""
    names = frozenset(_field(name) for name in given) - {""}
    fields: dict[str, Any] = {name: getattr(model, name) for name in names}
    for name in names & (COMBINED - {"idle", "limits"}):
        below, above = getattr(template, name), fields[name]
        fields[name] = {**below, **above} if isinstance(above, Mapping) else (*below, *above)
    return replace(template, name=model.name, where=model.where, **fields)


def _field(setting: str) -> str:
    """The field of ModelConfig that a setting fills; "" for one that is a key of ours."""
    row = MODEL.row(setting)
    if row is None or row.field is None:
        return "hf_token" if setting.startswith("hf_token") else ""
    return row.field or row.name


def _refuse_settings(settings: Mapping[str, Any]) -> None:
    rows = [MODEL.row(str(name)) for name in settings]
    found = sorted({row.name for row in rows if row is not None} & REFUSED)
    if found:
        raise BadRequest("\n".join(f"{name}: only root may say this here; ask your administrator" for name in found))


def _refused(model: ModelConfig, given: frozenset[str], template: ModelConfig, config: Config) -> list[str]:
    wrong = []
    if "engine" in given and model.engine not in ("vllm", config.template.engine):
        wrong.append(f"engine: {model.engine!r} must be configured by your administrator")
    own = model.extra_args[len(template.extra_args) :] if "extra_args" in given else ()
    flags = [word.partition("=")[0] for word in own if word.startswith("-") and not _is_number(word)]
    wrong += [f"extra_args: {flag} must be configured by your administrator" for flag in flags if flag not in HARMLESS]
    return sorted(wrong)


def _node(value: object, where: Where) -> Node:
    """Python data as a node; texts stay texts, whatever YAML would make of them."""
    if isinstance(value, Mapping):
        return Node(where, {str(key): _node(child, where) for key, child in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Node(where, [_node(child, where) for child in value])
    return Node(where, value, "" if value is None else str(value))


def _is_number(word: str) -> bool:
    return word.removeprefix("-").replace(".", "", 1).isdecimal()

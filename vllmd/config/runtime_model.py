"""One model's settings from a program instead of a file, laid over what ``defaults`` makes of every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllmd.config.checks import check, unfit
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
# Flags of vLLM that can do neither.
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
    """Make a model of settings as in vllmd.yaml(5). Raises BadRequest with everything that is wrong, a line each.

    ``trusted``: the caller may run programs as the engines' user anyway.
    """
    if not trusted:
        _refuse_settings(settings)  # before anything is parsed: parsing reads the files that settings name
    findings = Findings()
    model, given = parse_model(name, _node(settings, Where("request")), findings)
    problems = [str(problem) for problem in findings.problems()]
    if not problems:
        template = config.template_of(model.engine) if "engine" in given else config.template
        model = _over(template, model, given)
        if not trusted and "engine" in given and model.engine not in ("vllm", config.template.engine):
            problems.append(f"engine: {model.engine!r} must be configured by your administrator")
        own_args = model.extra_args[len(template.extra_args) :] if "extra_args" in given and not trusted else ()
        for word in own_args:
            flag, is_number = word.partition("=")[0], word.removeprefix("-").replace(".", "", 1).isdecimal()
            if word.startswith("-") and not is_number and flag not in HARMLESS:
                problems.append(f"extra_args: {flag} must be configured by your administrator")
        together = replace(config, models={**config.models, name: model})
        problems = [*sorted(problems), *(f"{path}: {what}" for _, path, what in check(together))]
        problems += _unfit(model, config)
    if problems:
        raise BadRequest("\n".join(problems))
    return model


def changed(name: str, settings: Mapping[str, Any], config: Config) -> ModelConfig:
    """A configured model with these settings instead of its own, for a plan. Raises BadRequest with what is wrong."""
    _refuse_settings(settings)
    findings = Findings()
    model, given = parse_model(name, _node(settings, Where("request")), findings)
    problems = [str(problem) for problem in findings.problems()]
    if not problems:
        model = _over(config.models[name], model, given)
        together = replace(config, models={**config.models, name: model})
        problems = [f"{path}: {what}" for _, path, what in check(together) if path.startswith(f"models.{name}")]
        problems += _unfit(model, config)
    if problems:
        raise BadRequest("\n".join(problems))
    return model


def _unfit(model: ModelConfig, config: Config) -> list[str]:
    """Why one model can never be loaded on the declared devices. Others, which a file may have, are not looked at."""
    return [f"{path}: {what}" for _, (_, path, what) in unfit(replace(config, models={model.name: model}))]


def _over(template: ModelConfig, model: ModelConfig, given: frozenset[str]) -> ModelConfig:
    """``template`` with the settings ``given`` as in ``model``; what files combine entry by entry is combined here."""
    rows = [row for row in map(MODEL.row, given) if row is not None]
    names = {row.field or row.name for row in rows if row.field is not None}
    names |= {"hf_token"} & {name.removesuffix("_file") for name in given}  # hf_token_file fills the same field
    fields: dict[str, Any] = {name: getattr(model, name) for name in names}
    for name in names & (COMBINED - {"idle", "limits"}):
        below, above = getattr(template, name), fields[name]
        fields[name] = {**below, **above} if isinstance(above, Mapping) else (*below, *above)
    return replace(template, name=model.name, where=model.where, **fields)


def _refuse_settings(settings: Mapping[str, Any]) -> None:
    """Raise BadRequest where these settings could run a program or read a file of the caller's choice."""
    rows = [MODEL.row(str(name)) for name in settings]
    refused = sorted({row.name for row in rows if row is not None} & REFUSED)
    if refused:
        raise BadRequest("\n".join(f"{name}: only root may say this here; ask your administrator" for name in refused))


def _node(value: object, where: Where) -> Node:
    """Python data as a node; texts stay texts, whatever YAML would make of them."""
    if isinstance(value, Mapping):
        return Node(where, {str(key): _node(child, where) for key, child in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Node(where, [_node(child, where) for child in value])
    return Node(where, value, "" if value is None else str(value))

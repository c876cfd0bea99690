"""Write a model's devices and memory to its YAML file; comments stay.

What no device of this machine has is refused. Takes effect with vllmctl reload,
or at once with --restart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllmd.api.answers import NO_ENGINE
from vllmd.api.verbs import verb
from vllmd.cli import files, models, show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_CONFIG, EX_DATAERR, EX_USAGE, Failure


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, many=False)
    parser.add_argument("--devices", metavar="D", help="such as 0 or 0,1, or auto")
    parser.add_argument("--gpu-memory", metavar="M", help="such as 0.35, 20GiB or auto")
    parser.add_argument("--restart", action="store_true", help="reload the configuration and start the model anew")
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of the standard place")


def run(arguments: argparse.Namespace) -> int:
    settings = wanted(arguments.devices, arguments.gpu_memory)
    path, name = write(arguments.model, settings, arguments.config)
    result: dict[str, object] = {"model": name, "file": str(path), **settings}
    if arguments.restart:
        result["restarted"] = restart(Admin(arguments), name)
    if arguments.json:
        print(show.as_json(result))
    else:
        show.say(f"{name}: {', '.join(f'{key}: {value}' for key, value in settings.items())} written to {path}")
        show.say(in_force(name, result.get("restarted")))
    return 0


def in_force(name: str, restarted: object) -> str:
    """When the new settings take effect. ``restarted``: whether the model was loaded; None without --restart."""
    if restarted is None:
        return "vllmctl reload puts it into force"
    return "it runs with that" if restarted else f"it is in force; {name} is not loaded, its next start goes by it"


def wanted(devices: str | None, memory: str | None) -> dict[str, str]:
    """The settings as YAML. Raises Failure where a value is wrong, or none is given."""
    from vllmd.cli.values import parse
    from vllmd.config import value_types

    settings = {}
    for kind, flag, text in (
        (value_types.DEVICES, "--devices", devices),
        (value_types.SHARE, "--gpu-memory", memory),
    ):
        if text is not None:
            try:
                parse(kind, text)
            except argparse.ArgumentTypeError as error:
                raise Failure(f"{flag}: {error}", EX_USAGE) from None
    if devices is not None:
        settings["devices"] = devices if devices == "auto" else f"[{', '.join(devices.strip('[]').split(','))}]"
    if memory is not None:
        settings["gpu_memory"] = memory
    if not settings:
        raise Failure("say what to assign: --devices or --gpu-memory", EX_USAGE)
    return settings


def write(model: str, settings: dict[str, str], config_file: Path | None) -> tuple[Path, str]:
    """Change the file that has the model (else the main one), if the result is valid. Returns file and model's name."""
    from vllmd.config import edit
    from vllmd.config.loader import default_file, read
    from vllmd.config.replicas import engines_of, is_this_host, of_this_host
    from vllmd.gpu.present import present, unfit

    main = config_file or default_file()
    config = read(main).config
    for known in config.models.values():
        if known.replicas and model in (one.name for one in known.replicas.of):
            raise Failure(
                f"{model} is a replica: its settings are those of {known.name}, and in its list of replicas", EX_USAGE
            )
    name = resolve(model, {known.name: known.aliases for known in config.models.values()})
    path, flat = place(name, config.files, main)
    old = files.read(path)
    try:
        new = edit.assign(old, name, settings, flat)
    except edit.CannotEdit as error:
        raise Failure(f"{path}: {error}", EX_DATAERR) from None
    reading = read(main, texts={path: new})
    # Another model that can never be loaded is in nobody's way, or two of them could not be mended one by one.
    own = (f"models.{name}.", f"models.{name}@")
    problems = [each for each in reading.problems if not each.unfit or each.path.startswith(own)]
    if problems:
        text = "\n".join(map(str, problems))
        raise Failure(f"nothing was changed, for it would not be valid:\n{text}", EX_CONFIG)
    here, _ = of_this_host(reading.config, is_this_host)  # the devices of another machine are not known
    assigned = [each for each in engines_of(here.models).values() if name in (each.name, each.replica_of)]
    there = present(reading.config) if assigned else ()
    for engine in assigned:
        if why := unfit(engine, there):
            raise Failure(f"nothing was changed, for {engine.name} could never be loaded: {why}", EX_CONFIG)
    files.replace(path, new)
    return path, name


def resolve(model: str, known: dict[str, tuple[str, ...]]) -> str:
    """The model's configured name, or the name as given for a new one."""
    names = [name for name, aliases in known.items() if model == name or model in aliases]
    names = names or [name for name in known if name.endswith(f"/{model}")]
    return names[0] if len(names) == 1 else model


def place(name: str, read_files: tuple[Path, ...], main: Path) -> tuple[Path, bool]:
    """The file that configures the model, and whether its models stand at the top."""
    from vllmd.config import edit

    for path in read_files:
        text = files.read(path)
        flat = path.parent.name == "models.d" and edit.is_flat(text)
        if edit.has_model(text, name, flat):
            return path, flat
    return main, False


def restart(admin: Admin, name: str) -> bool:
    """Reload, and start the model if it was loaded."""
    loaded = models.find(admin.status(), name).state not in NO_ENGINE
    admin.ask(verb("reload"), {})
    if loaded:
        admin.ask(verb("load"), {"model": name, "wait": True})
    return loaded

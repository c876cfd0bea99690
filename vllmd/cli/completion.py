"""Shell completion, generated from the argument parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from vllmd.cli.arguments import build, verbs
from vllmd.frozen import frozen

MODEL_DESTS = ("model", "models")
FILE_DESTS = ("file", "config", "output", "socket")


@frozen
class Verb:
    """The completions of a verb: ``options`` as (spellings, help, whether it takes a value), ``words`` of arguments."""

    name: str
    about: str
    options: tuple[tuple[tuple[str, ...], str, bool], ...]
    words: tuple[str, ...]
    models: bool
    files: bool


def table() -> list[Verb]:
    """Every verb and alias with its completions."""
    rows = []
    for name, parser, about in parsers():
        options, words = [], list[str]()
        for action in parser._actions:
            if action.option_strings:
                text = (action.help or "").replace("%%", "%")
                options.append((tuple(action.option_strings), text, action.nargs != 0))
            else:
                words += [str(choice) for choice in action.choices or ()]
        dests = {action.dest for action in parser._actions}
        is_model, is_file = bool(dests & set(MODEL_DESTS)), bool(dests & set(FILE_DESTS))
        rows.append(Verb(name, about, tuple(options), tuple(words), is_model, is_file))
    return rows


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Name, parser and help of every verb and alias."""
    subparsers = next(each for each in build(verbs())._actions if isinstance(each, argparse._SubParsersAction))
    abouts = {choice.dest.partition(" ")[0]: choice.help or "" for choice in subparsers._choices_actions}
    about = ""
    for name, parser in subparsers.choices.items():
        about = abouts.get(name, about)  # an alias follows its verb
        yield name, parser, about


def script(shell: str) -> str:
    """The script that completes vllmctl in ``shell``: bash, zsh or fish."""
    return {"bash": bash, "zsh": zsh, "fish": fish}[shell]()


def bash() -> str:
    """For bash, with or without bash-completion."""
    cases = []
    for verb in table():
        words = [*verb.words, *(spelling for spellings, _, _ in verb.options for spelling in spellings)]
        extra = " models=1" * verb.models + " files=1" * verb.files
        cases.append(f"        {verb.name}) words='{' '.join(words)}'{extra} ;;")
    names = " ".join(verb.name for verb in table())
    return f"""\
# bash completion for vllmctl; made by: vllmctl completion bash
_vllmctl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} verb='' word words='' models='' files=''
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        [[ $word == -* ]] || {{ verb=$word; break; }}
    done
    case $verb in
        '') words='{names} --help --version --json --user --socket --url --key' ;;
{chr(10).join(cases)}
    esac
    [[ $models && $current != -* ]] && words+=" $(vllmctl completion models 2>/dev/null)"
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    [[ $files && ${{#COMPREPLY[@]}} == 0 ]] && mapfile -t COMPREPLY < <(compgen -f -- "$current")
    return 0
}}
complete -F _vllmctl vllmctl
"""


def zsh() -> str:
    """The completion script for zsh."""
    names = "\n".join(f"        {_quote(f'{verb.name}:{verb.about}')}" for verb in table())
    cases = []
    for verb in table():
        specs = []
        for spellings, about, value in verb.options:
            text = about.replace("[", "(").replace("]", ")").replace(":", " -")
            specs += [_quote(f"{spelling}[{text}]" + (":value:_files" if value else "")) for spelling in spellings]
        if verb.models:
            specs.append("'*:model:_vllmctl_models'")
        elif verb.words:
            specs.append(_quote(f"1:what:({' '.join(verb.words)})"))
        elif verb.files:
            specs.append("'*:file:_files'")
        cases.append(f"        {verb.name}) _arguments {' '.join(specs)} ;;")
    return f"""\
#compdef vllmctl
# zsh completion for vllmctl; made by: vllmctl completion zsh
_vllmctl_models() {{
    local -a models
    models=(${{(f)"$(vllmctl completion models 2>/dev/null)"}})
    (( $#models )) && compadd -a models
}}
_vllmctl() {{
    local -a verbs
    verbs=(
{names}
    )
    if (( CURRENT == 2 )); then
        _describe verb verbs
        return
    fi
    case ${{words[2]}} in
{chr(10).join(cases)}
    esac
}}
_vllmctl "$@"
"""


def fish() -> str:
    """The completion script for fish."""
    lines = ["# fish completion for vllmctl; made by: vllmctl completion fish", "complete -c vllmctl -f"]
    for verb in table():
        lines.append(f"complete -c vllmctl -n __fish_use_subcommand -a {verb.name} -d {_quote(verb.about)}")
        seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
        for spellings, about, value in verb.options:
            flags = " ".join(f"-l {s[2:]}" if s.startswith("--") else f"-s {s[1:]}" for s in spellings)
            lines.append(f"complete -c vllmctl {seen} {flags}{' -r' if value else ''} -d {_quote(about)}")
        if verb.words:
            lines.append(f"complete -c vllmctl {seen} -a {_quote(' '.join(verb.words))}")
        if verb.models:
            lines.append(f"complete -c vllmctl {seen} -a '(vllmctl completion models 2>/dev/null)'")
        if verb.files:
            lines.append(f"complete -c vllmctl {seen} -F")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """``text`` in single quotes, without single quotes: no way to write one works in all three shells."""
    return "'" + text.replace("'", "") + "'"

"""PyYAML as the daemon imports it: one pattern is compiled when somebody uses it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import re, sys
sys.path[:] = {path!r}
compile = re.compile
from vllmd.config import nodes, quick_yaml
import yaml
assert re.compile is compile
assert type(yaml.reader.Reader.NON_PRINTABLE) is quick_yaml.PatternLater
assert yaml.load("a: [1, 'b']", yaml.SafeLoader) == {{"a": [1, "b"]}}
assert yaml.load("a: [1, 'b']", nodes.Loader) == {{"a": [1, "b"]}}
try:
    yaml.load("a: \\x01", yaml.SafeLoader)
except yaml.reader.ReaderError as error:
    print(error.character, error.position)
"""


def test_its_own_reader_works_as_ever() -> None:
    """In a process of its own: here others have imported yaml before."""
    told = subprocess.run([sys.executable, "-I", "-S", "-c", SCRIPT.format(path=sys.path)],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (told.stdout, told.stderr) == ("1 3\n", "")

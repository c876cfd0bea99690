"""The dashboard asks for what there is."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.admin.exposed import exposed
from vllmd.admin.control import Gauges
from vllmd.admin.counters import Counters
from vllmd.core.types import DeviceView, ModelView, ReplicaView, Snapshot, State

FOLDER = Path(__file__).resolve().parents[2] / "packaging/grafana"
ENGINE = ReplicaView("m@1", State.READY, 0, (0,), 1, 0, 0, None, None, 0.0, False, (), "", "", "serving", 0.1)
VIEW = ModelView(
    *("m", State.READY, 0, (0,), 1, 0, 0, None, None, 0.0, False, (), "", "", "serving", 0.1),
    replicas=(ENGINE,),
    balanced=True,
    serving=1,
    degraded=False,
)
SNAPSHOT = Snapshot(0.0, (VIEW,), (DeviceView(0, 1, 0, 0, 0, ""),), 0, 0, ())


def known() -> set[str]:
    """The names of all families, and of the series that a histogram or counter has."""
    body, _ = exposed(Counters(), Gauges(SNAPSHOT), "")
    names = set()
    for family in text_string_to_metric_families(body.decode()):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_every_metric_on_the_dashboard_exists() -> None:
    """A renamed metric must not leave an empty panel behind."""
    dashboard = json.loads((FOLDER / "vllmd.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"vllmd_\w+", expression)}
    assert len(asked) > 15
    assert asked <= known()


def test_every_metric_of_the_alerts_exists_and_each_says_what_to_look_at() -> None:
    """A rule that asks for a metric of another name is never true, and nobody notices."""
    groups = yaml.safe_load((FOLDER.parent / "prometheus/vllmd.rules.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    asked = {name for rule in rules for name in re.findall(r"\bvllmd_\w+", rule["expr"])}
    assert len(rules) >= 8 and asked <= known()
    assert all(rule["annotations"]["summary"] and rule["annotations"]["description"] for rule in rules)


def test_it_is_up_to_date() -> None:
    """The JSON is made from a table beside it."""
    assert subprocess.run([FOLDER / "make-dashboard", "--check"]).returncode == 0

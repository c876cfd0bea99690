"""Engines' metrics under one roof: everybody's samples, each with its model."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from vllmd.admin.relabel import merged

ENGINE = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="x{y}"} 2.0
# HELP vllm:ttft_seconds Time to first token.
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{le="0.1",model="theirs"} 1
vllm:ttft_seconds_bucket{le="+Inf",model="theirs"} 2
vllm:ttft_seconds_count{model="theirs"} 2
vllm:ttft_seconds_sum{model="theirs"} 0.5
# HELP up Plain.
# TYPE up gauge
up 1.0
"""


def test_each_family_is_told_once_and_each_sample_has_its_model() -> None:
    """Prometheus refuses a text that repeats a TYPE, or that scatters a family."""
    text = merged([("a/b", ENGINE), ('say "c"', ENGINE)])
    assert text.count("# TYPE vllm:ttft_seconds histogram") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    running = families["vllm:num_requests_running"].samples
    assert [sample.labels["model"] for sample in running] == ["a/b", 'say "c"']
    assert running[0].labels["model_name"] == "x{y}"
    assert families["up"].samples[0].labels == {"model": "a/b"}
    assert len(families["vllm:ttft_seconds"].samples) == 8


def test_a_label_of_that_name_is_kept_beside_ours() -> None:
    """As Prometheus itself does when labels clash."""
    text = merged([("m", ENGINE)])
    assert 'vllm:ttft_seconds_count{model="m",exported_model="theirs"} 2' in text


def test_rubbish_and_families_without_samples_are_left_out() -> None:
    """An engine that answers something else does not spoil the others."""
    assert merged([("m", "<html>\n# TYPE lonely gauge\n\n"), ("n", "")]) == ""

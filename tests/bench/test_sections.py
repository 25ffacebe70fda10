"""What the report says of figures that are not today's, or of few requests."""

from typing import Any

import pandas as pd

from pipeline.bench import sections, side_by_side

TRIAL = {
    "error": None, "overrides": "a=1", "exact_call_fraction": 0.8, "p50_s": 0.1, "model_bytes": 1e6,
    "kl_divergence": 0.0, "on_front": True,
}  # fmt: skip

KEY = "mcnemar_p_vs_fp32"


def sweep(*rows: dict[str, Any]) -> str:
    return "\n".join(sections.sweeps({"int4": (pd.DataFrame([TRIAL | row for row in rows]), "Recommended: it.")}))


def test_a_sweep_names_the_commits_and_machines_of_its_trials() -> None:
    failed = {"error": "quantize: no", "commit": None, "machine": None}
    said = sweep({"commit": "2" * 40, "machine": "EPYC"}, {"commit": "1" * 40, "machine": "EPYC"}, failed)
    assert "at commit 1111111, 2222222 on EPYC, whose weights may differ from today's." in said
    assert "under 10% are noise" in said


def test_a_sweep_from_before_commits_were_recorded_says_so() -> None:
    assert "at an earlier, unrecorded commit, whose weights may differ from today's." in sweep({})
    assert "at an earlier, unrecorded commit, whose" in sweep({"commit": None, "machine": None})


def test_other_runtimes_are_shown_with_how_little_few_requests_tell_and_outside_git_too() -> None:
    """Without git there is no commit, of which the report asked for the first characters."""
    row = {"call_s": {"p50": 0.1, "p95": 0.2}, "prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0}
    row |= {"calls_per_s_at_20": 1.0, "model_bytes": 1e6, "peak_rss_bytes": 1e6, "load_s": 1.0}
    row |= {"prefix_cache": True, "grammar": True, "exact_call_fraction": 0.5}
    report = {"ours": {"int8": row}, "peers": {"b": row | {"exact_call_fraction": 1.0}}, "requests": 20}
    # Wilson's of 10 of 20: 1.96 / (1 + 3.84/20) * sqrt(0.25/20 + 3.84/1600) = 0.2007 to either side; of 20 of 20 less
    assert side_by_side.requests(report) == (
        "20 test requests (each is 5.0 points of exact calls; 95% Wilson intervals are up to 20 points to either side)"
    )
    found = {"benchmark": {}, "peers": report | {"provenance": {"commit": None}}}
    pictures = dict.fromkeys(("latency", "throughput", "peers"), "")
    assert "at commit unknown, whose weights" in "\n".join(sections.speed(found, pictures))


def test_layers_that_were_on_int4s_grid_before_training_are_named_as_a_limit() -> None:
    found: dict[str, Any] = {
        "cost": {"hosted": {"model": "big", "assumed_exact_fraction": 0.9}},
        "evaluate": {"fused-fp32": {"by_category": {"Read": {}, "Bash": {}, "none": {}}}},
        "cuda": {"benchmark": {}},
    }
    for nats, named in ((0, True), (1e-6, False)):
        found["quantize"] = {"int4": {"sensitivity": [{"sensitivity": 1e-4}, {"sensitivity": nats}]}}
        text = sections.not_covered(found)[1]
        assert ("rounded to INT4's grid" in text) is named
        assert "for 2 tools" in text


def test_requests_later_in_a_conversation_have_a_table_of_their_own() -> None:
    part: dict[str, Any] = {"n": 105, "apart": 105, "exact_call_fraction": 0.8, "exact_call_ci95": [0.7, 0.9]}
    part |= {"right_tool_fraction": 0.9, "must_call_fraction": 1.0, "abstain_fraction": None, "by_category": {}}
    found = {"evaluate": {"base": {}, "fused-fp32": {"later": part}, "int8": {"later": part | {KEY: 0.5}}}}
    said = "\n".join(sections.later(found))
    assert "105 requests that follow calls and their results" in said
    assert "The figures above include none of them." in said
    own = sections.later({"evaluate": {"fused-fp32": {"later": part | {"apart": 5}}}})
    assert "The figures above include 100 of them." in "\n".join(own)
    assert "80.0% (70.0% to 90.0%) | 90.0%        | 100.0%" in said
    assert "0.500" in said
    assert "base" not in said
    assert sections.later({"evaluate": {"fused-fp32": {}}}) == []


def test_the_next_call_of_a_conversation_is_shown_with_and_without_what_is_kept() -> None:
    times = {"p50": 0.2, "p95": 0.3}
    part = {"requests": 28, "mean_prompt_tokens": 120.4, "anew_call_s": times, "same_reply_fraction": None}
    kept = part | {"kept_call_s": {"p50": 0.1, "p95": 0.15}, "same_reply_fraction": 0.96}
    row = {"call_s": dict.fromkeys(("p50", "p95", "p99", "mean"), 1.0), "calls": 1, "prefill_tokens_per_s": 1.0}
    row |= {"mean_new_tokens": 1.0, "load_s": 1.0, "by_concurrency": []}
    found = {"benchmark": {"torch-fp32": row | {"later": part}, "fused-fp32": row | {"later": kept}}, "peers": None}
    said = "\n".join(sections.speed(found, dict.fromkeys(("latency", "throughput"), "")))
    assert "28 of the requests later in a conversation, 120 tokens on average" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert ["torch-fp32", "", "", "200", "300", ""] in rows
    assert ["fused-fp32", "100", "150", "200", "300", "96%"] in rows

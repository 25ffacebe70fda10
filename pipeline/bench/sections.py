"""The sections of report.md: each function returns a list of markdown paragraphs, pictures beside tables.

A new section is a new function here; it may draw its own pictures into the folder of plots and show them with
`plot.markdown`. The page folds `<details>` and puts pictures of one paragraph side by side.
"""

from typing import Any

import pandas as pd

from pipeline.bench import gpu_section, growth_section, learning_section, pareto, sensitivity, side_by_side, tables
from pipeline.bench.against import RUN_TO_RUN
from pipeline.bench.tables import BASE, BASELINE, REFERENCE

Found = dict[str, Any]
Pictures = dict[str, str]  # as markdown, by name
NOISE = f"Differences in p50 under {RUN_TO_RUN:.0%} are noise."


def everything(found: Found, faults: dict[str, str | None], chosen: str, pictures: Pictures) -> list[str]:
    """All sections after the recommendation. `chosen`: the recommended variant, else the reference."""
    return [
        *ladder(found, faults, pictures),
        *accuracy(found, chosen, pictures),
        *speed(found, pictures),
        *growth_section.markdown(found["growth"]),
        *sweeps(found["sweeps"]),
        *size(found, pictures),
        *cost(found["cost"], chosen, pictures),
        *gpu(found, chosen, pictures),
        *measured(found, chosen, pictures),
        *not_covered(found),
        "## Replies side by side",
        "Every request with a reply that is not exact, and the replies of all variants: [examples.md](examples.md).",
    ]


def ladder(found: Found, faults: dict[str, str | None], pictures: Pictures) -> list[str]:
    clients = found["benchmark"][BASELINE]["by_concurrency"][-1]["concurrency"]
    return [
        "## Variants",
        table(tables.ladder(found, faults, BASELINE)),
        f"p50 and p95: one client; calls/s: {clients} clients at once, without HTTP; `faster`: p50 vs {BASELINE}; "
        f"`passes`: the rule above. With the same weights {REFERENCE} can be more accurate than {BASELINE}: its "
        "decoding (also used by int8 and int4) is constrained to the tools' schemas, copies arguments that must occur "
        "in the request, and picks the likeliest of several candidate calls, or text; among nearly equal ones, how "
        "likely the request is after each call counts too.",
        pictures["ladder"],
        "The same tuned model in five variants, each adding one step:",
        "- torch-fp32: PyTorch eager, one token per step\n"
        "- onnx-fp32: the portable ONNX graph, one token per step\n"
        "- fused-fp32: fused attention, and a decoding loop that computes nothing already known "
        "([ablation](#ablation-of-the-techniques)); full precision, the reference for int8 and int4\n"
        "- int8: weights and most matrix products in 8 bits\n"
        "- int4: most weights in 4 bits",
    ]


def accuracy(found: Found, chosen: str, pictures: Pictures) -> list[str]:
    scored = found["evaluate"]
    different = scored[REFERENCE]["different_from_torch"]
    return [
        "## Accuracy",
        "A call is exact when the tool and all arguments are right; where no call is right, making none is exact. "
        f"{scored[REFERENCE]['n']} hand-written requests ({BASE}, the untuned model, not told the call format: "
        f"{scored[BASE]['n']} of them). keyword: the baseline, one word-matching rule per tool. Intervals: 95% Wilson. "
        f"p: exact McNemar test vs {REFERENCE} on the same requests.",
        f"{pictures['accuracy']} {pictures['category']}",
        table(tables.beside(found)),
        f"Where constrained decoding did not change the greedy reply, {REFERENCE} and {BASELINE} differ on "
        f"{len(different)} of {scored[REFERENCE]['n']} replies{': ' if different else ''}{', '.join(different)}.",
        *folded("Exact calls by category", table(tables.category(scored), index=True)),
        *folded("Requests by outcome", table(tables.outcome(found), index=True)),
        *folded(
            f"Confusion matrix of {chosen}; rows: expected tool, columns: called tool",
            table(tables.confusion(scored[chosen]), index=True),
        ),
        *later(found),
        "### Calibration of the confidence",
        "The model gives each call a confidence. First picture: the share of wrong calls when only the most confident "
        "are kept. Second: accuracy by confidence. Some confidences are rare and say little: vertical lines are "
        f"{chosen}'s 95% intervals.",
        f"{pictures['risk-coverage']} {pictures['reliability']}",
        *learning_section.markdown(found["learning"]),
    ]


def later(found: Found) -> list[str]:
    scored = {name: one["later"] for name, one in found["evaluate"].items() if "later" in one}
    if not scored:
        return []
    n = scored[REFERENCE]["n"]
    return [
        "### Later in a conversation",
        f"The most common case for agents: {n} requests that follow calls and their results. Some continue a task, "
        'some refer back ("open the second one"), some are unrelated to the conversation. The figures above include '
        f"{n - scored[REFERENCE]['apart'] or 'none'} of them.",
        table(tables.later(scored)),
        *folded("Exact calls later in a conversation by category", table(tables.category(scored), index=True)),
    ]


def speed(found: Found, pictures: Pictures) -> list[str]:
    parts = [
        "## Speed",
        "Time from request to parsed call, on this machine's CPU, with the tools' prompt cached.",
        f"{pictures['latency']} {pictures['throughput']}",
        table(tables.speed(found)),
        "With few calls, p99 is close to the slowest one. Reply tokens/s: all reply tokens over the total call time, "
        f"prompts included. There is no time to first token: except with {BASELINE} and onnx-fp32, a call is sent "
        "whole, once no other call can be better.",
        "Rounding depends on which requests are decoded together, so some quantized replies differ from those to one "
        "client. In this table, `same`: share of replies identical to those to one client; `exact`: share of all "
        "replies that are exact.",
        *folded("Throughput and latency by number of clients", table(tables.clients(found))),
    ]
    if "techniques" in pictures:
        parts += [
            "### Ablation of the techniques",
            pictures["techniques"],
            "The same requests in all configurations in turn, one client, one technique left out at a time. `same`: "
            "replies identical to those with all techniques. The grammar, the search for a likelier call and the "
            "reverse order change replies by design; other differences are rounding, which in the quantized variants "
            f"depends on the number of tokens per step. {NOISE}",
            *folded("p50 of a whole call by variant", table(tables.ablation(found), index=True)),
        ]
    if late := {name: bench["later"] for name, bench in found["benchmark"].items() if bench.get("later")}:
        one = late[REFERENCE]
        parts += [
            "### Latency of the next call in a conversation",
            f"{one['requests']} of the requests later in a conversation, {one['mean_prompt_tokens']:.0f} tokens on "
            "average, each asked right after the earlier calls, whose KV cache is kept "
            "(`techniques.conversation_tokens`), so only new tokens are computed. All other figures are without it: "
            "their requests repeat, which would make them look too fast.",
            table(tables.later_speed(late)),
        ]
    if peers := found["peers"]:
        parts += [
            "### Comparison with other runtimes",
            pictures["peers"],
            f"The same tuned model in llama.cpp, OpenVINO and others: {side_by_side.requests(peers)}, a separate run "
            f"(`make peers`) at commit {(peers['provenance']['commit'] or 'unknown')[:7]}, whose weights may differ "
            "from today's: compare within this picture only. [peers.md](peers.md) has versions and builds.",
            "For each variant, the fastest other runtime that is at least as accurate:",
            "\n".join(side_by_side.as_right(peers)),
            *folded("Best of both sides by metric", "\n".join(side_by_side.best(peers))),
            *folded("All runtimes", table(side_by_side.table(peers))),
        ]
    return parts


def size(found: Found, pictures: Pictures) -> list[str]:
    return [
        "## Size and memory",
        pictures["size"],
        "Disk: the model's files. Memory: peak resident memory of a process that only loads the model and answers one "
        "client.",
        table(tables.size(found)),
        *sensitivity.markdown(found["quantize"], pictures),
    ]


def cost(found: Found, chosen: str, pictures: Pictures) -> list[str]:
    machine, hosted = found["machine"], found["hosted"]
    whole = f"A machine rented all day costs {24 * machine['usd_per_hour']:.2f} USD, whatever its traffic"
    if hosted["break_even_calls_per_day"] is not None:
        whole += f"; above {hosted['break_even_calls_per_day']:,.0f} calls/day that is less than {hosted['model']}"
    return [
        "## Cost",
        f"Prices in USD on {machine['name']} at {machine['usd_per_hour']} per hour ({machine['provider']}, "
        f"{machine['date']}), assumed as fast as the measured machine. Calls and tokens are priced on a machine rented "
        f"all the time and busy {found['utilisation']:.0%} of it, which then answers the calls/day in the table. Its "
        "throughput is that with the clients in the table: the number with the most calls/s whose p95 is within "
        f"{found['p95_limit_s']:g} s, or the fewest if none is. Day, month and year: whole machines for "
        f"{found['tokens_per_day']:,} generated tokens per day.",
        f"{whole}.",
        f"{pictures['cost']} {pictures['cascade']}",
        table(tables.projection(found)),
        f"### Cascade: {chosen}, with a hosted model for doubtful calls",
        table(tables.cascade(found, chosen)),
        *_cascade_terms(found, chosen),
        "### When a GPU would cost less",
        f"From prices and {chosen}'s calls/s on the CPU alone, at equal utilisation: the calls/s one GPU machine must "
        f"reach before a call costs less on it than on {machine['name']}.",
        table(tables.gpu_to_pay(found, chosen)),
    ]


def sweeps(found: dict[str, tuple[pd.DataFrame, str]]) -> list[str]:
    """`found`: for each sweep, by name, its trials and the verdict on them."""
    parts = ["## Quantization settings compared"] if found else []
    for name, (trials, verdict) in found.items():
        parts += [
            f"### Sweep {name}",
            f"![Trials of the sweep {name}: exact calls by p50](sweeps/{name}/pareto.png)",
            f"{verdict} Scored on the hand-written validation requests, {_made_at(trials)}. {NOISE} `params.yaml` may "
            "have another setting: disk and memory count too.",
            *folded(f"All {len(trials)} trials", table(pareto.shown(trials))),
        ]
    return parts


def gpu(found: Found, chosen: str, pictures: Pictures) -> list[str]:
    parts = gpu_section.markdown(found["cuda"], found["cost"], chosen)
    if "latency-gpu" in pictures:
        parts.insert(2, pictures["latency-gpu"])  # after its table
    return parts


def measured(found: Found, chosen: str, pictures: Pictures) -> list[str]:
    machine, train = found["benchmark"][BASELINE]["provenance"]["machine"], found["train"]
    return [
        "## How each figure was measured",
        pictures["loss"],
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB. A call is "
        "timed from request to parsed call, with the tools' prefix cached; each variant in its own process, all in one "
        f"run. {1e3 * found['benchmark'][chosen]['harness_call_s']:.1f} ms per call are overhead outside the model "
        "(measured with a runtime whose tokens are known in advance). A fused graph decodes several clients' requests "
        f"together; otherwise they queue. {BASELINE} and onnx-fp32 decode greedily, token by token; the others "
        "constrain a call to the tools' grammar, append forced tokens in one step, verify drafts copied from the "
        "request, and pick the likeliest of several calls, or text where that is likelier; among nearly equal calls, "
        "how likely the request is after each counts too.",
        f"Training: {train['train_requests']} requests, {train['train_s'] / 60:.0f} minutes, matrix products in "
        f"{train['precision']}; {train['reverse_requests']} of them also in reverse order, the call first.",
    ]


def not_covered(found: Found) -> list[str]:
    hosted = found["cost"]["hosted"]
    tools = len(set(found["evaluate"][REFERENCE]["by_category"]) - {"none"})
    products = found["quantize"]["int4"]["sensitivity"]
    limits = [
        "The default base model came with weights in 4 bits, which flatters INT4's loss.",
        f"{hosted['model']} was not asked: its {hosted['assumed_exact_fraction']:.0%} exact calls and its tokens per "
        "call are assumed.",
        f"Test requests are in English, for {tools} tools. Single calls are scored, not whole tasks.",
        "The main tables are from one machine; growth and other runtimes name theirs. Other machines are faster or "
        "slower, and the factor differs between variants.",
        "The figures are for these tools and requests. Others need their own training and have other figures.",
    ]
    if not products or any(product["sensitivity"] == 0 for product in products):  # 0: on the grid before
        limits.insert(
            1,
            f"{REFERENCE} computes in float32, but by default its embedding and lowest layers were rounded to INT4's "
            "grid before training (train.frozen_layers, train.frozen_block_size): INT4's loss covers the other layers "
            "only, and the cost of that rounding to full precision was not measured.",
        )
    if not found["cuda"]["benchmark"]:
        limits.append("No GPU was measured.")
    return ["## Limitations", "\n".join(f"- {limit}" for limit in limits)]


def _made_at(trials: pd.DataFrame) -> str:
    """Commit and machine of a sweep's trials, where they were recorded."""
    commits, machines = (
        sorted(set(trials[key].dropna().astype(str))) if key in trials else [] for key in ("commit", "machine")
    )
    at = f"commit {', '.join(commit[:7] for commit in commits)}" if commits else "an earlier, unrecorded commit"
    return f"at {at}{' on ' if machines else ''}{', '.join(machines)}, whose weights may differ from today's"


def folded(title: str, *parts: str) -> list[str]:
    return [f"<details><summary>{title}</summary>", *parts, "</details>"]


def table(frame: pd.DataFrame, index: bool = False) -> str:
    return str(frame.to_markdown(index=index, disable_numparse=True))


def _cascade_terms(cost: Found, variant: str) -> list[str]:
    hosted, machine, priced = cost["hosted"], cost["machine"], cost["variants"][variant]
    at = ", ".join(
        f"{usd:.3f} at {float(share):.0%}" for share, usd in priced["usd_per_thousand_calls_at_utilisation"].items()
    )
    return [
        "Calls below a confidence threshold are forwarded to a hosted model; text replies stay. "
        f"{hosted['model']} ({hosted['provider']}, {hosted['date']}: {hosted['source']}) costs "
        f"{hosted['usd_per_million_input_tokens']:g} USD per million input tokens and "
        f"{hosted['usd_per_million_output_tokens']:g} per million output tokens. Assumed, not measured: "
        f"{hosted['input_tokens_per_call']} input and {hosted['output_tokens_per_call']} output tokens per call, and "
        f"{hosted['assumed_exact_fraction']:.0%} exact over all calls. Best case: it is as accurate on the forwarded, "
        "harder calls. Worst case: all its errors are among them. Both are computed on the test requests, which "
        "flatters them: choose a threshold on others.",
        "Break-even: the traffic above which one machine running all day costs less than the hosted calls it replaces; "
        f"it answers up to {priced['most_calls_per_day']:,.0f} calls/day. USD per 1,000 calls answered locally by "
        f"utilisation of {machine['name']}: {at}.",
    ]

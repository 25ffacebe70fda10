"""What report.md says, section by section: each a list of paragraphs in markdown, its pictures beside its tables.

A section more is a function more here; it may draw pictures of its own into the folder of plots and show them with
`plot.markdown`. The page folds away what stands in `<details>`, and puts pictures of one paragraph side by side.
"""

from typing import Any

import pandas as pd

from pipeline.bench import gpu_section, growth_section, learning_section, pareto, sensitivity, side_by_side, tables
from pipeline.bench.tables import BASE, BASELINE, REFERENCE

Found = dict[str, Any]
Pictures = dict[str, str]  # as markdown, by name


def everything(found: Found, faults: dict[str, str | None], chosen: str, pictures: Pictures) -> list[str]:
    """All after the recommendation. `chosen`: the variant it is about."""
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
        "Every request that not all variants answer exactly, with each one's reply: [examples.md](examples.md).",
    ]


def ladder(found: Found, faults: dict[str, str | None], pictures: Pictures) -> list[str]:
    return [
        "## The ladder",
        table(tables.ladder(found, faults, BASELINE)),
        pictures["ladder"],
        "The same tuned model five times, each step adding one thing:",
        "- torch-fp32: PyTorch, eager, a token a step\n"
        "- onnx-fp32: the portable ONNX graph, a token a step\n"
        "- fused-fp32: fused attention, and a loop that computes nothing that is already known "
        "([what each technique brings](#what-each-technique-brings)); full precision, "
        "with which the next are compared\n"
        "- int8: weights and most products in 8 bits\n"
        "- int4: most weights in 4 bits",
    ]


def accuracy(found: Found, chosen: str, pictures: Pictures) -> list[str]:
    scored = found["evaluate"]
    different = scored[REFERENCE]["different_from_torch"]
    return [
        "## Accuracy",
        "A call is exact when its tool and all its arguments are right, and where no call is right, none was made. "
        f"{scored[REFERENCE]['n']} requests written by hand ({BASE}, the untuned model: {scored[BASE]['n']} of them); "
        "keyword is a rule per tool that matches words, the thing to beat. Intervals are Wilson's at 95%; p is of the "
        f"exact McNemar test against {REFERENCE} on the same requests.",
        f"{pictures['accuracy']} {pictures['category']}",
        table(tables.beside(found)),
        f"Where decoding left the likeliest next tokens as they are, {REFERENCE} and {BASELINE} differ on "
        f"{len(different)} of {scored[REFERENCE]['n']} replies{': ' if different else ''}{', '.join(different)}.",
        *folded("By category: exact calls", table(tables.category(found), index=True)),
        *folded("By outcome: requests", table(tables.outcome(found), index=True)),
        *folded(
            f"Which tool {chosen} called; rows: the right one", table(tables.confusion(scored[chosen]), index=True)
        ),
        "### How far its confidence can be trusted",
        "The model says how sure it is of a call. First, how many are wrong if only the surest are kept; then, whether "
        "calls of a confidence are right as often as it says.",
        f"{pictures['risk-coverage']} {pictures['reliability']}",
        *learning_section.markdown(found["learning"]),
    ]


def speed(found: Found, pictures: Pictures) -> list[str]:
    parts = [
        "## Speed",
        "From the request to its parsed call, on this machine's CPU, with the tools' prompt already computed.",
        f"{pictures['latency']} {pictures['throughput']}",
        table(tables.speed(found)),
        "The p99 of few calls is close to the slowest of them.",
        *folded("By number of clients", table(tables.clients(found))),
    ]
    if "techniques" in pictures:
        parts += [
            "### What each technique brings",
            pictures["techniques"],
            "The same requests in turn, one client, one technique left out at a time; `same` in the table: replies "
            "that are those with all techniques. The grammar and the search for a likelier call change replies by "
            "design; what else differs is rounding: how many tokens a step has decides how the quantized variants "
            "round.",
            *folded("Of each variant: p50 of a whole call", table(tables.ablation(found), index=True)),
        ]
    if peers := found["peers"]:
        parts += [
            "### Beside other runtimes",
            pictures["peers"],
            f"The same tuned model in llama.cpp, OpenVINO and others: {peers['requests']} test requests, a run of its "
            f"own (`make peers`), at commit {peers['provenance']['commit'][:7]}, whose weights may not be today's: "
            "compare within this picture only. [peers.md](peers.md) has versions and builds.",
            "The fastest of them that is at least as often exact:",
            "\n".join(side_by_side.as_right(peers)),
            *folded("The best of both sides, figure by figure", "\n".join(side_by_side.best(peers))),
            *folded("All runtimes", table(side_by_side.table(peers))),
        ]
    return parts


def size(found: Found, pictures: Pictures) -> list[str]:
    return [
        "## Size and memory",
        pictures["size"],
        "The files of a model, and the most memory that its process had resident while it was measured.",
        table(tables.size(found)),
        *sensitivity.markdown(found["quantize"], pictures),
    ]


def cost(found: Found, chosen: str, pictures: Pictures) -> list[str]:
    machine = found["machine"]
    return [
        "## Cost",
        f"USD on {machine['name']} at {machine['usd_per_hour']} an hour ({machine['provider']}, {machine['date']}), "
        "taken to be as fast as the machine that was measured, rented all the time and busy "
        f"{tables.utilisation(found):.0%} of it. Day, month and year are for {tables.tokens_per_day(found):,.0f} "
        "generated tokens a day.",
        f"{pictures['cost']} {pictures['cascade']}",
        table(tables.projection(found)),
        f"### With a larger model behind {chosen}",
        table(tables.cascade(found, chosen)),
        *_cascade_terms(found, chosen),
        "### When a GPU would cost less",
        f"From prices and {chosen}'s calls/s here alone, both as busy: the calls/s that one GPU machine has to answer "
        f"before a call costs less on it than on {machine['name']}.",
        table(tables.gpu_to_pay(found, chosen)),
    ]


def sweeps(found: dict[str, tuple[pd.DataFrame, str]]) -> list[str]:
    """Of each sweep, by name: its trials, and which of them is recommended and why."""
    parts = ["## Quantization settings compared"] if found else []
    for name, (trials, verdict) in found.items():
        parts += [
            f"### Sweep {name}",
            f"![Trials of the sweep {name}: exact calls against p50](sweeps/{name}/pareto.png)",
            f"{verdict} Scored on the validation requests written by hand.",
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
        "request in to parsed call out, with the tools' prefix cached; each variant in a process of "
        f"its own, all in one run. Of a call {1e3 * found['benchmark'][chosen]['harness_call_s']:.1f} ms are not the "
        "model's (measured with a runtime whose tokens are known beforehand). A fused graph on the CPU decodes "
        "several clients' requests together; elsewhere they wait their turn. "
        f"{BASELINE} and onnx-fp32 decode token by token; the others hold a call to the tools' grammar, append "
        "what it forces in one step, check drafts copied from the request, and make of several calls the "
        "likeliest, or none where text is likelier.",
        f"Training: {train['train_requests']} requests, {train['train_s'] / 60:.0f} minutes, products in "
        f"{train['precision']}.",
    ]


def not_covered(found: Found) -> list[str]:
    hosted = found["cost"]["hosted"]
    limits = [
        "The default base's weights were in 4 bits before they got here, which flatters INT4's loss.",
        f"{hosted['model']} was not asked: that {hosted['assumed_exact_fraction']:.0%} of its calls are exact, and how "
        "many tokens they have, is assumed.",
        "One machine. Others are faster or slower, and not all variants by the same factor.",
        "These tools and these requests. Others need training of their own, and have other figures.",
    ]
    if not found["cuda"]["benchmark"]:
        limits.append("No GPU: none was measured.")
    return ["## What is not covered", "\n".join(f"- {limit}" for limit in limits)]


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
        "Calls that the model is not confident of go to a hosted model; replies in text stay. "
        f"{hosted['model']} ({hosted['provider']}, {hosted['date']}: {hosted['source']}) costs "
        f"{hosted['usd_per_million_input_tokens']:g} and {hosted['usd_per_million_output_tokens']:g} USD per million "
        f"tokens in and out. Assumed, not measured: {hosted['input_tokens_per_call']} tokens in and "
        f"{hosted['output_tokens_per_call']} out a call, {hosted['assumed_exact_fraction']:.0%} exact, also on the "
        "harder calls that are sent on.",
        "Break-even: from this traffic on, one machine that runs all day costs less "
        f"than the calls it keeps from the hosted model; it answers up to {priced['most_calls_per_day']:,.0f} a day. "
        f"USD per 1,000 calls answered here by how busy {machine['name']} is: {at}.",
    ]

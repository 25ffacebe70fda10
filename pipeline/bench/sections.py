"""What report.md says, section by section: each a list of paragraphs in markdown, its pictures beside its tables.

A section more is a function more here; it may draw pictures of its own into the folder of plots and show them with
`plot.markdown`. The page folds away what stands in `<details>`, and puts pictures of one paragraph side by side.
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
    clients = found["benchmark"][BASELINE]["by_concurrency"][-1]["concurrency"]
    return [
        "## The ladder",
        table(tables.ladder(found, faults, BASELINE)),
        f"p50 and p95 are of a call of one client, calls/s of {clients} clients at once, without HTTP; `faster` is "
        f"against {BASELINE} too; `passes` is by the rule above. With the same weights {REFERENCE} can make more exact "
        f"calls than {BASELINE}: its decoding, as that of int8 and int4, keeps to the tools' schemas, copies from the "
        "request what has to stand in it, and makes of several calls the likeliest, or none.",
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
        f"{scored[REFERENCE]['n']} requests written by hand ({BASE}, the untuned model, which nobody told how to call: "
        f"{scored[BASE]['n']} of them); keyword is a rule per tool that matches words, the thing to beat. Intervals "
        f"are Wilson's at 95%; p is of the exact McNemar test against {REFERENCE} on the same requests.",
        f"{pictures['accuracy']} {pictures['category']}",
        table(tables.beside(found)),
        f"Where decoding left the likeliest next tokens as they are, {REFERENCE} and {BASELINE} differ on "
        f"{len(different)} of {scored[REFERENCE]['n']} replies{': ' if different else ''}{', '.join(different)}.",
        *folded("By category: exact calls", table(tables.category(scored), index=True)),
        *folded("By outcome: requests", table(tables.outcome(found), index=True)),
        *folded(
            f"Which tool {chosen} called; rows: the right one", table(tables.confusion(scored[chosen]), index=True)
        ),
        *later(found),
        "### How far its confidence can be trusted",
        "The model says how sure it is of a call. First, how many are wrong if only the surest are kept; then, whether "
        "calls of a confidence are right as often as it says. Some confidences are rare, and say little: upright lines "
        f"are {chosen}'s 95% intervals.",
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
        f"What agents do most: {n} requests that come after calls and their results. Some go on with a task, some "
        'refer back ("open the second one"), some have nothing to do with what was said. In the figures above are '
        f"{n - scored[REFERENCE]['apart'] or 'none'} of them.",
        table(tables.later(scored)),
        *folded("By category: exact calls later in a conversation", table(tables.category(scored), index=True)),
    ]


def speed(found: Found, pictures: Pictures) -> list[str]:
    parts = [
        "## Speed",
        "From the request to its parsed call, on this machine's CPU, with the tools' prompt already computed.",
        f"{pictures['latency']} {pictures['throughput']}",
        table(tables.speed(found)),
        "The p99 of few calls is close to the slowest of them. Reply tokens/s: the tokens of all replies over the time "
        f"of all calls, prompts included. There is no time to the first token: but for {BASELINE} and onnx-fp32, a "
        "call is told as a whole, once it is known to be the likeliest.",
        "Requests that are decoded together share their rounding, and a few quantized replies come out otherwise than "
        "alone. In this table, `same`: replies that are those to one client; `exact`: of all that were given.",
        *folded("By number of clients", table(tables.clients(found))),
    ]
    if "techniques" in pictures:
        parts += [
            "### What each technique brings",
            pictures["techniques"],
            "The same requests in turn, one client, one technique left out at a time; `same` in the table: replies "
            "that are those with all techniques. The grammar and the search for a likelier call change replies by "
            "design; what else differs is rounding: how many tokens a step has decides how the quantized variants "
            f"round. {NOISE}",
            *folded("Of each variant: p50 of a whole call", table(tables.ablation(found), index=True)),
        ]
    if late := {name: bench["later"] for name, bench in found["benchmark"].items() if bench.get("later")}:
        one = late[REFERENCE]
        parts += [
            "### The next call of a conversation",
            f"{one['requests']} of the requests that come later in a conversation, "
            f"{one['mean_prompt_tokens']:.0f} tokens each, the calls before them just made. What these left in the KV "
            "cache is kept (`techniques.conversation_tokens`), so that only what is new is computed. All other figures "
            "are without: their requests come again and again, which would make them too good.",
            table(tables.later_speed(late)),
        ]
    if peers := found["peers"]:
        parts += [
            "### Beside other runtimes",
            pictures["peers"],
            f"The same tuned model in llama.cpp, OpenVINO and others: {side_by_side.requests(peers)}, a run of its own "
            f"(`make peers`), at commit {(peers['provenance']['commit'] or 'unknown')[:7]}, whose weights may not be "
            "today's: compare within this picture only. [peers.md](peers.md) has versions and builds.",
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
        "The files of a model, and the most memory that was resident in a process which loads it, makes the calls of "
        "one client and does nothing else.",
        table(tables.size(found)),
        *sensitivity.markdown(found["quantize"], pictures),
    ]


def cost(found: Found, chosen: str, pictures: Pictures) -> list[str]:
    machine, hosted = found["machine"], found["hosted"]
    whole = f"A machine that is rented all day costs {24 * machine['usd_per_hour']:.2f} USD, however few its calls"
    if hosted["break_even_calls_per_day"] is not None:
        whole += f"; above {hosted['break_even_calls_per_day']:,.0f} calls a day that is less than {hosted['model']}"
    return [
        "## Cost",
        f"USD on {machine['name']} at {machine['usd_per_hour']} an hour ({machine['provider']}, {machine['date']}), "
        "taken to be as fast as the machine that was measured. Calls and tokens are priced on one that is rented all "
        f"the time and busy {found['utilisation']:.0%} of it, which then answers the calls a day in the table. Its "
        "speed is that with the clients in the table: the number with the most calls/s whose p95 is within "
        f"{found['p95_limit_s']:g} s, or the fewest where none is. Day, month and year: whole machines for "
        f"{found['tokens_per_day']:,} generated tokens a day.",
        f"{whole}.",
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
            f"{verdict} Scored on the validation requests written by hand, {_made_at(trials)}. {NOISE} The setting in "
            "`params.yaml` may be another: disk and memory count too.",
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
        "model's (measured with a runtime whose tokens are known beforehand). A fused graph decodes several "
        "clients' requests together; elsewhere they wait their turn. "
        f"{BASELINE} and onnx-fp32 decode token by token; the others hold a call to the tools' grammar, append "
        "what it forces in one step, check drafts copied from the request, and make of several calls the "
        "likeliest, or none where text is likelier.",
        f"Training: {train['train_requests']} requests, {train['train_s'] / 60:.0f} minutes, products in "
        f"{train['precision']}.",
    ]


def not_covered(found: Found) -> list[str]:
    hosted = found["cost"]["hosted"]
    tools = len(set(found["evaluate"][REFERENCE]["by_category"]) - {"none"})
    products = found["quantize"]["int4"]["sensitivity"]
    limits = [
        "The default base's weights were in 4 bits before they got here, which flatters INT4's loss.",
        f"{hosted['model']} was not asked: that {hosted['assumed_exact_fraction']:.0%} of its calls are exact, and how "
        "many tokens they have, is assumed.",
        f"Test requests are in English, for {tools} tools. A call is scored by itself, and no whole task.",
        "The main tables are of one machine; growth and other runtimes name theirs. Others are faster or slower, and "
        "not all variants by the same factor.",
        "These tools and these requests. Others need training of their own, and have other figures.",
    ]
    if not products or any(product["sensitivity"] == 0 for product in products):  # such a one was on the grid before
        limits.insert(
            1,
            f"{REFERENCE} computes in float32, but by default its embedding and lowest layers were rounded to INT4's "
            "grid before training (train.frozen_layers, train.frozen_block_size): INT4's loss is that of the other "
            "layers only, and what the rounding costs full precision was not measured.",
        )
    if not found["cuda"]["benchmark"]:
        limits.append("No GPU: none was measured.")
    return ["## What is not covered", "\n".join(f"- {limit}" for limit in limits)]


def _made_at(trials: pd.DataFrame) -> str:
    """Commit and machine of a sweep's trials, where they were recorded."""
    commits, machines = (
        sorted(set(trials[key].dropna().astype(str))) if key in trials else [] for key in ("commit", "machine")
    )
    at = f"commit {', '.join(commit[:7] for commit in commits)}" if commits else "an earlier, unrecorded commit"
    return f"at {at}{' on ' if machines else ''}{', '.join(machines)}, whose weights may not be today's"


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
        f"{hosted['output_tokens_per_call']} out a call, and that of all calls it is right on "
        f"{hosted['assumed_exact_fraction']:.0%}. At best it is so on the hard calls too that are sent on; at worst "
        "all that it gets wrong are among these. What a threshold gives is read off the test requests themselves, "
        "which flatters both: choose one on others.",
        "Break-even: from this traffic on, one machine that runs all day costs less "
        f"than the calls it keeps from the hosted model; it answers up to {priced['most_calls_per_day']:,.0f} a day. "
        f"USD per 1,000 calls answered here by how busy {machine['name']} is: {at}.",
    ]

"""Stage `prepare`: make training requests from phrasings, and check those written by hand.

Reads data/tools.json and data/requests; writes reports/prepare.json and, in data/prepared, {train,validation}.jsonl,
{test,validation-hand}.jsonl and, for requests later in a conversation, {test,validation-hand}-later.jsonl. If
paths.requests is a single file (a user's own), it is split instead. Input that a later stage would refuse fails here.
"""

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer
from omegaconf import DictConfig
from tqdm import tqdm

from pipeline import config, files
from pipeline.provenance import provenance
from pipeline.toolcall import compact, copies
from pipeline.toolcall.conversation import NONE, Request, parse_messages, parse_request
from pipeline.toolcall.grammar import Grammar
from pipeline.toolcall.prompt import request_text
from pipeline.toolcall.reply import parse_call
from pipeline.toolcall.requests import read_requests
from pipeline.toolcall.slots import NAME, SLOT, Draw, Record, check_slots
from pipeline.toolcall.tool import Tool, find_tool, parse_tools

log = logging.getLogger(__name__)

HAND_WRITTEN = ("test", "validation-hand")
LATER = tuple(f"{name}-later" for name in HAND_WRITTEN)  # optional: missing files are written empty
OWN_FRACTIONS = {"test": 0.2, "validation-hand": 0.1}  # of the conversations in a user's own file
VARIATIONS = 3  # of the list of tools, per tool that is called
MISSPELT = 3  # words of a request, at most
NEXT_KEY = dict(zip("qwertyuioasdfghjkzxcvbn", "wertyuiopsdfghjklxcvbnm", strict=True))
CONTRACTED = ("d", "ll", "m", "re", "s", "t", "ve")  # endings after an apostrophe


@dataclass
class PrepareConfig:
    seed: int
    requests: int  # to make, training and validation together
    validation_fraction: float  # of the phrasings
    none_fraction: float  # of the requests: no call is right
    foreign_fraction: float  # of the requests: with their own tools instead of paths.tools
    later_fraction: float  # of the requests: later in a conversation, and dependent on earlier turns
    history_fraction: float  # of single-turn requests: put after an unrelated conversation
    varied_tools_fraction: float  # of those with the tools of paths.tools: in another order, some left out
    frame_fraction: float  # of the requests: with a greeting or context around
    noise_fraction: float  # of the requests: misspelt, in lower case or without punctuation, slots excepted

    def __post_init__(self) -> None:
        config.require_range("prepare.requests", self.requests, 20, 10_000_000)
        config.require_range("prepare.validation_fraction", self.validation_fraction, 0.01, 0.5)
        for name in ("none", "foreign", "later", "history", "varied_tools", "frame", "noise"):
            config.require_range(f"prepare.{name}_fraction", getattr(self, f"{name}_fraction"), 0, 1)
        fixed = self.none_fraction + self.foreign_fraction + self.later_fraction
        if fixed > 1:
            raise ValueError(f"prepare.none_fraction, foreign_fraction and later_fraction add up to {fixed:g}, over 1")


@dataclass
class Params:
    paths: config.Paths
    prepare: PrepareConfig


@dataclass(frozen=True)
class Phrasing:
    where: str
    value: dict[str, Any]


def run(tools_file: Path, requests: Path, out: Path, report: Path, cfg: PrepareConfig) -> dict[str, Any]:
    tools = parse_tools(files.read_json(tools_file), str(tools_file))
    if requests.is_file():
        made, hand, counts = split_own(read_requests(requests, tools), requests, cfg)
    else:
        made, hand, counts = make_splits(requests, tools, cfg)
    named = [
        (f"{requests}: {name}: request {request.id}", request)
        for name, group in (made | hand).items()
        for request in group
    ]
    require_grammars([(str(tools_file), tools), *((where, request.tools) for where, request in named)])
    require_readable(named)
    if bare := [request.id for group in made.values() for request in group if not (request.expected or request.reply)]:
        raise ValueError(f"{requests}: to train on requests without a right call, they need a reply: {bare[:5]}")
    if unsayable := [where for where, request in named if not can_be_said(request)]:
        log.warning(
            "%d right calls can never be made: an argument that is always a copy (x-copy) is not in the request: %s",
            len(unsayable),
            unsayable[:5],
        )
    with files.whole_folder(out) as folder:
        for name, group in (made | hand).items():
            files.write_jsonl(folder / f"{name}.jsonl", (request.to_json() for request in group))
    metrics = {
        "requests": {name: len(group) for name, group in (made | hand).items()},
        "train_by_category": dict(Counter(request.category for request in made["train"]).most_common(7)),
        **counts,
        "overlap": _overlap(made | hand),
    }
    files.write_json(report, metrics | {"provenance": provenance(cfg)})
    log.info("%s requests in %s", metrics["requests"], out)
    return metrics


Splits = dict[str, list[Request]]
Conversation = tuple[tuple[str, str], ...]  # roles and texts, in lower case


def make_splits(
    folder: Path, tools: tuple[Tool, ...], cfg: PrepareConfig
) -> tuple[Splits, Splits, dict[str, dict[str, int]]]:
    """Requests made from phrasings, those written by hand, and the number of phrasings per split."""
    hand: Splits = {}
    for name in (*HAND_WRITTEN, *LATER):
        file = folder / f"{name}.jsonl"
        hand[name] = [] if name in LATER and not file.exists() else read_requests(file, tools)
    slots = read_slots(folder / "slots")
    phrasings = read_phrasings(folder / "train")
    rng = random.Random(cfg.seed)
    held_out, kept = split(phrasings, cfg.validation_fraction, rng)
    taken = {conversation_of(request) for group in hand.values() for request in group}
    n_validation = round(cfg.requests * cfg.validation_fraction)
    made = {
        "train": make(kept, slots, tools, cfg, (cfg.requests - n_validation, rng, taken)),
        "validation": make(held_out, slots, tools, cfg, (n_validation, rng, taken)),
    }
    return made, hand, {"phrasings": {"train": len(kept), "validation": len(held_out)}}


def split_own(
    requests: list[Request], path: Path, cfg: PrepareConfig
) -> tuple[Splits, Splits, dict[str, dict[str, int]]]:
    """Split a user's requests at random into four parts; repeated conversations are dropped and counted.

    An agent logs each turn with all before it, so requests that begin with the same user message stay in one part.
    Those later in a conversation stay among the rest: their separate files (LATER) are empty.
    Raises ValueError if a part is left empty.
    """
    different = {conversation_of(request): request for request in requests}
    if dropped := len(requests) - len(different):
        log.warning("%s: %d of %d requests dropped: the same conversation comes again", path, dropped, len(requests))
    begun: dict[tuple[str, str], list[Request]] = {}
    for conversation, request in different.items():
        first = next((turn for turn in conversation if turn[0] == "user"), conversation[0])
        begun.setdefault(first, []).append(request)
    conversations = list(begun.values())
    random.Random(cfg.seed).shuffle(conversations)
    fractions = OWN_FRACTIONS | {"validation": cfg.validation_fraction}
    parts: Splits = {}
    at = 0
    for name, fraction in fractions.items():
        n = round(len(conversations) * fraction)
        parts[name] = list(chain(*conversations[at : at + n]))
        at += n
    parts["train"] = list(chain(*conversations[at:]))
    if empty := [name for name, part in parts.items() if not part]:
        raise ValueError(
            f"{path}: {len(different)} different requests, which begin in {len(conversations)} ways, "
            f"leave these parts empty: {empty}"
        )
    made, hand = ({name: parts[name] for name in names} for names in (("train", "validation"), HAND_WRITTEN))
    return made, hand | {name: [] for name in LATER}, {"own_requests": {"read": len(requests), "dropped": dropped}}


def require_grammars(lists: Iterable[tuple[str, Sequence[Tool]]]) -> None:
    """Raises ValueError naming the place of a list of tools from which no grammar can be made."""
    vocabulary = LLTokenizer("byte", slices=[])  # a grammar that compiles for bytes does so for any tokenizer
    held: set[str] = set()
    for where, tools in lists:
        key = json.dumps([tool.to_json() for tool in tools])
        if key not in held:
            held.add(key)
            try:
                Grammar(vocabulary, tools)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


def require_readable(requests: Iterable[tuple[str, Request]]) -> None:
    """Raises ValueError naming a request whose right call, in the model's format, is parsed as another call."""
    for where, request in requests:
        if request.expected:
            text = compact.write(request.expected, request.tools, request_text(request.messages))
            if compact.read(text, request.tools) != request.expected:
                raise ValueError(f"{where}: expected: the model cannot write this call: {text!r} is read as another")


def can_be_said(request: Request) -> bool:
    """Whether the grammar allows its right call."""
    tool = find_tool(request.tools, request.expected.name) if request.expected else None
    if request.expected is None or tool is None:
        return True
    properties, text = tool.parameters.get("properties", {}), request_text(request.messages)
    return all(
        copies.can_be_said(properties.get(name), value, text) for name, value in request.expected.arguments.items()
    )


def read_phrasings(folder: Path) -> list[Phrasing]:
    """Raises ValueError naming file, line and field of a phrasing that breaks the format."""
    phrasings = []
    for path in sorted(folder.glob("*.jsonl")):
        for where, value in files.read_jsonl(path):
            for field in ("id", "category", "messages", "expected"):
                if not isinstance(value, dict) or field not in value:
                    raise ValueError(f"{where}: {field}: missing")
            parse_messages(value["messages"], f"{where}: messages")
            check_slots(value, where)
            phrasings.append(Phrasing(where, value))
    if not phrasings:
        raise ValueError(f"{folder}: holds no phrasing")
    return phrasings


def read_slots(folder: Path) -> dict[str, list[Record]]:
    """Raises ValueError naming a file that is empty, has a name no slot can have, or holds a malformed slot."""
    slots: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.txt")):
        slots[path.stem] = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    for path in sorted(folder.glob("*.jsonl")):
        slots[path.stem] = [record for _, record in files.read_jsonl(path)]
    if wrong := [name for name in slots if not NAME.fullmatch(name)]:
        raise ValueError(f"{folder}: a slot's name is of a-z and _, got files named {wrong}")
    for name, records in slots.items():
        check_slots(records, f"{folder}: slot {name}")
    if empty := [name for name, records in slots.items() if not records]:
        raise ValueError(f"{folder}: slots without a line: {empty}")
    return slots


def split(phrasings: list[Phrasing], fraction: float, rng: random.Random) -> tuple[list[Phrasing], list[Phrasing]]:
    """Phrasings held out and kept, split within each category; no template is on both sides.

    Raises ValueError if a category has too few phrasings to give each side one.
    """
    held_out, kept = [], []
    for kind, group in _by_kind(phrasings).items():
        rng.shuffle(group)
        n = round(len(group) * fraction)
        if not (kind == "later" or n) or n == len(group):
            raise ValueError(
                f"{group[0].where}: {len(group)} phrasings of {kind!r} at "
                f"prepare.validation_fraction={fraction} leave a part empty"
            )
        held_out += group[:n]
        kept += group[n:]
    return held_out, kept


def make(
    phrasings: list[Phrasing],
    slots: dict[str, list[Record]],
    tools: tuple[Tool, ...],
    cfg: PrepareConfig,
    quota: tuple[int, random.Random, set[Conversation]],
) -> list[Request]:
    """`quota`: how many, the generator, and the conversations not to be made again, to which new ones are added.

    A single request among these may not be the last turn of a new conversation either.
    """
    n, rng, taken = quota
    single = frozenset(taken)
    kinds = _by_kind(phrasings)
    done = [phrasing for phrasing in kinds.get("later", []) if phrasing.value["expected"] is None]
    names = sorted(kinds)
    weights = _weights(kinds, cfg)
    turns = {name: _endless(kinds[name], rng) for name in names}
    requests: list[Request] = []
    tries = 0
    with tqdm(total=n, desc="making requests", mininterval=2) as progress:
        while len(requests) < n:
            tries += 1
            if tries > 20 * n + 1000:
                raise ValueError(f"only {len(requests)} of {n} requests differ: more phrasings or slots are needed")
            phrasing = next(turns[rng.choices(names, weights)[0]])
            request = fill(phrasing, slots, tools, cfg, (len(requests), rng))
            if done and len(request.messages) == 1 and request.tools == tools and rng.random() < cfg.history_fraction:
                before = fill(rng.choice(done), slots, tools, cfg, (len(requests), rng))
                answer = {"role": "assistant", "content": str(before.reply)}
                request = replace(request, messages=(*before.messages, answer, *request.messages))
            if conversation_of(request) in taken or conversation_of(request)[-1:] in single:
                continue
            taken.add(conversation_of(request))
            requests.append(request)
            progress.update()
    return requests


def _endless(phrasings: list[Phrasing], rng: random.Random) -> Iterator[Phrasing]:
    """Each in turn, reshuffled every round, so that all are used equally often."""
    while True:
        yield from rng.sample(phrasings, len(phrasings))


def _weights(kinds: dict[str, list[Phrasing]], cfg: PrepareConfig) -> list[float]:
    """Sampling weights by sorted name. A tool with 16 times the phrasings of another gets 8 times the requests."""
    fixed = {NONE: cfg.none_fraction, "foreign": cfg.foreign_fraction, "later": cfg.later_fraction}
    calls = {name: len(group) ** 0.75 for name, group in kinds.items() if name not in fixed}
    left = 1 - sum(fixed[name] for name in kinds if name in fixed)
    return [fixed.get(name, left * calls.get(name, 0) / max(1, sum(calls.values()))) for name in sorted(kinds)]


def fill(
    phrasing: Phrasing,
    slots: dict[str, list[Record]],
    tools: tuple[Tool, ...],
    cfg: PrepareConfig,
    nth: tuple[int, random.Random],
) -> Request:
    number, rng = nth
    draw = Draw(slots, rng, phrasing.where)
    value = dict(phrasing.value)
    messages = [dict(message) for message in value["messages"]]
    text = messages[-1]["content"]
    typed = messages[-1]["role"] == "user"
    if typed and rng.random() < cfg.noise_fraction:
        text = add_noise(text, rng, frozenset(words(value["expected"] or {})))
    if typed and rng.random() < cfg.frame_fraction and "frame" in slots and "\n" not in text:
        text = _frame(text, str(rng.choice(slots["frame"])), value)
    messages[-1]["content"] = text
    value["messages"] = messages
    filled = draw.fill(value)
    filled["id"] = f"{value['id']}-{number}"
    request = parse_request(filled, tools, phrasing.where)
    if "tools" not in value and rng.random() < cfg.varied_tools_fraction:
        request = replace(request, tools=vary_tools(request, rng))
    return request


def _frame(text: str, frame: str, value: dict[str, Any]) -> str:
    """Nothing is added after a request that ends in a slot: the end of the slot's text would be unclear."""
    before, after = frame.split("{{request}}")
    if after and (value["expected"] is None or text.rstrip("`'\". ").endswith("}}")):
        after = ""
    return before + text + after


def add_noise(text: str, rng: random.Random, kept: frozenset[str] = frozenset()) -> str:
    """`text` in lower case, or without apostrophes and final punctuation, or with one to three words misspelt.

    Slots and the words in `kept` are not changed.
    """
    parts = _words(text)
    match rng.randrange(4):
        case 0:
            parts = [part if SLOT.fullmatch(part) or part in kept else _lower_first(part) for part in parts]
        case 1:
            for at in range(1, len(parts) - 1):
                if parts[at] == "'" and parts[at + 1] in CONTRACTED and parts[at - 1] not in kept:
                    parts[at] = ""
            if len(parts) > 2 and parts[-2] in (".", "!") and parts[-3] not in kept:
                parts[-2] = ""
        case _:
            plain = [at for at, part in enumerate(parts) if part.isalpha() and len(part) > 3 and part not in kept]
            for at in rng.sample(plain, min(len(plain), rng.randint(1, MISSPELT))):
                parts[at] = _misspell(parts[at], rng)
    return "".join(parts)


def words(call: dict[str, Any]) -> list[str]:
    """Words of a call's arguments: its request may contain them."""
    return _words(" ".join(value for value in call.get("arguments", {}).values() if isinstance(value, str)))


def _words(text: str) -> list[str]:
    return re.split(r"(\{\{[^}]*\}\}|[^A-Za-z{}]+)", text)


def _lower_first(word: str) -> str:
    return word.lower() if word.istitle() else word


def _misspell(word: str, rng: random.Random) -> str:
    """Two letters swapped, one missing, one doubled, or one replaced by the next key's."""
    at = rng.randrange(1, len(word) - 1)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    swapped = before + after[0] + letter + after[1:]
    return rng.choice(
        [swapped, before + after, before + letter + letter + after, before + NEXT_KEY.get(letter, letter) + after]
    )


def vary_tools(request: Request, rng: random.Random) -> tuple[Tool, ...]:
    """The tools in another order; if a call is right, without some that neither it nor an earlier call needs.

    Limited to VARIATIONS, so that enough training requests have the same tools and can share their prefix.
    """
    rng = random.Random(rng.randrange(VARIATIONS))
    tools = list(request.tools)
    rng.shuffle(tools)
    if request.expected is None:
        return tuple(tools)
    earlier = (parse_call(said["content"]) for said in request.messages if said["role"] == "assistant")
    needed = {request.expected.name, *(call.name for call in earlier if call)}
    others = [tool for tool in tools if tool.name not in needed]
    left_out = {tool.name for tool in others[: rng.randrange(len(others))]} if others else set()
    return tuple(tool for tool in tools if tool.name not in left_out)


def _by_kind(phrasings: list[Phrasing]) -> dict[str, list[Phrasing]]:
    kinds: dict[str, list[Phrasing]] = {}
    for phrasing in phrasings:
        kind = phrasing.value["category"]
        if len(phrasing.value["messages"]) > 1:
            kind = "later"
        if "tools" in phrasing.value:
            kind = "foreign"
        kinds.setdefault(kind, []).append(phrasing)
    return kinds


def conversation_of(request: Request) -> Conversation:
    return tuple((message["role"], message["content"].strip().lower()) for message in request.messages)


def _overlap(groups: Splits) -> int:
    """Number of conversations that are in more than one split."""
    found = Counter(chain(*({conversation_of(request) for request in group} for group in groups.values())))
    return sum(1 for count in found.values() if count > 1)


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    paths = params.paths
    run(paths.tools, paths.requests, paths.prepared, paths.reports / "prepare.json", params.prepare)


if __name__ == "__main__":
    main()

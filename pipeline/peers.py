"""Measure other runtimes beside ours: the same weights, the same requests, in one run. Not a stage.

    make peers                                  all of them
    python -m pipeline.peers peers.names=[llama.cpp-Q8_0] peers.requests=3

Each peer runs in its own process (pipeline/peer/) and decodes greedily, with a prefix cache and a grammar if it has
them. Its replies in full precision must agree with ours; a peer whose replies do not, or that cannot be installed, is
left out, and the report says why.
Writes reports/peers.json, peers.md and peers.png, and the peers' models into models/peers.
"""

import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import side_by_side
from pipeline.bench.accuracy import Answer, row
from pipeline.bench.statistics import percentiles
from pipeline.benchmark import FOLDERS, HELD, BenchmarkConfig
from pipeline.model.gguf_export import export_gguf
from pipeline.provenance import machine, provenance
from pipeline.runtime.generation import Techniques
from pipeline.toolcall import compact, prompt
from pipeline.toolcall.conversation import Request, parse_request
from pipeline.toolcall.gbnf import gbnf
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.score import Outcome
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool

log = logging.getLogger(__name__)

SCRIPTS = Path(__file__).with_name("peer")
REFERENCE = "torch-fp32"  # our variant, whose replies a peer's full-precision replies must agree with
CLIENTS = 20
# llama.cpp built for AMX was seen to crash (segmentation fault) on prompts longer than one token.
WITHOUT_AMX = (
    "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON "
    "-DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
)
LLAMA_CPP = ("llama-cpp-python==0.3.36", "numpy==2.4.6")
OPENVINO = ("openvino-genai==2026.4.1.0", "numpy==2.4.6")


@dataclass(frozen=True)
class Peer:
    script: str
    weights: str  # a GGUF type, a precision of onnxruntime-genai's builder, or a folder of models
    full: str  # full-precision weights, to check its replies with
    packages: tuple[str, ...] = ()  # for its own environment; empty: it uses the project's
    grammar: bool = False
    compile: bool = False


PEERS = {
    **{
        f"llama.cpp-{weights}": Peer("run_llama_cpp", weights, "F32", LLAMA_CPP, grammar=True)
        for weights in ("Q8_0", "Q4_0", "Q4_K_M")
    },
    **{
        f"openvino-{weights}": Peer("run_openvino", weights, "F16", OPENVINO, grammar=True)
        for weights in ("Q8_0", "Q4_0")
    },
    "genai-int4": Peer("run_genai", "int4", "fp32"),
    "optimum-fp32": Peer("run_optimum", "onnx", "onnx"),
    "transformers-eager": Peer("run_transformers", "tuned", "tuned"),
    "transformers-compiled": Peer("run_transformers", "tuned", "tuned", compile=True),
}


class LeftOutError(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass
class PeersConfig:
    names: list[str]
    environments: Path
    requests: int | None  # empty: benchmark.requests
    check_requests: int  # how many of them to compare full-precision replies on
    min_same_reply_fraction: float

    def __post_init__(self) -> None:
        for name in self.names:
            config.require_one_of("peers.names", name, list(PEERS))
        config.require_range("peers.requests", self.requests or 1, 1, 1_000_000)
        config.require_range("peers.check_requests", self.check_requests, 1, 1_000_000)
        config.require_range("peers.min_same_reply_fraction", self.min_same_reply_fraction, 0, 1)


@dataclass
class Params:
    paths: config.Paths
    techniques: Techniques
    benchmark: BenchmarkConfig
    peers: PeersConfig


class Workshop:
    """Makes the peers' models and environments, and runs their scripts."""

    def __init__(self, paths: config.Paths, environments: Path) -> None:
        self._paths, self._environments = paths, environments
        self._models = paths.models / "peers"
        self._made: dict[str, Path] = {}
        self._failed: dict[str, str] = {}  # scripts whose packages cannot be installed, and why
        self._models.mkdir(parents=True, exist_ok=True)

    def python(self, peer: Peer) -> str:
        """The interpreter of its environment, which is made anew if absent or of other versions."""
        if not peer.packages:
            return sys.executable
        folder = self._environments / peer.script
        installed, wanted = folder / "installed", " ".join([*peer.packages, self.flags(peer)])
        python = str(folder / "bin" / "python")
        if installed.exists() and installed.read_text(encoding="utf-8") == wanted:
            return python
        if peer.script not in self._failed:
            try:
                self._install(peer, folder, python)
            except LeftOutError as why:
                self._failed[peer.script] = str(why)
            else:
                files.write_text(installed, wanted)
                return python
        raise LeftOutError(self._failed[peer.script])

    def _install(self, peer: Peer, folder: Path, python: str) -> None:
        if peer.packages == LLAMA_CPP and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise LeftOutError("llama-cpp-python has to be built, and no C++ compiler was found")
        log.info("installing %s into %s ...", " ".join(peer.packages), folder)
        shutil.rmtree(folder, ignore_errors=True)
        _call([sys.executable, "-m", "venv", str(folder)])
        flags = {"CMAKE_ARGS": self.flags(peer)} if peer.packages == LLAMA_CPP else {}
        _call([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *peer.packages], flags)

    def flags(self, peer: Peer) -> str:
        amx = "amx_int8" in machine()["instruction_sets"]
        if peer.packages == LLAMA_CPP:
            return f"-DLLAVA_BUILD=OFF {WITHOUT_AMX if amx else '-DGGML_NATIVE=ON'}"
        return "int4: block 32, accuracy_level 4" if peer.weights == "int4" else ""

    def model(self, peer: Peer, weights: str) -> Path:
        """The model's path; made anew in each run, as the tuned model may have changed."""
        if weights in ("onnx", "tuned"):
            return self._paths.models / weights
        if weights not in self._made:
            log.info("writing %s weights ...", weights)
            self._made[weights] = self._make(peer, weights)
        return self._made[weights]

    def _make(self, peer: Peer, weights: str) -> Path:
        tuned, script = self._paths.models / "tuned", str(SCRIPTS / f"{peer.script}.py")
        if weights in ("fp32", "int4"):
            out = self._models / f"genai-{weights}"
            shutil.rmtree(out, ignore_errors=True)
            _call([self.python(peer), script, "build", str(tuned), str(out), weights])
            return out
        out = self._models / f"model.{weights}.gguf"
        if weights == "Q4_K_M":
            _call([self.python(peer), script, "quantize", str(self.model(peer, "F32")), str(out)])
        else:
            try:
                export_gguf(tuned, out, weights)
            except ValueError as why:  # the export does not support this model
                raise LeftOutError(str(why)) from why
        return out

    def measure(self, script: Sequence[str], work: dict[str, Any]) -> dict[str, Any]:
        asked, told = self._models / "work.json", self._models / "replies.json"
        told.unlink(missing_ok=True)
        files.write_json(asked, work)
        _call([*script, str(asked), str(told)])
        return dict(files.read_json(told))


def run(paths: config.Paths, techniques: Techniques, benchmark: BenchmarkConfig, cfg: PeersConfig) -> dict[str, Any]:
    tokenizer = Tokenizer(paths.models / "tuned")
    warmup, requests, many = read_requests(paths.prepared / "test.jsonl", cfg.requests or benchmark.requests, benchmark)
    workshop = Workshop(paths, cfg.environments)
    scored = Scored(requests, tokenizer)
    work = work_of({"warmup": warmup, "requests": requests, "many": many}, tokenizer, benchmark)
    more: dict[bool, dict[str, Any]] = {
        True: {"techniques": asdict(replace(techniques, conversation_tokens=0)), "together": benchmark.together},
        False: {"techniques": None, "together": 0},
    }
    ours: dict[str, Any] = {}
    reference: list[list[int]] = []
    for variant in FOLDERS:
        log.info("%s ...", variant)
        model = {"model": str(paths.models / FOLDERS[variant]), "tools": str(paths.tools)}
        found = workshop.measure([sys.executable, "-m", "pipeline.peer.run_ours"], work | model | more[variant in HELD])
        ours[variant] = {
            "weights": variant,
            "model_bytes": weights_bytes(paths.models / FOLDERS[variant]),
            **scored.figures(found),
        }
        if variant == REFERENCE:
            reference = [reply["tokens"] for reply in found["replies"][: cfg.check_requests]]
    peers: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in cfg.names:
        log.info("%s ...", name)
        try:
            peers[name] = beside(workshop, PEERS[name], work, reference, scored, cfg)
        except LeftOutError as why:
            log.warning("%s is left out: %s", name, why)
            left_out[name] = str(why)
    report = {
        "ours": ours,
        "peers": peers,
        "left_out": left_out,
        "requests": len(requests),
        "check_requests": len(reference),
        "provenance": provenance((techniques, benchmark, cfg)),
    }
    files.write_json(paths.reports / "peers.json", report)
    files.write_text(paths.reports / "peers.md", side_by_side.markdown(report))
    side_by_side.plot(report, paths.reports / "peers.png")
    log.info("%d peers measured, %d left out; see %s", len(peers), len(left_out), paths.reports / "peers.md")
    return report


def read_requests(path: Path, n: int, benchmark: BenchmarkConfig) -> Iterator[list[Request]]:
    """Requests for warm-up, for one client and for many; none repeats if the file holds enough."""
    sizes = (benchmark.warmup_calls, n, CLIENTS * benchmark.calls_per_client)
    read = files.read_spread(path, sum(sizes))
    found = [parse_request(value, (), where) for where, value in read]
    random.Random(0).shuffle(found)
    endless = cycle(found)
    return (list(islice(endless, size)) for size in sizes)


def work_of(sets: dict[str, list[Request]], tokenizer: Tokenizer, benchmark: BenchmarkConfig) -> dict[str, Any]:
    """The work that every script gets (pipeline/peer/harness.py), grammars included."""
    asked = {name: [_asked(request, tokenizer, benchmark) for request in requests] for name, requests in sets.items()}
    longest = max(len(one["prompt"]) for some in asked.values() for one in some) + benchmark.max_new_tokens
    return {
        **asked,
        "longest": longest,
        "threads": benchmark.threads,
        "clients": CLIENTS,
        "end": tokenizer.eos_token_id,
        "vocabulary": len(tokenizer),
        "grammar": True,
        "speed": True,
        "exact": False,
    }


def _asked(request: Request, tokenizer: Tokenizer, benchmark: BenchmarkConfig) -> dict[str, Any]:
    prefix = prompt.prefix_tokens(tokenizer, request.tools)
    return {
        "prompt": prefix + prompt.request_tokens(tokenizer, request.messages, request.tools),
        "prefix": len(prefix),
        "messages": list(request.messages),
        "max_new_tokens": benchmark.max_new_tokens,
        "grammar": gbnf(request.tools),
    }


def beside(
    workshop: Workshop,
    peer: Peer,
    work: dict[str, Any],
    reference: Sequence[Sequence[int]],
    scored: "Scored",
    cfg: PeersConfig,
) -> dict[str, Any]:
    """Raises LeftOutError if the peer fails, or its full-precision replies do not agree with ours."""
    script = [workshop.python(peer), str(SCRIPTS / f"{peer.script}.py")]
    work = work | {"build": workshop.flags(peer), "compile": peer.compile}
    few = {
        "warmup": [],
        "requests": work["requests"][: cfg.check_requests],
        "grammar": False,
        "speed": False,
        "exact": True,
    }
    full = workshop.measure(script, work | few | {"model": str(workshop.model(peer, peer.full))})
    same = [reply["tokens"] == ours for reply, ours in zip(full["replies"], reference, strict=True)]
    same_fraction = sum(same) / len(same)
    if same_fraction < cfg.min_same_reply_fraction:
        least = cfg.min_same_reply_fraction
        raise LeftOutError(
            f"with {peer.full} weights {same_fraction:.0%} of its replies are {REFERENCE}'s, under {least:.0%}"
        )
    model = workshop.model(peer, peer.weights)
    found = workshop.measure(script, work | {"grammar": peer.grammar, "model": str(model)})
    return {
        "weights": peer.weights,
        "model_bytes": weights_bytes(model),
        "same_reply_fraction": same_fraction,
        **scored.figures(found),
    }


class Scored:
    """Scores replies to the requests."""

    def __init__(self, requests: Sequence[Request], tokenizer: Tokenizer) -> None:
        self._requests, self._tokenizer = requests, tokenizer

    def figures(self, found: dict[str, Any]) -> dict[str, Any]:
        """A runtime's entry in reports/peers.json, from its script's measurements."""
        replies = found["replies"]
        exact = [
            row(request, Answer(self.text(reply["tokens"], request.tools)))["outcome"] == Outcome.EXACT
            for request, reply in zip(self._requests, replies, strict=True)
        ]
        return {
            **{key: value for key, value in found.items() if key not in ("replies", "calls_per_s_many")},
            "calls": len(replies),
            "exact_call_fraction": sum(exact) / len(exact),
            "call_s": percentiles([reply["total_s"] for reply in replies]),
            "first_token_s": percentiles([reply["first_token_s"] for reply in replies]),
            f"calls_per_s_at_{CLIENTS}": found["calls_per_s_many"],
        }

    def text(self, tokens: Sequence[int], tools: Sequence[Tool]) -> str:
        """A reply's text, with a call in it as JSON."""
        end = self._tokenizer.eos_token_id
        text = self._tokenizer.decode([token for token in tokens if token != end])
        call = compact.read(text, tools)
        return write_call(call) if call else text


def weights_bytes(model: Path) -> int:
    if model.is_file():
        return model.stat().st_size
    return sum(path.stat().st_size for path in [*model.glob("model.onnx*"), *model.glob("*.safetensors")])


def _call(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Raises LeftOutError with the last line that the command wrote to stderr."""
    done = subprocess.run(  # noqa: S603
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        what = next((Path(part).name for part in command if part.endswith(".py")), " ".join(command[1:3]))
        raise LeftOutError(f"{what} ended with {done.returncode}: {lines[-1] if lines else 'no word'}")


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths, params.techniques, params.benchmark, params.peers)


if __name__ == "__main__":
    main()

"""Stage `train`: fine-tune the base model to make calls.

Reads models/base and data/prepared/{train,validation}.jsonl; writes models/tuned, reports/train.json
and the loss curves in reports/train. An interrupted training resumes from its last checkpoint. On several
GPUs or hosts: accelerate launch -m pipeline.train, with the same steps and losses.
"""

import ctypes
import hashlib
import logging
import random
import resource
import shutil
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from dvclive import Live
from omegaconf import DictConfig
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pipeline import config, files
from pipeline.model import base, shared_prefix
from pipeline.model.gptq import HEAD_BLOCK, nearest
from pipeline.model.int8_training import Int8Products
from pipeline.provenance import provenance
from pipeline.toolcall import prompt
from pipeline.toolcall.conversation import parse_request

log = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "int8")
INT8_MAX_TIME = 0.95  # int8 needs at most this share of the next fastest's time: it learns less (docs/experiments.md)


@dataclass
class LoraSettings:
    rank: int
    alpha: int
    dropout: float


@dataclass
class TrainConfig:
    seed: int
    method: str  # full or lora
    frozen_layers: int  # method full: the embedding and this many lowest layers are not trained; 0: all are
    frozen_block_size: int  # these weights are first rounded to 4 bits in blocks of this size, as in int4; 0: kept
    learning_rate: float
    weight_decay: float
    warmup_fraction: float  # of the steps
    epochs: float
    text_weight: float  # in the loss, per token of a text reply (of a call: 1): texts are hard to predict
    reverse_fraction: float  # of single requests for a call: learnt in reverse order too, weighing as texts do
    precision: str  # float32, bfloat16, int8 (matrix products only), or auto: the fastest, by measurement
    tokens_per_step: int  # prefixes included
    evaluations: int  # over the whole training
    validation_requests: int  # per evaluation, evenly spaced through the validation split
    patience: int  # evaluations without improvement before training stops
    lora: LoraSettings

    def __post_init__(self) -> None:
        config.require_one_of("train.method", self.method, ["full", "lora"])
        config.require_range("train.frozen_layers", self.frozen_layers, 0, 10_000)
        config.require_one_of("train.frozen_block_size", self.frozen_block_size, [0, 16, 32, 64, 128, 256])
        config.require_range("train.learning_rate", self.learning_rate, 1e-7, 1)
        config.require_range("train.weight_decay", self.weight_decay, 0, 1)
        config.require_range("train.warmup_fraction", self.warmup_fraction, 0, 1)
        config.require_range("train.epochs", self.epochs, 0.01, 1000)
        config.require_range("train.text_weight", self.text_weight, 0, 1)
        config.require_range("train.reverse_fraction", self.reverse_fraction, 0, 1)
        if self.reverse_fraction and not self.text_weight:
            raise ValueError("train.reverse_fraction needs a train.text_weight over 0: requests weigh as texts do")
        config.require_one_of("train.precision", self.precision, ["auto", *PRECISIONS])
        config.require_range("train.tokens_per_step", self.tokens_per_step, 1, 1_000_000)
        config.require_range("train.evaluations", self.evaluations, 1, 1000)
        config.require_range("train.validation_requests", self.validation_requests, 1, 1_000_000)
        config.require_range("train.patience", self.patience, 1, 1000)


@dataclass
class Params:
    paths: config.Paths
    train: TrainConfig


class PrefixTrainer(Trainer):
    """A Trainer whose batch is one step: requests behind shared prefixes (model/shared_prefix.py)."""

    dtype = torch.float32  # of the computation; the weights stay float32
    products: AbstractContextManager[Any] = nullcontext()  # context for the matrix products of training
    head: tuple[torch.Tensor, torch.Tensor] | None = None  # shared_prefix.short_head, if the head is frozen

    def compute_in(self, precision: str) -> None:
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.products = Int8Products() if precision == "int8" else nullcontext()

    def fastest_precision(self) -> str:
        """On a CPU, found by timing a small step in each: CPU flags do not tell if bfloat16 beats float32."""
        if self.args.device.type == "cuda":
            return "bfloat16"
        batch = _pack([{"step": self.train_dataset[0]["step"][:8]}])
        self.model.train()
        seconds = dict.fromkeys(PRECISIONS, float("inf"))
        for precision in PRECISIONS * 3:  # in turn, best of three: the first also allocates memory
            self.compute_in(precision)
            start = time.perf_counter()
            self.compute_loss(self.model, batch).backward()
            seconds[precision] = min(seconds[precision], time.perf_counter() - start)
            self.model.zero_grad()
        log.info("seconds of a small step: %s", {name: round(found, 3) for name, found in seconds.items()})
        seconds["int8"] /= INT8_MAX_TIME
        found = [min(seconds, key=seconds.__getitem__)]
        broadcast_object_list(found)  # all processes use the main one's choice
        return found[0]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        del num_items_in_batch  # a step is one batch, and shared_prefix.loss takes its mean
        products, head = (self.products, self.head) if model.training else (nullcontext(), None)
        with products:
            found = model(inputs, head, self.dtype)  # shared_prefix.loss
        return (found, {}) if return_outputs else found

    def get_train_dataloader(self) -> Any:
        """Each process takes its share of every step's requests: steps are the same for any number of processes."""
        count, index = self.args.world_size, self.args.process_index
        steps = DataLoader(
            self.train_dataset,
            sampler=SeedableRandomSampler(self.train_dataset, data_seed=self.args.seed),
            collate_fn=lambda rows: _pack(rows, count, index),
        )
        return prepare_data_loader(steps, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True)


class LossCurves(TrainerCallback):
    """Training and validation loss by step, as DVC plots; transformers' own callback counts log lines, not steps.

    A resumed training draws the earlier losses again: DVC removes a stage's outputs before it runs.
    """

    def __init__(self, live: Live) -> None:
        self._live = live

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        for logs in state.log_history:
            self._draw(logs["step"], logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        del args, control
        self._draw(state.global_step, logs)

    def _draw(self, step: int, logs: dict[str, float]) -> None:
        self._live.step = step
        for key, name in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
            if key in logs:
                self._live.log_metric(name, logs[key])


class Clock(TrainerCallback):
    """Seconds of training, including those before the checkpoint from which it was resumed."""

    def __init__(self, file: Path) -> None:
        self._file, self._start = file, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        before = files.read_json(self._file) if state.global_step and self._file.exists() else {}
        self._start = time.perf_counter() - before.get(str(state.global_step), 0.0)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if state.is_world_process_zero:
            before = files.read_json(self._file) if self._file.exists() else {}
            files.write_json(self._file, {**before, str(state.global_step): self.seconds})

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def run(base_folder: Path, prepared: Path, out: Path, report: Path, cfg: TrainConfig) -> dict[str, Any]:
    torch.manual_seed(cfg.seed)
    keep_freed_memory()
    process = PartialState(cpu=not torch.cuda.is_available())
    refuse_int8_on_a_gpu(cfg.precision)
    model, tokenizer = base.load_tuned(base_folder)
    attention = model.config._attn_implementation
    model.set_attn_implementation(shared_prefix.ATTENTION)
    examples, counts = _examples(prepared, tokenizer, cfg)
    if cfg.method == "full":
        freeze(model, cfg.frozen_layers, cfg.frozen_block_size)
    else:
        model = _with_lora(model, cfg.lora)
    model.forward = MethodType(shared_prefix.loss, model)  # DDP averages gradients of calls to forward only
    with process.main_process_first():
        checkpoints = _checkpoints(out, base_folder, examples, cfg)
    last = get_last_checkpoint(str(checkpoints))
    trainer = make_trainer(model, examples, checkpoints, cfg)
    precision = cfg.precision if cfg.precision != "auto" else _fastest_precision(trainer, checkpoints, bool(last))
    trainer.compute_in(precision)
    log.info(
        "training on %(train_requests)d requests, %(reverse_requests)d of them reversed too, in %(precision)s",
        counts | {"precision": precision},
    )
    with ExitStack() as stack:
        if process.is_main_process:
            live = Live(str(report.with_suffix("")), dvcyaml=None, report=None, save_dvc_exp=False)
            trainer.add_callback(LossCurves(stack.enter_context(live)))
        clock = Clock(checkpoints / "seconds.json")
        trainer.add_callback(clock)
        trainer.train(resume_from_checkpoint=last)
    metrics = {
        "train_s": clock.seconds,
        "steps": trainer.state.global_step,
        "steps_planned": trainer.state.max_steps,
        "stopped_early": trainer.state.global_step < trainer.state.max_steps,
        "best_validation_loss": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        **counts,
        "precision": precision,
        "processes": process.num_processes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if process.is_main_process:
        tuned = trainer.model.merge_and_unload() if cfg.method == "lora" else trainer.model
        tuned.set_attn_implementation(attention)
        setattr(tuned.config, prompt.REVERSE_REQUESTS, counts["reverse_requests"])
        with files.whole_folder(out) as folder:
            tuned.save_pretrained(folder, safe_serialization=True, max_shard_size=files.ONE_FILE)
            tokenizer.save_pretrained(folder)
        files.write_json(report, metrics | {"provenance": provenance(cfg)})
        shutil.rmtree(checkpoints)
        log.info("best validation loss %.4f at step %s", trainer.state.best_metric, metrics["best_step"])
    process.wait_for_everyone()  # a process that exits with open connections aborts, and the others with it
    process.destroy_process_group()
    return metrics


def _with_lora(model: Any, cfg: LoraSettings) -> Any:
    model.enable_input_require_grads()
    settings = LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


def freeze(model: Any, layers: int, block_size: int = 0) -> None:
    """Freeze the embedding and the lowest layers: without their gradients they take a third of the arithmetic.

    With a `block_size` their matrices are rounded to INT4's grid, so INT4 keeps exactly what training builds on.
    Raises ValueError if the model has no more than `layers` layers or `block_size` does not divide a matrix's inputs.
    """
    found = model.get_decoder().layers
    if layers >= len(found):
        raise ValueError(f"train.frozen_layers is {layers}, but the model has {len(found)} layers")
    embedding = model.get_input_embeddings()
    for part in [*found[:layers], *([embedding] if layers else [])]:
        part.requires_grad_(False)
        for module in part.modules() if block_size else ():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                size = min(block_size, HEAD_BLOCK) if module is embedding else block_size
                rounded = nearest(module.weight.detach().numpy().T, 4, size)
                module.weight.data.copy_(torch.from_numpy(rounded.T))


def keep_freed_memory() -> None:
    """Keep glibc from returning large blocks to the system: allocating them again took a sixth of the training."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def refuse_int8_on_a_gpu(precision: str) -> None:
    if precision == "int8" and torch.cuda.is_available():
        raise ValueError("train.precision is int8, which is for CPUs, but training would run on CUDA: use bfloat16")


def _examples(
    prepared: Path, tokenizer: Any, cfg: TrainConfig
) -> tuple[dict[str, list[shared_prefix.Example]], dict[str, int]]:
    """What is learnt and what is validated, and the numbers of requests."""
    rows = list(files.read_jsonl(prepared / "train.jsonl"))
    validation = files.read_spread(prepared / "validation.jsonl", cfg.validation_requests)
    train, found = (read_examples(part, tokenizer, cfg.text_weight) for part in (rows, validation))
    reverse = reverse_examples(rows, tokenizer, cfg)
    counts = {"train_requests": len(train), "reverse_requests": len(reverse), "validation_requests": len(found)}
    return {"train": train + reverse, "validation": found}, counts


def read_examples(rows: Iterable[tuple[str, Any]], tokenizer: Any, text_weight: float) -> list[shared_prefix.Example]:
    """All of the assistant's replies in a conversation are learnt: the earlier ones are in the tokens anyway."""
    prefixes: dict[str, list[int]] = {}
    examples = []
    weights = {"call": 1.0, "text": text_weight}
    for where, value in rows:
        request = parse_request(value, (), where)
        key = prompt.system_prompt(request.tools)
        if key not in prefixes:
            prefixes[key] = prompt.prefix_tokens(tokenizer, request.tools)
        tokens, replies = [*prefixes[key]], []
        last = prompt.reply_tokens(tokenizer, request), "call" if request.expected else "text"
        for part, said in [*prompt.request_parts(tokenizer, request.messages, request.tools), last]:
            if said:
                replies.append(shared_prefix.Reply(len(tokens), len(tokens) + len(part), weights[said]))
            tokens += part
        examples.append(shared_prefix.Example(tokens, len(prefixes[key]), replies))
    return _each_once(examples)


def reverse_examples(rows: Iterable[tuple[str, Any]], tokenizer: Any, cfg: TrainConfig) -> list[shared_prefix.Example]:
    """Single requests for a call, drawn at random, in reverse order (prompt.reverse_tokens)."""
    requests = [parse_request(value, (), where) for where, value in rows]
    single = [request for request in requests if request.expected and len(request.messages) == 1]
    found = []
    for request in random.Random(cfg.seed).sample(single, round(cfg.reverse_fraction * len(single))):
        prefix = prompt.prefix_tokens(tokenizer, request.tools)
        reply = prompt.reply_tokens(tokenizer, request)
        opening, between, asked = prompt.reverse_tokens(tokenizer, request.messages[0])
        before = [*prefix, *opening, *reply, *between]
        learnt = shared_prefix.Reply(len(before), len(before) + len(asked), cfg.text_weight, cfg.text_weight)
        found.append(shared_prefix.Example([*before, *asked], len(prefix), [learnt]))
    return found


def _each_once(examples: list[shared_prefix.Example]) -> list[shared_prefix.Example]:
    """Drop earlier replies that another example teaches: an agent's log has each turn with all before it."""
    learnt = {tuple(example.tokens) for example in examples}
    found = []
    for example in examples:
        *earlier, last = example.replies
        new = [reply for reply in earlier if tuple(example.tokens[: reply.end]) not in learnt]
        learnt.update(tuple(example.tokens[: reply.end]) for reply in new)
        found.append(replace(example, replies=[*new, last]))
    return found


def make_trainer(
    model: Any,
    examples: dict[str, list[shared_prefix.Example]],
    checkpoints: Path,
    cfg: TrainConfig,
) -> PrefixTrainer:
    batches = {name: _batches(group, cfg) for name, group in examples.items()}
    every = max(1, round(len(batches["train"]) * cfg.epochs / cfg.evaluations))
    steps = every * cfg.evaluations  # so that the last step is evaluated too
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        warmup_ratio=cfg.warmup_fraction,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        adam_beta2=0.98,
        use_cpu=not torch.cuda.is_available(),
        seed=cfg.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, every // 10),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=[],
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # accelerate uses the other GPUs; DataParallel would split a step
    trainer = PrefixTrainer(
        model=model,
        args=arguments,
        train_dataset=batches["train"],
        eval_dataset=batches["validation"],
        data_collator=_pack,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=cfg.patience)],
    )
    if not trainer.model.get_output_embeddings().weight.requires_grad:
        trainer.head = shared_prefix.short_head(trainer.model, examples["train"])
    return trainer


def _batches(examples: list[shared_prefix.Example], cfg: TrainConfig) -> Dataset:
    rows = shared_prefix.steps(examples, cfg.tokens_per_step, random.Random(cfg.seed))
    return Dataset.from_list([{"step": [asdict(examples[at]) for at in row]} for row in rows])


def _pack(rows: list[dict[str, Any]], count: int = 1, index: int = 0) -> dict[str, Any]:
    step = [
        shared_prefix.Example(
            found["tokens"], found["prefix"], [shared_prefix.Reply(**reply) for reply in found["replies"]]
        )
        for found in rows[0]["step"]
    ]
    return shared_prefix.pack(step, count, index)


def _checkpoints(out: Path, base_folder: Path, examples: Any, cfg: TrainConfig) -> Path:
    """The folder for checkpoints; emptied first if they are from another base, data or settings."""
    folder = out.with_name(f"{out.name}.checkpoints")
    inputs = {
        "settings": asdict(cfg),
        "base": files.sha256(base_folder / "model.safetensors"),
        "examples": hashlib.sha256(repr(examples).encode()).hexdigest(),
    }
    left = folder / "inputs.json"
    if not left.exists() or files.read_json(left) != inputs:
        shutil.rmtree(folder, ignore_errors=True)
        files.write_json(left, inputs)
    return folder


def _fastest_precision(trainer: PrefixTrainer, checkpoints: Path, goes_on: bool) -> str:
    """A resumed training keeps the precision it began with."""
    chosen = checkpoints / "precision.json"
    if goes_on and chosen.exists():
        return str(files.read_json(chosen))
    precision = trainer.fastest_precision()
    if trainer.is_world_process_zero():
        files.write_json(chosen, precision)
    return precision


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    paths = params.paths
    run(
        paths.models / "base",
        paths.prepared,
        paths.models / "tuned",
        paths.reports / "train.json",
        params.train,
    )


if __name__ == "__main__":
    main()

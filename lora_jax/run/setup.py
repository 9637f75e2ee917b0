"""Everything that a run needs before its first step, cheap checks first; nothing is written here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from lora_jax.adapters.count import trainable_parameters
from lora_jax.adapters.init import adapter_shapes, start_adapter
from lora_jax.adapters.notes import read_notes
from lora_jax.adapters.read import adapter_trees, note_of_base
from lora_jax.config import DataOptions, RunConfig, resolved
from lora_jax.console import plain_console
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.data.locate import is_local
from lora_jax.data.mixture import hold_out, mixed
from lora_jax.data.packing import packs
from lora_jax.errors import Option, UserError
from lora_jax.generate.stops import generation_settings
from lora_jax.hub.adapter_files import read_adapter_config
from lora_jax.hub.chat_templates import set_chat_template
from lora_jax.hub.tokenizer import chat_template
from lora_jax.methods.base import Method
from lora_jax.methods.matching import Plan
from lora_jax.models.decoder import Decoder
from lora_jax.models.finite import broken_weights
from lora_jax.parallel.memory import check_fits
from lora_jax.parallel.mesh import row_shards
from lora_jax.parallel.processes import writes
from lora_jax.pretrained import Pretrained, open_pretrained
from lora_jax.run.in_memory import InMemory
from lora_jax.training.adapted import adapted, check_full
from lora_jax.training.feed import Sizes, eval_sizes, shaping
from lora_jax.training.offload import has_host_memory, offloads_activations
from lora_jax.training.optim import make_optimizer
from lora_jax.types import Facts, Params, PyTree, Tokenizer, Trained, Values


@dataclass(frozen=True, kw_only=True)
class Run(InMemory):
    """A run's model, data and adapter before the first step."""

    asked: RunConfig
    """The options as given."""
    config: RunConfig
    """The resolved options: with defaults, and with what the base or the adapter decides."""
    train_rows: TokenDataset
    eval_rows: Mapping[str, TokenDataset]
    """The evaluation sets by name; a single set without a name has the empty one."""
    trainable: Trained
    """Before the first step, which donates the arrays; their shapes stay valid."""
    plan: Plan | None
    adapter_config: Method | None
    key: jax.Array
    carried: Values = field(default_factory=dict)
    """Weights of the base that the adapter to continue contains, and that are saved with it again."""

    @property
    def parameters(self) -> tuple[int, int]:
        """Return (trainable, all) parameters as PEFT counts them."""
        if self.plan is None:
            whole = sum(leaf.size for leaf in jax.tree.leaves(self.trainable))
            return whole, whole
        return trainable_parameters(self.plan, self.model_config)


def prepare(config: RunConfig, mesh: Mesh) -> Run:
    """Read the model, data and adapter of a run, the model onto the mesh.

    Raises UserError for whatever is wrong with them.
    """
    asked, base = config, open_pretrained(config.model)
    config = replace(config, model=base.options)
    check_full(config, base.quantization)
    set_chat_template(base.tokenizer, config.data.chat_template)
    if config.method == "full":
        return _prepare_whole(replace(config, lora=resolved(config.lora)), asked, base, mesh)
    found = adapted(config, base.config)
    config, plan, start = found.config, found.plan, found.start
    carried, over = found.carried(base.checkpoint), base.with_adapter(start)
    check_resized(over, plan)
    over.check_adapted(plan)
    base = base.replace(config=over.config)
    rows = read_run_rows(config, base)
    _check_memory(config, base, plan)
    frozen = over.params(mesh)
    if start is not None:
        trainable, facts = adapter_trees(replace(start, plan=plan), frozen, mesh)
    else:
        key, _ = run_keys(config)
        trainable, facts = start_adapter(key, plan, frozen, base.config.num_hidden_layers, mesh)
    return make_run(
        config, base, rows, mesh, frozen, trainable, facts,
        asked=asked, plan=plan, adapter_config=found.method, carried=carried,
    )  # fmt: skip


def _prepare_whole(config: RunConfig, asked: RunConfig, base: Pretrained, mesh: Mesh) -> Run:
    """Return a run that trains every parameter."""
    rows = read_run_rows(config, base)
    _check_memory(config, base, None)
    params = base.params(mesh)
    _check_finite(params, base, config)
    trainable = jax.tree.map(partial(jnp.array, dtype=jnp.float32), params)
    return make_run(config, base, rows, mesh, {}, trainable, {}, asked=asked)


def make_run(
    config: RunConfig,
    base: Pretrained,
    rows: tuple[TokenDataset, Mapping[str, TokenDataset]],
    mesh: Mesh,
    frozen: Params,
    trainable: Trained,
    facts: Facts,
    *,
    asked: RunConfig | None = None,
    plan: Plan | None = None,
    adapter_config: Method | None = None,
    carried: Values | None = None,
) -> Run:
    """Return a run over trees that are on the mesh; its first step donates `trainable`.

    `asked` are the options as given, if they differ from `config`.
    """
    model = Decoder(
        base.config,
        dtype=base.compute_dtype(),
        gradient_checkpointing=config.train.gradient_checkpointing,
        offload_inputs=offloads_activations(config.train) and has_host_memory(mesh.devices.flat[0]),
        packed=packs(config.data),
        neftune_noise_alpha=config.train.neftune_noise_alpha,
    )
    train_rows, eval_rows = rows
    return Run(
        base=base, model=model, frozen=frozen, adapter=facts, mesh=mesh,
        asked=config if asked is None else asked, config=config, train_rows=train_rows, eval_rows=eval_rows,
        trainable=trainable, plan=plan, adapter_config=adapter_config, key=run_keys(config)[1],
        carried=carried or {}, settings=generation_settings(base.folder),
    )  # fmt: skip


def run_sizes(run: Run, lengths: Sequence[int] | None = None) -> Sizes:
    """Return the sizes of a run: which rows each step takes, rows per pass, and the number of steps.

    `lengths` are the step lengths of the run to resume: the best choice depends on the number of steps.
    """
    train, data, mesh = run.config.train, run.config.data, run.mesh
    passes, shards = train.gradient_accumulation_steps, row_shards(mesh.shape)
    batch = train.per_device_train_batch_size * shards
    per_device = train.per_device_eval_batch_size or train.per_device_train_batch_size
    plan = shaping(data, mesh).plan(
        run.train_rows.lengths,
        batch * passes,
        train.seed,
        steps=train.max_steps,
        epochs=train.num_train_epochs,
    )
    if lengths and lengths[-1] == plan.buckets[-1]:
        plan = replace(plan, buckets=tuple(lengths))
    # Rows and passes that an epoch cannot fill would be computed in vain.
    batch = min(batch, -(-len(plan.bins) // shards) * shards)
    passes = min(passes, -(-len(plan.bins) // batch))
    plan = replace(plan, per_step=batch * passes)
    steps = train.max_steps
    if steps <= 0:
        steps = math.ceil(train.num_train_epochs * plan.steps_per_epoch)
    return Sizes(
        plan=plan,
        batch=batch,
        accumulation=passes,
        evaluation=eval_sizes(data, per_device, mesh),
        steps=steps,
    )


def notes_of_start(run: Run) -> list[str]:
    """Return notes about an adapter to continue that was not trained on this run's base."""
    if run.config.lora.init_from is None:
        return []
    adapter = Path(run.config.lora.init_from).expanduser()
    named = read_adapter_config(adapter).base_model_name_or_path
    notes = [note_of_base(adapter, named, run.checkpoint, run.config.model.path, Option("model.path"))]
    template = chat_template(adapter)
    if template is not None and template.decode(errors="replace") != run.tokenizer.chat_template:
        given = Option("data.chat_template")
        whose = "base's" if run.config.data.chat_template is None else f"one of {given}"
        notes.append(
            f"the adapter of {Option('lora.init_from')} has another chat template, but the run uses the {whose}; to "
            f"use the adapter's, give its file as {given}"
        )
    before = read_notes(adapter).quantization
    if before is not None and run.base.quantization is None:
        notes.append(f"{Option('lora.init_from')} was trained on a quantized base ({before.summary()})")
    return [note for note in notes if note is not None]


def run_keys(config: RunConfig) -> tuple[jax.Array, jax.Array]:
    """Return the keys for a run's initial adapter and for its steps."""
    init_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    return init_key, run_key


def _check_finite(params: Params, base: Pretrained, config: RunConfig) -> None:
    """Raise UserError if weights that will all be trained and written are not finite."""
    finite = jax.jit(
        lambda tree: jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
    )
    if not bool(finite(params)):
        found = broken_weights(base.checkpoint, base.config, config.model.dtype)
        raise UserError(f"{Option('method', 'full')}: {found}")


def _check_memory(config: RunConfig, base: Pretrained, plan: Plan | None) -> None:
    """Raise UserError if base, adapter and optimizer state do not fit into free memory; allocate nothing."""
    params = base.abstract_params()
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    if plan is not None:
        layers = base.config.num_hidden_layers
        trained, _ = adapter_shapes(jax.random.key(0), plan, params, layers)
    optimizer = jax.eval_shape(make_optimizer(config.train, 1).init, trained)
    held = {"base": params, "trained": trained, "optimizer": optimizer}
    check_fits("the run", {name: _bytes(tree) for name, tree in held.items()})


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def read_run_rows(config: RunConfig, base: Pretrained) -> tuple[TokenDataset, Mapping[str, TokenDataset]]:
    """Return the training rows, and the evaluation sets by name."""
    data, seed, tokenizer, vocab_size = config.data, config.train.seed, base.tokenizer, base.config.vocab_size
    console = plain_console(quiet=not writes())
    found = load_examples(data, tokenizer, data.path, data.split, vocab_size, console=console)
    sets = evaluation_rows(data, tokenizer, vocab_size, console)
    train_rows, held = hold_out(found, 0 if sets else data.eval_fraction, seed)
    sets = sets if held is None else {"": held}
    return mixed(train_rows, data.mixture_weights, data.stopping_strategy, seed), sets


def evaluation_rows(
    data: DataOptions, tokenizer: Tokenizer, vocab_size: int, console: Console
) -> Mapping[str, TokenDataset]:
    """Return the sets in eval_path or eval_paths by name, a single one under the empty name; none for neither."""
    paths, option = data.eval_paths, "data.eval_paths"
    if data.eval_path:
        paths, option = {"": data.eval_path}, "data.eval_path"
    sets = {}
    for name, path in paths.items():
        split = data.eval_split or ("train" if is_local(path) else data.split)
        where = Option(f"{option} {name}".rstrip())
        sets[name] = load_examples(data, tokenizer, path, split, vocab_size, option=where, console=console)
    return sets


def check_resized(base: Pretrained, plan: Plan) -> None:
    """Raise UserError if rows are added to the vocabulary that the adapter does not store."""
    added = base.added_rows
    saved = {module.name for module in plan.saved}
    if not added or set(added) <= set(plan.token_indices) or {"model.embed_tokens", "lm_head"} <= saved:
        return
    raise UserError(
        f"{Option('model.resize_vocab')}: {len(added)} rows are added ({added[0]} to {added[-1]}), which the adapter "
        f"must hold; add {Option('lora.modules_to_save', ('embed_tokens', 'lm_head'))}, or "
        f"{Option('lora.trainable_token_indices')} with those ids"
    )

"""Everything a run needs before its first step, checked in the order of cost; nothing is written here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from lora_jax.adapters.count import trainable_parameters
from lora_jax.adapters.init import adapter_shapes, init_adapter
from lora_jax.adapters.peft import import_tensors
from lora_jax.adapters.targets import Plan, check_unquantized
from lora_jax.config import DataOptions, RunConfig
from lora_jax.console import plain_console
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.data.locate import is_local
from lora_jax.data.mixture import hold_out, mixed
from lora_jax.data.packing import packs
from lora_jax.errors import UserError
from lora_jax.generate.stops import generation_settings
from lora_jax.hub.adapter_files import AdapterConfig
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.chat_templates import set_chat_template
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.fingerprint import fingerprint
from lora_jax.hub.resolve import resolve
from lora_jax.hub.tokenizer import load_tokenizer
from lora_jax.models.decoder import Decoder
from lora_jax.models.finite import broken_weights
from lora_jax.models.load import abstract_params, load_params, storage_dtype
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import name_table
from lora_jax.models.open import open_model
from lora_jax.models.quantization import (
    compute_dtype,
    quantization_of,
    quantized_weights,
    resolved_model_options,
)
from lora_jax.models.sharding import placed, shardings
from lora_jax.parallel.memory import check_fits
from lora_jax.parallel.processes import writes
from lora_jax.progress import stage
from lora_jax.run.in_memory import InMemory
from lora_jax.train.adapted import adapted, check_full
from lora_jax.train.offload import has_host_memory, offloads_activations
from lora_jax.train.optim import make_optimizer


@dataclass(frozen=True, kw_only=True)
class Run(InMemory):
    """A run's model, data and adapter, as they stand before the first step."""

    config: RunConfig
    quantization: QuantizationConfig | None
    train_rows: TokenDataset
    eval_rows: Mapping[str, TokenDataset]
    """The sets to evaluate on by their names; a single one without a name has the empty one."""
    trainable: Any
    """Before the first step, which consumes the arrays; their shapes stay."""
    plan: Plan | None
    adapter_config: AdapterConfig | None
    key: jax.Array
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Weights of the base that the adapter to go on with brought, and brings on."""
    remarks: tuple[str, ...] = ()
    """What a user should know of how the base's files were read."""

    @property
    def storage_dtype(self) -> Any:
        """Dtype that a whole model is written in."""
        return storage_dtype(self.checkpoint, self.model_config, self.config.model)

    @cached_property
    def base_fingerprint(self) -> dict[str, str]:
        """What identifies the base, as it was when first asked for: before the first step."""
        return fingerprint(self.checkpoint)

    @property
    def resized_vocabulary(self) -> int | None:
        """Rows of the vocabulary where some were added to the checkpoint's, else None."""
        stored = self.checkpoint.shape(name_table(self.model_config)[0].name)[0]
        return self.model_config.vocab_size if self.model_config.vocab_size > stored else None

    @property
    def parameters(self) -> tuple[int, int]:
        """Return (trainable, all) parameters as PEFT counts them."""
        if self.plan is None:
            whole = sum(leaf.size for leaf in jax.tree.leaves(self.trainable))
            return whole, whole
        return trainable_parameters(self.plan, self.model_config)


def prepare(config: RunConfig, typed: Collection[str], mesh: Mesh) -> Run:
    """Read model, data and adapter of a run, the model onto the mesh; `typed` names the options that the user gave.

    Raises UserError for whatever in them is wrong.
    """
    base = open_model(resolve(config.model.path, config.model.revision))
    checkpoint, model_config = base.checkpoint, base.config
    quantization = quantization_of(config.model, checkpoint, model_config, typed)
    config = replace(config, model=resolved_model_options(config.model, quantization))
    check_full(config, quantization)
    tokenizer = load_tokenizer(checkpoint.folder)
    set_chat_template(tokenizer, config.data.chat_template)
    if config.model.resize_vocab and len(tokenizer) > model_config.vocab_size:
        model_config = replace(model_config, vocab_size=len(tokenizer))
    plan, lora_config, tensors = None, None, None
    weights, carried = checkpoint, {}
    if config.method == "lora":
        found = adapted(config, model_config, typed)
        config, model_config, plan = found.config, found.model_config, found.plan
        lora_config, tensors = found.lora_config, found.tensors
        weights, carried = found.over(checkpoint), found.carried(checkpoint)
        _check_resized(weights, model_config, plan)
        check_unquantized(plan, quantized_weights(checkpoint, model_config, quantization))
    train_rows, eval_rows = _rows(config, tokenizer, model_config.vocab_size)
    init_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    stored = storage_dtype(checkpoint, model_config, config.model)
    _check_memory(config, model_config, plan, abstract_params(model_config, str(stored), quantization))
    params = load_params(weights, model_config, config.model.dtype, quantization, mesh=mesh)
    if plan is None or lora_config is None:
        _check_finite(params, checkpoint, model_config, config)
        frozen, adapter = {}, {}
        trainable = jax.tree.map(partial(jnp.array, dtype=jnp.float32), params)
    else:
        frozen, layers = params, model_config.num_hidden_layers
        init = config.lora.init_lora_weights if tensors is None else "true"
        where = shardings(adapter_shapes(init_key, plan, frozen, layers, init), mesh)
        start = partial(init_adapter, plan=plan, layers=layers, init_lora_weights=init)
        with stage("making the adapter"):
            trainable, adapter = jax.jit(lambda key, base: start(key, frozen=base), out_shardings=where)(
                init_key, frozen
            )
        if tensors is not None:
            trainable = placed(import_tensors(tensors, trainable, plan, config.lora.init_from), where[0])
    compute = compute_dtype(config.model, stored, quantization)
    if quantization is not None:
        quantization = replace(quantization, compute_dtype=str(compute))
    model = Decoder(
        model_config,
        dtype=compute,
        lora_dropout=lora_config.lora_dropout if lora_config else 0.0,
        gradient_checkpointing=config.train.gradient_checkpointing,
        offload_inputs=offloads_activations(config.train) and has_host_memory(mesh.devices.flat[0]),
        packed=packs(config.data),
        neftune_noise_alpha=config.train.neftune_noise_alpha,
    )
    return Run(
        checkpoint=checkpoint, model_config=model_config, model=model, tokenizer=tokenizer, frozen=frozen,
        adapter=adapter, mesh=mesh, config=config, quantization=quantization, train_rows=train_rows,
        eval_rows=eval_rows, trainable=trainable, plan=plan, adapter_config=lora_config, key=run_key,
        remarks=base.remarks, carried=carried, settings=generation_settings(checkpoint.folder),
    )  # fmt: skip


def _check_finite(params: Any, checkpoint: Checkpoint, model_config: ModelConfig, config: RunConfig) -> None:
    """Raise UserError where weights that are all trained, and written at the end, are not finite."""
    finite = jax.jit(
        lambda tree: jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
    )
    if not bool(finite(params)):
        raise UserError(f"--method full: {broken_weights(checkpoint, model_config, config.model.dtype)}")


def _check_memory(config: RunConfig, model_config: ModelConfig, plan: Plan | None, base: Any) -> None:
    """Raise UserError where base, adapter and optimiser state do not fit into what is free; nothing is made."""
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), base)
    if plan is not None:
        layers = model_config.num_hidden_layers
        trained, _ = adapter_shapes(jax.random.key(0), plan, base, layers, "true")
    optimiser = jax.eval_shape(make_optimizer(config.train, 1).init, trained)
    held = {"base": base, "trained": trained, "optimiser": optimiser}
    check_fits("the run", {name: _bytes(tree) for name, tree in held.items()})


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _rows(
    config: RunConfig, tokenizer: Any, vocab_size: int
) -> tuple[TokenDataset, Mapping[str, TokenDataset]]:
    data, seed = config.data, config.train.seed
    console = plain_console(quiet=not writes())
    found = load_examples(data, tokenizer, data.path, data.split, vocab_size, console=console)
    sets = evaluation_rows(data, tokenizer, vocab_size, console)
    train_rows, held = hold_out(found, 0 if sets else data.eval_fraction, seed)
    sets = sets if held is None else {"": held}
    return mixed(train_rows, data.mixture_weights, data.stopping_strategy, seed), sets


def evaluation_rows(
    data: DataOptions, tokenizer: Any, vocab_size: int, console: Console
) -> Mapping[str, TokenDataset]:
    """Return the sets of eval_path or eval_paths by their names, a single one by the empty name; none for neither."""
    paths, option = data.eval_paths, "--data.eval_paths"
    if data.eval_path:
        paths, option = {"": data.eval_path}, "--data.eval_path"
    sets = {}
    for name, path in paths.items():
        split = data.eval_split or ("train" if is_local(path) else data.split)
        where = f"{option} {name}".rstrip()
        sets[name] = load_examples(data, tokenizer, path, split, vocab_size, option=where, console=console)
    return sets


def _check_resized(checkpoint: Checkpoint, config: ModelConfig, plan: Plan) -> None:
    stored = checkpoint.shape(name_table(config)[0].name)[0]
    added = range(stored, config.vocab_size)
    saved = {module.name for module in plan.saved}
    if not added or set(added) <= set(plan.token_indices) or {"model.embed_tokens", "lm_head"} <= saved:
        return
    raise UserError(
        f"--model.resize_vocab: {len(added)} rows are added ({added[0]} to {added[-1]}), which the adapter must hold; "
        "add --lora.modules_to_save embed_tokens lm_head, or --lora.trainable_token_indices with those ids"
    )

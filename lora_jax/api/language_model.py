"""A model in memory: parameters on a mesh, the Linen module that reads them, and how to open, call and adapt one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lora_jax.adapters.init import start_adapter
from lora_jax.adapters.read import adapter_trees, note_of_base, open_adapter
from lora_jax.api.adapter import AboutAdapter, Adapter
from lora_jax.api.plain_errors import naming_fields
from lora_jax.api.settings import IA3Config, LoraConfig, MissConfig, method_options
from lora_jax.commands.generate import GenerateOptions, check_generation, completions
from lora_jax.config import (
    DataOptions,
    Dtype,
    MeshOptions,
    ModelOptions,
    RunConfig,
    check,
    check_model,
)
from lora_jax.errors import UserError
from lora_jax.generate.load import Loaded
from lora_jax.generate.stops import generation_settings
from lora_jax.hub.resolve import resolve
from lora_jax.hub.tokenizer import carries_generation
from lora_jax.methods.matching import make_plan
from lora_jax.models.decoder import Decoder, positions_of
from lora_jax.models.layers import variables
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import modules
from lora_jax.models.random_weights import random_params
from lora_jax.parallel.mesh import make_mesh
from lora_jax.pretrained import Pretrained, open_config, open_pretrained
from lora_jax.run.setup import check_resized, run_keys
from lora_jax.training.adapted import asked_method


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A base model in memory: a pytree of its parameters, which nothing changes.

    Calling it gives logits. It can be passed to jitted functions; what is not an array is static.

    >>> model = lj.load("examples/fennel-2m")
    >>> model(jnp.array([[5, 6, 7]])).shape
    (1, 3, 1408)
    """

    params: Any
    """Parameters: nested dicts of arrays, kernels [layer, in, out], quantized ones as pytrees of codes and scales."""
    module: Decoder
    """The Flax Linen module. It is applied to the collections that `variables` returns."""
    base: Pretrained
    """The checkpoint that the parameters were read from, and the options that it was opened with."""
    mesh: Mesh
    """The devices that the parameters are on."""

    @property
    def config(self) -> ModelConfig:
        """The model's sizes and settings, as config.json gives them."""
        return self.base.config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, transformers' own."""
        return self.base.tokenizer

    def replace(self, **changes: Any) -> Model:
        """Return the model with other parameters or another module.

        >>> model = model.replace(module=model.module.clone(gradient_checkpointing=True))
        """
        return replace(self, **changes)

    def variables(self, adapter: Adapter | None = None) -> dict[str, Any]:
        """Return the collections that the Linen module is applied to, with an adapter or without.

        >>> tokens = jnp.array([[5, 6, 7]])
        >>> places = (jnp.arange(3)[None], jnp.ones_like(tokens))
        >>> hidden, _ = model.module.apply(model.variables(), tokens, *places)
        >>> hidden.shape
        (1, 3, 192)
        """
        trained, facts = ({}, {}) if adapter is None else (adapter.trained, adapter.facts)
        return variables(self.params, trained, facts)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        adapter: Adapter | None = None,
        *,
        segment_ids: Int[Array | np.ndarray, "batch length"] | None = None,
        positions: Int[Array | np.ndarray, "batch length"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Return float32 logits: a pure function, differentiable in `adapter.trained`.

        Args:
            tokens: token ids.
            adapter: what is added to the base; None for the base alone.
            segment_ids: 0 for padding, else the number of the text within its row; None for one text a row. Where rows
                are padded but hold one text, an attention mask serves.
            positions: of the tokens within their text; None counts the real tokens of each row from 0.
            key: turns the adapter's dropout on.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        segments = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        positions = positions_of(segments) if positions is None else jnp.asarray(positions, jnp.int32)
        return _logits(self, adapter, tokens, segments, positions, key)

    def add_adapter(
        self, config: LoraConfig | IA3Config | MissConfig | None = None, key: Array | None = None
    ) -> Adapter:
        """Return a new adapter, and print how many parameters it trains, as PEFT does; the model stays as it is.

        Without a key it starts as a run of the command line with the default seed does.

        >>> adapter = model.add_adapter(lj.LoraConfig(r=8), key=jax.random.key(0))
        trainable params: 108,544 || all params: 1,953,472 || trainable%: 5.5565
        """
        config = LoraConfig() if config is None else config
        with naming_fields():
            options = self._stand_in(config)
            check(options)
            wanted = asked_method(options)
            plan = make_plan(wanted, modules(self.config))
            check_resized(self.base, plan)
            self.base.check_adapted(plan)
            key = run_keys(RunConfig())[0] if key is None else key
            layers = self.config.num_hidden_layers
            trained, facts = start_adapter(key, plan, self.params, layers, self.mesh)
        adapter = Adapter(trained, facts, AboutAdapter(config=wanted, plan=plan, base=self.base))
        adapter.print_trainable_parameters()
        return adapter

    def _stand_in(self, config: Any) -> RunConfig:
        """Return a run's options that are right except, perhaps, those of the adapter."""
        return method_options(
            config, model=self.base.options, data=DataOptions(path=("unused",)), output_dir="unused"
        )

    def load_adapter(self, folder: str | Path) -> Adapter:
        """Return an adapter from a folder or the Hub, as PEFT or lora_jax wrote it.

        >>> adapter = model.load_adapter("out")  # doctest: +SKIP
        """
        with naming_fields():
            found = open_adapter(resolve(str(folder), option="adapter"), self.config)
            changed = found.changed(self.base.checkpoint)
            if changed or found.model_config != self.config:
                raise UserError(
                    f"adapter {folder}: contains weights of the base or another vocabulary; open the model with "
                    "resize_vocab=True, or merge the adapter first"
                )
            self.base.check_adapted(found.plan)
            trained, facts = adapter_trees(found, self.params, self.mesh)
        options = self.base.options
        named = found.config.base_model_name_or_path
        if note := note_of_base(found.folder, named, self.base.checkpoint, options.path, "lj.load"):
            print(f"note: {note}")
        config = replace(
            cast(Any, found.config), base_model_name_or_path=options.path, revision=options.revision
        )
        own = found.folder if carries_generation(found.folder) else None
        return Adapter(trained, facts, AboutAdapter(
            config=config, plan=found.plan,
            base=self.base if own is None else replace(self.base, tokenizer_files=own),
            generation=generation_settings(self.base.folder, own),
        ))  # fmt: skip

    @overload
    def generate(self, prompts: str, adapter: Adapter | None = None, **settings: Any) -> str: ...
    @overload
    def generate(
        self, prompts: list[str] | tuple[str, ...], adapter: Adapter | None = None, **settings: Any
    ) -> list[str]: ...
    def generate(
        self, prompts: str | list[str] | tuple[str, ...], adapter: Adapter | None = None, **settings: Any
    ) -> str | list[str]:
        """Return what the model writes after each prompt, which is a user's turn where there is a chat template.

        An adapter that was read from a folder brings its own tokenizer and end tokens, if the folder has them.

        Args:
            prompts: one prompt, for which one text is returned, or several.
            adapter: what is added to the base; None for the base alone.
            settings: max_new_tokens (256), temperature (0: greedy), top_p, top_k, repetition_penalty, seed, system (a
                message that goes before the prompt) and raw (True leaves the chat template out), as in
                `lora-jax generate`.

        >>> model.generate(["What day follows Friday?"], max_new_tokens=16)
        ['After Friday comes Saturday.']
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        base, own = (self.base, None) if adapter is None else (adapter.about.base, adapter.about.generation)
        with naming_fields(), jax.set_mesh(self.mesh):
            options = GenerateOptions(model=self.base.options, prompt=tuple(several), **settings)
            check_generation(options)
            loaded = Loaded(
                base=base,
                adapter=None,
                settings=generation_settings(self.base.folder) if own is None else own,
                model=self.module,
                variables=self.variables(adapter),
            )
            found = completions(options, loaded)
        return found[0] if isinstance(prompts, str) else found

    def __repr__(self) -> str:
        held = self.base.quantization.summary() if self.base.quantization else str(self.base.storage_dtype)
        sizes = f"{self.config.num_hidden_layers} layers of {self.config.hidden_size}"
        where = (
            ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1) or "1 device"
        )
        return f"Model({self.base.options.path}: {self.config.model_type}, {sizes}, {held}, {where})"


def load(
    path: str | Path,
    *,
    revision: str | None = ModelOptions.revision,
    dtype: Dtype = ModelOptions.dtype,
    compute_dtype: Dtype = ModelOptions.compute_dtype,
    resize_vocab: bool = ModelOptions.resize_vocab,
    load_in_4bit: bool | None = ModelOptions.load_in_4bit,
    load_in_8bit: bool | None = ModelOptions.load_in_8bit,
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = ModelOptions.bnb_4bit_quant_type,
    bnb_4bit_use_double_quant: bool | None = ModelOptions.bnb_4bit_use_double_quant,
    bnb_4bit_compute_dtype: Dtype | None = ModelOptions.bnb_4bit_compute_dtype,
    llm_int8_skip_modules: Sequence[str] | None = ModelOptions.llm_int8_skip_modules,
    mesh: Mesh | None = None,
    random_weights: bool = False,
) -> Model:
    """Read a causal language model from a folder or the Hub, quantized as it is read if you ask for it.

    Args:
        path: folder of a Hugging Face checkpoint, or its id on the Hub.
        revision: branch, tag or commit of a Hub id.
        dtype: storage dtype of the weights; "auto" keeps what the checkpoint has.
        compute_dtype: dtype of the matrix products; "auto" is float32 on a CPU or for float32 weights, else bfloat16.
        resize_vocab: add embedding rows for tokens that the tokenizer has beyond the checkpoint's vocabulary.
        load_in_4bit: hold the linear layers in 4 bits, for QLoRA.
        load_in_8bit: hold the linear layers in 8 bits.
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: hold the scales of 4-bit blocks in 8 bits.
        bnb_4bit_compute_dtype: compute_dtype of a 4-bit model, by its name in transformers.
        llm_int8_skip_modules: modules to leave unquantized.
        mesh: devices to lay the parameters out on (see `make_mesh`); None takes all, sharding parameters over them.
        random_weights: draw the weights at random, to try speed and memory; `path` may be a config.json, and a folder
            needs nothing else.

    Raises:
        UserError: the checkpoint is absent, damaged or of an unknown family, or options contradict it.

    >>> lj.load("examples/fennel-2m")
    Model(examples/fennel-2m: llama, 4 layers of 192, bfloat16, 1 device)
    """
    names = [option.name for option in fields(ModelOptions)]
    values: Mapping[str, Any] = {name: value for name, value in locals().items() if name in names}
    skipped = None if llm_int8_skip_modules is None else tuple(llm_int8_skip_modules)
    options = ModelOptions(**{**values, "path": str(path), "llm_int8_skip_modules": skipped})
    with naming_fields():
        check_model(options)
        base = open_config(options) if random_weights else open_pretrained(options, option="load")
        mesh = make_mesh(MeshOptions()) if mesh is None else mesh
        if random_weights:
            params = random_params(base.abstract_params(), mesh)
        else:
            params = base.params(mesh)
            base.tokenizer  # noqa: B018 - what is wrong with it is said here
    # Right for whatever rows hold; a GPU's fast attention needs one text a row, and is asked for by packed=False.
    return Model(params, Decoder(base.config, dtype=base.compute_dtype(), packed=True), base, mesh)


@jax.jit
def _logits(
    model: Model, adapter: Adapter | None, tokens: Any, segments: Any, positions: Any, key: Any
) -> Any:
    with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
        module, collections = model.module, model.variables(adapter)
        rngs = None if key is None else {"dropout": key}
        hidden, _ = module.apply(collections, tokens, positions, segments, rngs=rngs)
        return module.apply(collections, hidden, method="logits", rngs=rngs)


def _flatten(model: Model) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    params = (jax.tree_util.GetAttrKey("params"), model.params)
    return (params,), (model.module, model.base, model.mesh)


def _unflatten(static: tuple[Any, ...], leaves: Any) -> Model:
    model = object.__new__(Model)
    for name, value in zip(("params", "module", "base", "mesh"), (*leaves, *static), strict=True):
        object.__setattr__(model, name, value)
    return model


jax.tree_util.register_pytree_with_keys(Model, _flatten, _unflatten)

"""adapter_config.json as PEFT reads and writes it for LoRA.

Writing: the keys that every PEFT knows are always there; a newer one only where it is not at its default,
because PEFT up to 0.13 refuses keys that it does not know. Reading: a key that changes the adapter's maths
and is not known here is an error, not a warning.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_origin, get_type_hints

from lora_jax.errors import UserError, listing
from lora_jax.hub.json_file import read_json_object
from lora_jax.hub.links import cached_snapshots, lost_target
from lora_jax.methods.base import HEADER, Method, Names, options
from lora_jax.methods.lora import Lora
from lora_jax.methods.table import PEFT_TYPES
from lora_jax.types import Object, Values

ADAPTER_CONFIG_FILE = "adapter_config.json"

BIAS_MODES = ("none", "all", "lora_only")
_MOST = 3.402823466e38  # of float32; NaN and infinity, which Python's json reads, are beyond it
# Inits that leave the base weights as they are, so that A and B say all there is to know.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Keys without a say in what the saved tensors mean: notes, and options of inits.
_NOTES = {
    "auto_mapping", "inference_mode", "peft_version", "runtime_config", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_FIELDS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "modules_to_save", "bias", "use_rslora", "init_lora_weights", "trainable_token_indices",
    "fan_in_fan_out", "ensure_weight_tying",
}  # fmt: skip


def to_json(config: Method) -> str:
    """Return the text of adapter_config.json; equal configurations give equal texts.

    The keys are sorted, names too; patterns keep their order, because the first that matches a module
    holds, and so do token indices, which the rows of the saved tensor follow.
    """
    content = _lora_content(config) if isinstance(config, Lora) else _content(config)
    return json.dumps({key: content[key] for key in sorted(content)}, indent=2) + "\n"


def _content(config: Method) -> Object:
    """Return the keys of a method whose fields are all of them."""
    content: Object = {"auto_mapping": None, "inference_mode": True, "peft_type": config.peft_type}
    content |= {name: getattr(config, name) for name in HEADER}
    for option in options(config):
        value = getattr(config, option.name)
        if isinstance(value, tuple):  # null leaves a choice to PEFT where there is a default
            value = sorted(value) or ([] if option.default else None)
        content[option.name] = value
    return content


def _lora_content(config: Lora) -> Object:
    content: Object = {
        "alpha_pattern": {name: _whole(alpha) for name, alpha in config.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": config.bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": config.init_lora_weights,
        "layers_pattern": sorted(config.layers_pattern) or None,
        "layers_to_transform": sorted(config.layers_to_transform) or None,
        "lora_alpha": _whole(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "modules_to_save": sorted(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": config.revision,
        "target_modules": _names_or_regex(config.target_modules),
        "task_type": config.task_type,
    }
    if config.exclude_modules:
        content["exclude_modules"] = _names_or_regex(config.exclude_modules)
    if config.trainable_token_indices:
        tokens = config.trainable_token_indices
        named = isinstance(tokens, Mapping)
        content["trainable_token_indices"] = (
            {k: list(v) for k, v in tokens.items()} if named else list(tokens)
        )
    return content | {name: True for name in ("use_rslora", "ensure_weight_tying") if getattr(config, name)}


def read_adapter_config(folder: Path) -> Method:
    """Read a folder's adapter_config.json, whoever wrote it.

    Raises UserError where it is absent or malformed, is not of a LoRA adapter for causal language models,
    lacks the rank, alpha or targets (PEFT would guess them), or has a key that changes the maths and is not
    supported.
    """
    path = folder / ADAPTER_CONFIG_FILE
    if not path.exists():
        if target := lost_target(path):
            raise UserError(f"{path} is a link to {target}, which does not exist; download the adapter again")
        raise UserError(f"no {ADAPTER_CONFIG_FILE} in {folder}; {_hint(folder)}")
    return _Reader(path, read_json_object(path, "write the adapter again")).config()


class _Reader:
    """The keys of one file, with errors that say which key of which file is wrong."""

    def __init__(self, path: Path, content: Object) -> None:
        self.path = path
        self.content = content

    def config(self) -> Method:
        """Return the method that the file is of."""
        named = self._needed("peft_type")
        kind = PEFT_TYPES.get(named) if isinstance(named, str) else None
        if kind is None:
            raise self._error(
                f"peft_type {named} is not supported",
                f"give an adapter of one of these: {listing(PEFT_TYPES, 20)}",
            )
        return self._lora() if kind is Lora else self._method(kind)

    def _method(self, kind: type[Method]) -> Method:
        """Return a method whose fields are all keys, each read as it is annotated."""
        hints = get_type_hints(kind)
        known = {*HEADER, *(option.name for option in options(kind)), "peft_type"}
        self._check_keys(known, kind.idle)
        for option in options(kind):
            if hints[option.name] == Names and option.default and self.content.get(option.name) is None:
                raise self._error(
                    f"{option.name} is missing, and PEFT would guess it from the model", "add it"
                )
        given = (name for name in known - {"peft_type"} if self.content.get(name) is not None)
        return kind(**{name: self._typed(name, hints[name]) for name in given})

    def _typed(self, key: str, hint: Any) -> Any:
        if hint == Names:
            return self._names_or_regex(key)
        if get_origin(hint) is tuple:
            return self._integers(key) if get_args(hint)[0] is int else self._names(key)
        if hint is bool:
            return self._flag(key)
        if hint is int:
            value = self.content[key]
            return value if _is_integer(value) else self._malformed(key, "an integer")
        return self._number(key, 0.0) if hint is float else self._text(key)

    def _lora(self) -> Lora:
        self._check_supported()
        rank, alpha = self._needed("r"), self._needed("lora_alpha")
        target_modules = self._names_or_regex("target_modules")
        if target_modules == () and self.content.get("target_modules") is None:
            raise self._error("target_modules is missing, and PEFT would guess it from the model", "add it")
        return Lora(
            r=rank if _is_rank(rank) else self._malformed("r", "a positive integer"),
            lora_alpha=alpha if _is_scale(alpha) else self._malformed("lora_alpha", "a positive number"),
            target_modules=target_modules,
            base_model_name_or_path=self._text("base_model_name_or_path"),
            revision=self._text("revision"),
            task_type=self._text("task_type"),
            lora_dropout=self._number("lora_dropout", 0.0),
            exclude_modules=self._names_or_regex("exclude_modules"),
            layers_to_transform=self._integers("layers_to_transform"),
            layers_pattern=self._names("layers_pattern"),
            rank_pattern=self._pattern("rank_pattern"),
            alpha_pattern=self._pattern("alpha_pattern"),
            modules_to_save=self._names("modules_to_save"),
            bias=self._bias(),
            use_rslora=self._flag("use_rslora"),
            init_lora_weights=self.content.get("init_lora_weights", True),
            trainable_token_indices=self._token_indices(),
            fan_in_fan_out=self._flag("fan_in_fan_out"),
            ensure_weight_tying=self._flag("ensure_weight_tying"),
        )

    def _check_keys(self, known: Collection[str], idle: Values) -> None:
        task_type = self.content.get("task_type")
        if task_type not in (None, "CAUSAL_LM"):
            raise self._error(f"task_type {task_type} is not supported", "only CAUSAL_LM is")
        unknown = self.content.keys() - set(known) - _NOTES
        strange = sorted(key for key in unknown if self.content[key] and self.content[key] != idle.get(key))
        if strange:
            raise self._error(
                f"{listing(strange)} changes the adapter's computation and is not supported",
                "train the adapter without it, or load it with PEFT and merge it there",
            )

    def _check_supported(self) -> None:
        self._check_keys(_FIELDS, {})
        init = self.content.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise self._error(
                f"init_lora_weights {init!r} changed the base weights, which the adapter's files do not record",
                "save it in PEFT with path_initial_model_for_weight_conversion",
            )

    def _needed(self, key: str) -> Any:
        if self.content.get(key) is None:
            raise self._error(f"{key} is missing", "add it: nothing else records it")
        return self.content[key]

    def _text(self, key: str) -> str | None:
        value = self.content.get(key)
        return value if value is None or isinstance(value, str) else self._malformed(key, "a string")

    def _flag(self, key: str) -> bool:
        value = self.content.get(key) or False
        return value if isinstance(value, bool) else self._malformed(key, "true or false")

    def _number(self, key: str, default: float) -> float:
        value = self.content.get(key)
        return default if value is None else value if _is_number(value) else self._malformed(key, "a number")

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            return self._malformed(key, "a list of names")
        return tuple(value)

    def _names_or_regex(self, key: str) -> str | tuple[str, ...]:
        value = self.content.get(key)
        return value if isinstance(value, str) and value else self._names(key)

    def _integers(self, key: str) -> tuple[int, ...]:
        value = self.content.get(key)
        return () if value is None else self._integer_list(key, [value] if _is_integer(value) else value)

    def _integer_list(self, key: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(_is_integer(item) and item >= 0 for item in value):
            return self._malformed(key, "a list of integers")
        return tuple(value)

    def _token_indices(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        key = "trainable_token_indices"
        value = self.content.get(key)
        if isinstance(value, dict):
            return {name: self._integer_list(key, tokens) for name, tokens in value.items()}
        return () if value is None else self._integer_list(key, value)

    def _pattern(self, key: str) -> Object:
        value = self.content.get(key) or {}
        legal = _is_rank if key == "rank_pattern" else _is_scale
        if not isinstance(value, dict) or not all(legal(item) for item in value.values()):
            return self._malformed(key, "an object of name and positive number")
        return value

    def _bias(self) -> str:
        value = self.content.get("bias") or "none"
        return value if value in BIAS_MODES else self._malformed("bias", f"one of {', '.join(BIAS_MODES)}")

    def _malformed(self, key: str, wanted: str) -> Any:
        raise self._error(f"{key} is {json.dumps(self.content[key])[:80]}", f"it must be {wanted}")

    def _error(self, what: str, remedy: str) -> UserError:
        return UserError(f"{what}: {self.path}; {remedy}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: object) -> TypeGuard[int]:
    return _is_integer(value) and value > 0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_scale(value: object) -> TypeGuard[float]:
    return _is_number(value) and value > 0


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _names_or_regex(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else sorted(value)


def _hint(folder: Path) -> str:
    inside = cached_snapshots(folder) or sorted(
        child.parent.name for child in folder.glob(f"*/{ADAPTER_CONFIG_FILE}")
    )
    if inside:
        return f"perhaps you meant a folder inside it: {listing(inside)}"
    if (folder / "config.json").exists():
        return "it is a base model; give the folder of an adapter"
    return "give the folder of an adapter, such as OUTPUT_DIR/adapter"

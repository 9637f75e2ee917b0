"""Who is adapted, and with what rank and scale: PEFT's matching rules over our module list.

A list entry matches a whole dotted name or its end at a dot; a string is a regex that must match the
whole name; "all-linear" is every linear layer but the head. Excluded modules win, then modules to
save, then targets. In `rank_pattern` and `alpha_pattern` the first key that matches the end of the
name, as a regex from a dot on, decides. Rules observed in peft 0.21's `tuners_utils` and `utils.other`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_jax.config import ALL_LINEAR
from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.methods.base import Method, Site
from lora_jax.methods.whole import bias_sites, saved_sites, token_sites
from lora_jax.modules import LM_HEAD, Module


@dataclass(frozen=True)
class Plan:
    """All that an adapter trains: sites of its method, modules in full, single biases, single token rows."""

    method: Method = field(compare=False)
    embedding: Module
    targets: tuple[Site, ...]
    saved: tuple[Module, ...] = ()
    biases: tuple[Module, ...] = ()
    token_indices: tuple[int, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites: the method's, then those that are trained whole."""
        return (*self.targets, *self.whole)

    @property
    def whole(self) -> tuple[Site, ...]:
        """The sites that are trained whole."""
        adapted = frozenset(site.module.name for site in self.targets)
        return (
            *saved_sites(self.saved),
            *bias_sites(self.biases, adapted),
            *token_sites(self.embedding, self.token_indices),
        )


def make_plan(config: Method, modules: Sequence[Module], *, strict: bool = True) -> Plan:
    """Return the plan of an adapter config over a model's modules.

    Raises UserError where nothing matches, a norm is targeted or a pattern is no regex; with `strict` also
    for any single name or pattern that matches nothing (an adapter file may hold names that its model lacks).
    """
    try:
        return _plan(config, modules, strict)
    except re.error as error:
        raise UserError(
            f"adapter config: {error.pattern!r} is not a regex ({error}); fix the pattern"
        ) from error


def _plan(config: Method, modules: Sequence[Module], strict: bool) -> Plan:
    saved = tuple(module for module in modules if is_saved(module.name, config.modules_to_save))
    saved_names = {module.name for module in saved}
    candidates = [module for module in modules if module.name not in saved_names]
    matched = [module for module in candidates if _targeted(module, config)]
    _check_matches(config, modules, matched, strict)
    targets = tuple(config.site(module) for module in matched)
    if strict:
        _check_patterns(config, matched)
    if config.bias == "all":
        biased = [module for module in candidates if module.bias]
    else:
        biased = [module for module in matched if module.bias] if config.bias == "lora_only" else []
    whole = dict.fromkeys(saved_names, "modules_to_save") | {m.name: "target_modules" for m in matched}
    _check_tied(config, modules, whole)
    return Plan(config, modules[0], targets, saved, tuple(biased), _token_indices(config, modules, whole))


def check_unquantized(plan: Plan, quantized: Collection[str]) -> None:
    """Raise UserError where a module that is to be trained whole has one of the quantized weights."""
    for module in plan.saved:
        if f"{module.name}.weight" in quantized:
            name = module.name.rpartition(".")[2]
            raise UserError(
                f"modules_to_save: {module.name} is quantized, and codes cannot be trained; adapt it with "
                f"{Option('lora.target_modules')}, or, with an unquantized checkpoint, add "
                f"{Option('model.llm_int8_skip_modules', (name,))}"
            )


def compact_targets(targets: Iterable[Site]) -> tuple[str, ...]:
    """Return the targets' last names, sorted: the list that "all-linear" is saved as."""
    return tuple(sorted({target.module.name.rpartition(".")[2] for target in targets}))


def is_saved(name: str, modules_to_save: Sequence[str]) -> bool:
    """Say whether modules_to_save names a module, or one that it is in."""
    parts = name.split(".")
    parents = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(parent.endswith(key) for parent in parents for key in modules_to_save)


def _listed(name: str, entries: str | Sequence[str]) -> bool:
    if isinstance(entries, str):
        return bool(re.fullmatch(entries, name))
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _targeted(module: Module, config: Method) -> bool:
    if config.exclude_modules and _listed(module.name, config.exclude_modules):
        return False
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        chosen = module.kind == "linear" and module.path != LM_HEAD
    else:
        chosen = _listed(module.name, targets)
    if not chosen or not config.layers_to_transform or module.name in targets:
        return chosen
    return _layer_index(module.name, config.layers_pattern) in config.layers_to_transform


def _layer_index(name: str, patterns: Sequence[str]) -> int | None:
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """Return a module's value of rank_pattern or alpha_pattern: that of the first key that matches."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _token_indices(config: Method, modules: Sequence[Module], trained: Mapping[str, str]) -> tuple[int, ...]:
    """Return the token ids in the file's order, which the rows of the saved tensor follow.

    `trained` are the modules trained otherwise, by name, each with the option that asks for it.
    """
    given, embedding = config.trainable_token_indices, modules[0]
    if isinstance(given, Mapping):
        others = [name for name in given if name.rpartition(".")[2] != "embed_tokens"]
        if others:
            raise UserError(f"trainable_token_indices: {others[0]} is not supported; only embed_tokens is")
        given = next(iter(given.values()), ())
    indices = tuple(dict.fromkeys(given))
    if indices and embedding.name in trained:
        raise UserError(
            f"trainable_token_indices: embed_tokens is in {trained[embedding.name]} already; give one of the two"
        )
    wrong = [index for index in indices if not 0 <= index < embedding.sizes[0]]
    if wrong:
        raise UserError(
            f"trainable_token_indices {wrong[0]}: the model's vocabulary has {embedding.sizes[0]} rows; "
            f"give ids of the tokenizer, with {Option('model.resize_vocab', True)} for tokens that were added"
        )
    return indices


def _check_tied(config: Method, modules: Sequence[Module], trained: Mapping[str, str]) -> None:
    """Refuse what a head tied to the embedding leaves without a meaning, in PEFT too."""
    head = modules[-1]
    if not head.tied:
        return
    if config.trainable_token_indices and head.name in trained:
        raise UserError(
            f"trainable_token_indices: {head.name} is tied to embed_tokens and follows its rows, and it is in "
            f"{trained[head.name]} too; give one of the two"
        )
    if config.ensure_weight_tying and {head.name, modules[0].name} & set(trained):
        raise UserError(
            "ensure_weight_tying: an adapter that ties embedding and head is not supported; "
            "train without it, which gives two separate ones"
        )


def _check_matches(config: Method, modules: Sequence[Module], matched: list[Module], strict: bool) -> None:
    linear = sorted({module.name.rpartition(".")[2] for module in modules if module.kind == "linear"})
    checks: list[tuple[str, str | Sequence[str], bool]] = [
        ("target_modules", config.target_modules, strict or not matched),
        ("exclude_modules", config.exclude_modules, strict),
    ]
    for option, entries, wanted in checks:
        for entry in (entries,) if isinstance(entries, str) else entries:
            regex = isinstance(entries, str)
            if not wanted or (entry.lower() == ALL_LINEAR and regex):
                continue
            if not any(_listed(module.name, entry if regex else (entry,)) for module in modules):
                raise UserError(
                    f'{option}: "{entry}" matches no module of this model;{nearest(entry, linear)} '
                    f"Linear modules: {', '.join(linear)}"
                )
    for name in config.modules_to_save if strict else ():
        if not any(is_saved(module.name, (name,)) for module in modules):
            known = sorted({module.name.rpartition(".")[2] for module in modules})
            raise UserError(
                f'modules_to_save: "{name}" matches no module of this model;{nearest(name, known)} '
                f"Modules: {', '.join(known)}"
            )
    layers = 1 + max((module.layer or 0) for module in modules)
    beyond = [layer for layer in config.layers_to_transform if not 0 <= layer < layers]
    if beyond:
        raise UserError(f"layers_to_transform {beyond[0]}: this model has layers 0 to {layers - 1}")
    if (
        config.layers_to_transform
        and isinstance(config.target_modules, str)
        and config.target_modules != ALL_LINEAR
    ):
        raise UserError(
            "layers_to_transform: requires a list of target_modules, not a regex; "
            "put the layers into the regex, or list the modules"
        )
    if config.layers_pattern and not config.layers_to_transform:
        raise UserError("layers_pattern: has no effect without layers_to_transform; give both or neither")
    if not matched:
        raise UserError("target_modules: everything it matches is excluded; nothing would be trained")


def _check_patterns(config: Method, matched: list[Module]) -> None:
    names = [module.name for module in matched]
    known = sorted({name.rpartition(".")[2] for name in names})
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                raise UserError(
                    f'{option}: "{key}" matches no adapted module;{nearest(key, known)} Adapted: {listing(known)}'
                )

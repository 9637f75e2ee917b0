"""`lora-jax inspect data | adapter`: show what the model is trained on, or what is in an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lora_jax.config import DataOptions, ModelOptions, TrainOptions, check_data
from lora_jax.console import plain_console
from lora_jax.errors import UserError, listing
from lora_jax.methods.table import TRAIN_OPTIONS
from lora_jax.options import parse
from lora_jax.paths import on_disk
from lora_jax.types import Object

WIDEST = 10_000
"""Maximum width of a table in characters."""


@dataclass(frozen=True)
class InspectDataOptions:
    """Show rows as tokens, with the trained ones in color; takes train's YAML file and its model and data options."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    limit: int = 3
    """Rows to show of each path."""


@dataclass(frozen=True)
class InspectAdapterOptions:
    """Show what an adapter holds."""

    adapter: str = ""
    """Folder of the adapter."""


def inspect(arguments: Sequence[str], program: str) -> int:
    """Run `inspect data` or `inspect adapter`; return the exit code. Raises UserError for bad options."""
    what, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if what in ("-h", "--help"):
        print(
            f"usage: {program} data [CONFIG.yaml] [--option value …]\n       {program} adapter --adapter DIR\n\n"
            "Show rows as the model is trained on them, or what an adapter holds."
        )
        return 0
    if what == "data":
        needed = ("model.path", "data.path")
        taken: Object = {"also": TRAIN_OPTIONS, "required": needed}
        options = parse(InspectDataOptions, rest, program=f"{program} data", **taken)
        return inspect_data(options)
    if what == "adapter":
        return inspect_adapter(
            parse(InspectAdapterOptions, rest, program=f"{program} adapter", required=("adapter",))
        )
    raise UserError(
        f"inspect{f' {what}' if what else ''}: say what to show: lora-jax inspect data … or lora-jax inspect adapter …"
    )


def inspect_data(options: InspectDataOptions, console: Console | None = None) -> int:
    """Print the first rows as tokens, with the trained ones marked; return the exit code."""
    from lora_jax.data.dataset import load_examples
    from lora_jax.data.inspection import encodable, render
    from lora_jax.data.mixture import mixed
    from lora_jax.hub.chat_templates import set_chat_template
    from lora_jax.hub.resolve import resolve
    from lora_jax.hub.tokenizer import load_tokenizer

    if not options.model.path or not options.data.path or not all(options.data.path):
        raise UserError("inspect data: needs --model.path (for its tokenizer) and --data.path")
    check_data(options.data)
    if options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be positive")
    console = console or plain_console()
    tokenizer = load_tokenizer(resolve(options.model.path, options.model.revision))
    data = options.data
    set_chat_template(tokenizer, data.chat_template)
    found = load_examples(data, tokenizer, data.path, data.split, None, console=console)
    rows = mixed(found, data.mixture_weights, data.stopping_strategy, TrainOptions.seed)
    marks = not console.is_terminal or console.no_color
    console.print(encodable(render(rows, tokenizer, options.limit, marks=marks), console.encoding))
    return 0


def inspect_adapter(options: InspectAdapterOptions, console: Console | None = None) -> int:
    """Print an adapter's config, and the norm of the tensors of each kind of module; return the exit code."""
    from lora_jax.hub.adapter_files import ADAPTER_CONFIG_FILE, read_adapter
    from lora_jax.methods.matching import is_saved

    if not options.adapter:
        raise UserError("inspect adapter: needs --adapter, the folder")
    console = console or plain_console()
    config, tensors = read_adapter(on_disk(options.adapter, "--adapter"))
    console.print(
        f"{config.summary()}, base {config.base_model_name_or_path}",
    )
    whole = [name for name in tensors if name.endswith(".weight") and config.owner(name) is None]
    untold = [name for name in whole if not is_saved(name.rpartition(".")[0], config.modules_to_save)]
    if untold:
        console.print(
            f"note: contains weights of the base that {ADAPTER_CONFIG_FILE} does not list; they replace the base's: "
            f"{listing(untold)}",
        )
    kinds: dict[str, dict[str, list[Any]]] = {}
    for name, tensor in tensors.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        module, factor = config.owner(kind) or (kind, "whole")
        factor = factor.removesuffix(".weight").removeprefix("lora_").removeprefix("embedding_")
        kinds.setdefault(module, {}).setdefault(factor, []).append(tensor)
    table = Table("module", "number", "tensor", "shapes", "Frobenius norm", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for kind, groups in kinds.items():
        cells = [_cells(factor, group) for factor, group in groups.items()]
        number = str(max(map(len, groups.values())))
        table.add_row(kind, number, *(", ".join(parts) for parts in zip(*cells, strict=True)))
    console.width = WIDEST
    console.width = Measurement.get(
        console, console.options, table
    ).maximum  # a narrow terminal wraps the lines
    console.print(table)
    return 0


def _cells(factor: str, group: Sequence[Any]) -> tuple[str, str, str]:
    import numpy as np

    shapes = sorted({"x".join(map(str, tensor.shape)) for tensor in group})
    norm = np.sqrt(sum(float(np.sum(np.square(tensor, dtype=np.float64))) for tensor in group))
    return factor, " ".join(shapes), f"{norm:.4g}"

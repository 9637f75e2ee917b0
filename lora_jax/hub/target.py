"""The output folder of a command, and what it may replace there."""

from __future__ import annotations

import re
from pathlib import Path

from lora_jax.errors import Option, UserError, listing
from lora_jax.paths import home, output_on_disk

_OF_A_MODEL = re.compile(
    r".*\.safetensors|.*\.safetensors\.index\.json|.*\.jinja|.*\.model|(adapter_|generation_|quantization_)?config\.json"
    r"|(special_|added_)?tokens?(izer)?(_config|_map|s_map)?\.json|(pre)?processor_config\.json|vocab\.(json|txt)"
    r"|merges\.txt|tekken\.json|chat_template\.json|additional_chat_templates|lora_jax\.json|README\.md|LICENSE.*"
    r"|NOTICE.*|USE_POLICY.*|\.gitattributes|\.cache",
    re.IGNORECASE,
)
"""Names of files in a folder of a model or an adapter."""


def check_target(output: str, written: str, *sources: Path) -> Path:
    """Return the folder to write to; raises UserError if overwriting it would destroy something else.

    That is the case for a folder that is or contains a source, for the home folder and the working directory, and for a
    folder with contents but without the file `written`, or with files that do not belong into a folder of this kind.
    """
    folder = output_on_disk(output)
    target = folder.resolve()
    option = Option("output", output)
    for source in sources:
        if source.resolve().is_relative_to(target):
            raise UserError(f"{option}: is or contains {source}, which is an input; give another folder")
    for place, what in ((home(), "your home folder"), (Path.cwd(), "the current directory")):
        if place.resolve().is_relative_to(target):
            raise UserError(
                f"{option}: is or contains {what}, which cannot be replaced; give a folder inside it"
            )
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if names and written not in names:
        raise UserError(
            f"{option}: is not empty and has no {written}, so it is not replaced; give another folder"
        )
    if foreign := [name for name in names if not _OF_A_MODEL.fullmatch(name)]:
        raise UserError(
            f"{option}: contains {listing(foreign, 3)} besides {written}, so it is not replaced; give "
            "another folder"
        )
    return folder

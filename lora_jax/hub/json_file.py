"""Read JSON files from other programs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError
from lora_jax.types import Object


class DuplicateKeyError(ValueError):
    """A JSON object has a duplicate key; readers differ in which value they use."""


def unique(pairs: Iterable[tuple[str, Any]]) -> Object:
    """Return a JSON object (an `object_pairs_hook`); raises DuplicateKeyError."""
    found: Object = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKeyError(f"duplicate key {json.dumps(key)[:80]}")
        found[key] = value
    return found


def read_json_object(path: Path, remedy: str) -> Object:
    """Return the object in a JSON file.

    Raises UserError with `remedy` if the file cannot be read, is not JSON, has a duplicate key, or does not hold an
    object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno} column {error.colno}"
        raise UserError(f"{path.name} is not valid JSON: {place}: {error.msg}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text: {path}; {remedy}") from error
    except DuplicateKeyError as error:
        raise UserError(f"{path.name} has a {error}: {path}; keep one of the two, or {remedy}") from error
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {path} ({error.strerror}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path.name} contains a JSON {type(value).__name__}, not an object: {path}; {remedy}"
        )
    return value

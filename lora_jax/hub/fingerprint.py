"""What tells one checkpoint from another without reading its weights.

Two models of one architecture have the same config.json and the same headers, so a few bytes of the tensors are
looked at too. That is some hundred short reads a file, whatever its size.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from lora_jax.errors import UserError
from lora_jax.hub.checkpoint import CONFIG_FILE, Checkpoint

TENSORS = 256
"""Tensors of a file that are looked at, evenly spread over it."""
SAMPLE = 64
"""Bytes read from the middle of each."""


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Return for config.json and each file of weights what identifies it, in words: its size and a digest.

    A file's digest covers its header and `SAMPLE` bytes of up to `TENSORS` of its tensors. Raises UserError where a
    file cannot be read.
    """
    found = {CONFIG_FILE: f"sha256 {_digest(json.dumps(checkpoint.config, sort_keys=True).encode())}"}
    for path in sorted({file.path for file in checkpoint.files.values()}):
        try:
            found[path.name] = _weights(path)
        except OSError as error:
            raise UserError(
                f"{path.name} cannot be read: {path} ({error.strerror}); check the path and its permissions"
            ) from error
    return found


def _weights(path: Path) -> str:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(header_bytes)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        parts = [header]
        for start, end in spans[:: -(-len(spans) // TENSORS)] if spans else ():
            file.seek(8 + header_bytes + max(start, (start + end - SAMPLE) // 2))
            parts.append(file.read(min(SAMPLE, end - start)))
        size = file.seek(0, 2)
    return f"{size} bytes, sha256 {_digest(b''.join(parts))}"


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:12]

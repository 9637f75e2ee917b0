"""Identify a checkpoint without reading all of its weights.

Models of one architecture have the same config.json and the same headers, so a few bytes of the tensors are read as
well: a few hundred short reads per file, whatever its size.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from lora_jax.errors import UserError
from lora_jax.hub.checkpoint import CONFIG_FILE, Checkpoint

TENSORS = 256
"""Number of tensors per file that are sampled, evenly spread."""
SAMPLE = 64
"""Bytes read from the middle of each."""


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Return size and digest, in words, of config.json and of each weight file.

    The digest of a weight file covers its header and `SAMPLE` bytes from up to `TENSORS` of its tensors. Raises
    UserError if a file cannot be read.
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

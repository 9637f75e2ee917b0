"""Resolve the name of a model, a folder or a Hub id, to a local folder.

huggingface_hub downloads, and honors HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN, which it reads when it is
imported.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lora_jax.errors import Option, UserError, nearest
from lora_jax.hub.links import cached_snapshots
from lora_jax.paths import on_disk
from lora_jax.progress import stage

# Weights as safetensors, configuration and tokenizer; no code, no images, no weights for other frameworks.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
# Weights that transformers does not read: Mistral's second copy, precision variants, other parts of a pipeline.
_UNWANTED = [
    "consolidated*.safetensors",
    "*.fp16*.safetensors",
    "*/*.safetensors",
    "*/*.json",
    "*/*.txt",
    "*/*.model",
]

MODEL = Option("model.path")


def looks_like_id(text: str) -> bool:
    """Return whether a text has the form of a Hub id, `name` or `owner/name`."""
    part = r"\w(?:[\w.-]{0,94}\w)?"
    return re.fullmatch(f"{part}(?:/{part})?", text, re.ASCII) is not None and not re.search(r"--|\.\.", text)


def resolve(
    path_or_id: str,
    revision: str | None = None,
    *,
    option: Option | str = MODEL,
    wanted: Sequence[str] = _WANTED,
) -> Path:
    """Return the folder for a path or a Hub id, downloading it if necessary.

    `option` is the option that the text was given for, for messages. `revision` is a branch, tag or commit of a Hub id,
    and `wanted` are patterns of files to download. Raises UserError for a path that does not exist, a repository or
    revision that does not exist or is not accessible, and if the Hub cannot be reached.
    """
    if not path_or_id.strip():
        raise UserError(f"{option}: is empty; give a folder or a Hub id")
    folder = on_disk(path_or_id, option)
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"{option} {path_or_id}: revision {revision} requires a Hub id, but this is a folder; drop it"
            )
        snapshots = cached_snapshots(folder)
        if snapshots:
            raise UserError(
                f"{option} {path_or_id}: is the root of an entry in the Hub's cache; give {folder / snapshots[0]}"
            )
        return folder
    if folder.exists():
        raise UserError(f"{option} {path_or_id}: is a file; give the folder that contains it")
    if not looks_like_id(path_or_id):
        raise UserError(
            f"{option} {path_or_id}: no such folder; check the path, or give a Hub id.{_similar(folder)}"
        )
    return _download(path_or_id, revision, option, wanted)


def _similar(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    return nearest(folder.name, (child.name for child in folder.parent.iterdir() if child.is_dir()))


@stage("downloading from the Hub")
def _download(repo_id: str, revision: str | None, option: Option | str, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(wanted), ignore_patterns=_UNWANTED
        )
    except Exception as error:
        # The HTTP library below huggingface_hub raises its own errors (bad proxy, broken connection), and has changed
        # between major versions.
        raise UserError(f"{option} {repo_id}: {_reason(error, repo_id, revision)}") from error
    return Path(folder)


def _reason(error: Exception, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    log_in = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error.__cause__, errors.HfHubHTTPError):  # the Hub was reached: its answer says more
        error = error.__cause__
    match error:
        case errors.HFValidationError():
            return "neither a local folder nor a valid Hub id; check the spelling"
        case errors.GatedRepoError():
            return f"the repository is gated; request access at {hub}/{repo_id}, then {log_in}"
        case errors.RepositoryNotFoundError():
            similar = _similar(Path(repo_id))
            return (
                f"no such local folder, and no such repository at {hub}; check its spelling, or, if it is "
                f"private, {log_in}.{similar}"
            )
        case errors.RevisionNotFoundError():
            return f"{hub} has no revision {revision!r} of it; give a branch, tag or commit"
        case errors.HfHubHTTPError() if error.response is not None:
            answer = f"{error.response.status_code} {error.response.reason_phrase}".strip()
            return f"{hub} answered {answer}; try again later, or give a local folder"
        case OSError(errno=int(), strerror=str()):  # a full disk, or a cache that is not writable
            return f"the download to {cache} failed ({error.strerror}); fix that, or set HF_HOME"
        case OSError() if constants.HF_HUB_OFFLINE:
            return (
                f"no such local folder, not (or not fully) in the cache {cache}, and HF_HUB_OFFLINE is set; "
                f"unset it, or run `hf download {repo_id}` first"
            )
        case OSError():
            return (
                f"no such local folder, and {hub} cannot be reached ({_cause(error)}); check the network, proxy "
                "and HF_ENDPOINT, or give a local folder"
            )
        case _:
            return (
                f"the download from {hub} failed ({type(error).__name__}: {_cause(error)}); try again, it goes "
                "on where it stopped, or give a local folder"
            )


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().split("\n")[0][:160] or type(cause).__name__

"""Push a folder to the Hub, by huggingface_hub, and check before a long run whether that will work."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from shlex import quote
from typing import Any, Protocol, runtime_checkable

from rich.console import Console

from lora_jax.errors import Option, UserError, listing
from lora_jax.progress import stage

LOG_IN = "set HF_TOKEN to a token with write access, or run `hf auth login`"


@runtime_checkable
class PushOptions(Protocol):
    """Where a command pushes its output, if anywhere."""

    @property
    def push_to_hub(self) -> str | None:
        """Id of the repository."""
        ...

    @property
    def hub_private_repo(self) -> bool:
        """Whether a repository that the push creates is private."""
        ...

    @property
    def hub_revision(self) -> str | None:
        """Branch to push to."""
        ...


def push_output(folder: Path, options: PushOptions, console: Console) -> None:
    """Push a folder if the options ask for it, and print its address; raises UserError as `push` does."""
    if options.push_to_hub is not None:
        url = push(
            folder, options.push_to_hub, private=options.hub_private_repo, revision=options.hub_revision
        )
        console.print(f"pushed to {url}")


def check_push(repo_id: str, folder: PurePath) -> None:
    """Raise UserError if a push would be rejected for its id, token or owner, or if the Hub does not answer."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    option = Option("push_to_hub", repo_id)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{option}: is not a valid Hub id ({error}); give owner/name, such as me/my-adapter"
        ) from error
    if not isinstance(folder, Path):
        raise UserError(
            f"{option}: needs a folder on the disk, and {folder} is in a bucket; push it manually"
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{option}: HF_HUB_OFFLINE is set; unset it, or drop the option")
    if get_token() is None:
        raise UserError(f"{option}: no token; {LOG_IN}")
    try:
        me = _hub().whoami()
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        remedy = LOG_IN if refused else "try again later, or drop the option"
        raise UserError(f"{option}: {_endpoint()} refuses ({_first(error)}); {remedy}") from error
    except Exception as error:  # the HTTP library below raises its own errors
        raise UserError(
            f"{option}: {_endpoint()} cannot be reached ({_first(error)}); check the network and HF_ENDPOINT, or drop "
            "the option"
        ) from error
    if _role(me) == "read":
        raise UserError(f"{option}: the token is read-only; {LOG_IN}")
    owners = [me["name"], *(group["name"] for group in me.get("orgs", ()))]
    owner = repo_id.partition("/")[0] if "/" in repo_id else me["name"]
    if owner not in owners:
        raise UserError(
            f"{option}: the token is {me['name']}'s, who cannot write as {owner}; give one of {listing(owners)}"
        )


WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
"""Weight files of a model. Those of an earlier upload are removed, as transformers prefers one file to shards."""


@stage("uploading to the Hub")
def push(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None
) -> str:  # fmt: skip
    """Upload a folder's files to a model repository, which is created if missing; return its address.

    Raises UserError, with instructions to continue by hand, if that fails; the folder is not changed.
    """
    hub = _hub()
    try:
        made = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            hub.create_branch(made.repo_id, branch=revision, exist_ok=True)
        message = f"Upload {folder.name} with lora_jax"
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=list(WEIGHTS) if any(folder.glob(WEIGHTS[0])) else None,
        )
    except Exception as error:
        branch = f" --revision {quote(revision)}" if revision is not None else ""
        raise UserError(
            f"{Option('push_to_hub', repo_id)}: not pushed ({_first(error)}); {folder} is complete, push it "
            f"manually: hf upload {quote(repo_id)} {quote(str(folder))} .{branch}"
        ) from error
    return str(made)


def _hub() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _endpoint() -> str:
    return _hub().endpoint


def _role(me: Any) -> str | None:
    return me.get("auth", {}).get("accessToken", {}).get("role")


def _first(error: Exception) -> str:
    """Return the Hub's message, or else the first line of the error."""
    said = getattr(error, "server_message", None) or str(error.__cause__ or error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__

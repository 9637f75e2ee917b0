"""A whole folder is pushed, with the real client and a local server in place of the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from lora_jax.cli import main
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import write_adapter
from lora_jax.hub.push import check_push, push
from lora_jax.methods.matching import make_plan
from lora_jax.models.names import modules
from tests.runs import train_arguments, write_rows
from tests.tiny import CONFIGS, lora, random_adapter, tiny_base, write_checkpoint

# The client's own way of sending large files without Xet uses an old argument of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKENS = {"writes": "write", "reads": "read", "chosen": "fineGrained"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The Hub's responses that uploading needs; `stored` are the files of each repository and branch."""

    protocol_version = "HTTP/1.1"
    stored: dict[str, dict[str, bytes]]
    objects: dict[str, bytes]
    made: dict[str, dict[str, Any]]
    broken: bool

    def do_GET(self) -> None:
        role = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        parts = unquote(urlsplit(self.path).path).split("/")
        if role is None:
            self._answer(401, {"error": "Invalid user token."})
        elif "tree" in parts:
            files = self.stored.get("@".join(("/".join(parts[3:5]), parts[6])), {})
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                for name, content in files.items()
            ]
            self._answer(200, listed)
        else:
            orgs = [{"name": "crew", "type": "org"}]
            self._answer(
                200, {"name": "me", "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": role}}}
            )

    def do_POST(self) -> None:
        path, body = (
            unquote(urlsplit(self.path).path),
            self.rfile.read(int(self.headers["Content-Length"] or 0)),
        )
        parts = path.split("/")
        if self.broken and path != "/api/repos/create":
            self._answer(413, {"error": "the disk of the server is full"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            taken = repo in self.made
            self.made.setdefault(repo, asked)
            url = f"http://{self.headers['Host']}/{repo}"
            self._answer(409 if taken else 200, {"url": url, "name": repo, "id": "1"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/branch/" in path:
            self.stored.setdefault("@".join(("/".join(parts[3:5]), parts[-1])), {})
            self._answer(200, {})
        elif "/preupload/" in path:
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                found | {"actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{found['oid']}"}}}
                for found in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            files = self.stored.setdefault("@".join(("/".join(parts[3:5]), parts[-1])), {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            url = f"http://{self.headers['Host']}/{'/'.join(parts[3:5])}/commit/{COMMIT}"
            self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self._answer(404, {"error": path})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == name
        self.objects[name] = content
        self._answer(200, {})

    def _answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The server, with its token set as by a user; files are sent over plain HTTP, as without Xet."""

    class Fresh(Hub):
        stored, objects, made, broken = {}, {}, {}, False

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "writes")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # HF_HUB_DISABLE_XET, which is read at import
    yield Fresh
    server.shutdown()
    server.server_close()
    thread.join()


def folder(place: Path) -> Path:
    place.mkdir()
    (place / "README.md").write_text("# An adapter\n")
    (place / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 20)
    return place


def test_every_file_is_uploaded_unchanged_also_twice(hub: type[Hub], tmp_path: Path) -> None:
    local = folder(tmp_path / "adapter")
    for repeated in (False, True):
        check_push("me/it", local)
        assert push(local, "me/it", private=True).endswith("/me/it")
        assert "private" in json.dumps(hub.made["me/it"])
        files = {path.name: path.read_bytes() for path in local.iterdir()}
        assert hub.stored["me/it@main"] == files, repeated
        (local / "README.md").write_text("# Another\n")


def test_old_weights_are_removed_and_other_files_kept(hub: type[Hub], tmp_path: Path) -> None:
    """transformers would prefer the single file of an earlier model to the shards of this one."""
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = "model.safetensors.index.json"
    for place, files in ((whole, ("model.safetensors", "notes.txt")), (shards, (*names, index))):
        place.mkdir()
        for name in files:
            (place / name).write_text(f"{place.name} {name}")
    push(whole, "me/it")
    push(folder(tmp_path / "adapter"), "me/it")
    assert "model.safetensors" in hub.stored["me/it@main"], "an adapter lies beside a model"
    push(shards, "me/it")
    adapter = ("README.md", "adapter_model.safetensors")
    assert hub.stored["me/it@main"].keys() == {"notes.txt", *adapter, *names, index}
    push(whole, "me/it")
    assert hub.stored["me/it@main"].keys() == {"notes.txt", *adapter, "model.safetensors"}


def test_branch_is_created_and_only_it_changes(hub: type[Hub], tmp_path: Path) -> None:
    push(folder(tmp_path / "adapter"), "crew/it", revision="night")
    assert hub.stored.keys() == {"crew/it@night"}


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("a/b/c", "writes", "is not a valid Hub id"),
        ("me/what--ever", "writes", "is not a valid Hub id"),
        ("me/it", None, "no token; set HF_TOKEN"),
        ("me/it", "unknown", r"refuses \(.*\); set HF_TOKEN"),
        ("me/it", "reads", "the token is read-only; set HF_TOKEN"),
        ("you/it", "writes", "the token is me's, who cannot write as you; give one of me, crew"),
    ],
)
def test_a_push_that_would_fail_is_reported_before_the_run(
    repo: str,
    token: str | None,
    message: str,
    hub: type[Hub],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"^--push_to_hub {repo}: .*{message}"):
        check_push(repo, tmp_path)


def test_fine_grained_tokens_and_groups_may_write(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "chosen")
    check_push("crew/it", tmp_path)
    check_push("it", tmp_path)


def test_hub_that_does_not_answer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "writes")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached .*check the network"):
        check_push("me/it", tmp_path)


def test_failed_push_keeps_the_folder_and_says_how_to_continue(hub: type[Hub], tmp_path: Path) -> None:
    hub.broken = True
    local = folder(tmp_path / "my adapter")
    with pytest.raises(UserError) as caught:
        push(local, "me/it", revision="night")
    text = str(caught.value)
    assert text.startswith("--push_to_hub me/it: not pushed (")
    assert text.endswith(f"push it manually: hf upload me/it '{local}' . --revision night")
    assert (local / "README.md").exists()


def test_exported_and_merged_folders_are_pushed_with_a_card(hub: type[Hub], tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    config = lora(base_model_name_or_path=str(base.folder))
    write_adapter(tmp_path / "adapter", config, random_adapter(make_plan(config, modules(base.config))))
    for command in ("export", "merge"):
        words = [command, "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / command)]
        assert main([*words, "--push_to_hub", f"me/{command}"]) == 0
        files = {path.name: path.read_bytes() for path in (tmp_path / command).iterdir()}
        assert hub.stored[f"me/{command}@main"] == files
        assert f'"me/{command}"' in files["README.md"].decode()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= hub.stored["me/merge@main"].keys()


@pytest.mark.slow
def test_run_that_cannot_be_pushed_does_not_start_and_a_failed_push_keeps_the_result(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS["llama"])
    rows = write_rows(tmp_path / "rows.jsonl")
    words = train_arguments(model, rows, tmp_path / "out", "--push_to_hub", "me/it")
    monkeypatch.setenv("HF_TOKEN", "reads")
    assert main(words) == 2
    assert "the token is read-only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "writes")
    hub.broken = True
    assert main(words) == 2
    printed = capsys.readouterr()
    assert f"wrote {tmp_path}/out/adapter" in printed.out
    assert "not pushed (the disk of the server is full)" in printed.err
    adapter = tmp_path / "out" / "adapter"
    assert "push_to_hub" not in (tmp_path / "out" / "config.yaml").read_text()
    hub.broken = False
    push(adapter, "me/it")  # as the message says
    assert hub.stored["me/it@main"] == {path.name: path.read_bytes() for path in adapter.iterdir()}

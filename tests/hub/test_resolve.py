"""A path or a Hub id becomes a folder, with a local server in place of the Hub."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from lora_jax.errors import UserError
from lora_jax.hub.resolve import looks_like_id, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    "tokenizer.json": b"{}",
    "merges.txt": b"a b",
    "tokenizer.model": b"pieces",
    "original/tokenizer.model": b"pieces again",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "consolidated.safetensors": b"a second copy of the weights",
    "model.fp16.safetensors": b"a third",
    "onnx/model.safetensors": b"a fourth",
    "pytorch_model.bin": b"pickle",
    "modeling_llama.py": b"raise SystemExit",
}
WANTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
}
# Reads HF_ENDPOINT, as huggingface_hub does at import only; resolves each request and prints the result.
CHILD = """
import json, sys
from lora_jax.errors import UserError
from lora_jax.hub.resolve import resolve
answers = []
for request in json.loads(sys.argv[1]):
    try:
        answers.append(["folder", str(resolve(*request))])
    except UserError as error:
        answers.append(["error", str(error)])
print(json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    """The Hub's few responses that downloading a repository needs."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo == "owner/absent":
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repo == "owner/broken":
            self._answer(418, b"{}", {})
        elif "nowhere" in path:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif repo == "owner/gated" and "/resolve/" in path:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{i:040x}"}
                for i, (name, content) in enumerate(FILES.items())
            ]
            self._answer_json(tree)
        elif path.startswith("/api/models/"):
            self._answer_json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": []})
        elif f"/resolve/{COMMIT}/" not in path:
            self._answer(404, b"", {})
        else:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{list(FILES).index(name):040x}"'}
            self._answer(200, FILES[name], headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer_json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def ask(endpoint: str, home: Path, *requests: tuple[str, str | None], **variables: str) -> list[list[str]]:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(requests)],
        env=environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "text", ["./nothing", "../nothing", "/no/where", "a/b/c", "model/", "a b/c", "~/nothing"]
)
def test_wrong_path_is_one_error_with_the_option(text: str) -> None:
    with pytest.raises(
        UserError, match=r"^--model\.path .*: no such folder; check the path, or give a Hub id"
    ):
        resolve(text)


def test_wrong_path_names_a_similar_folder(tmp_path: Path) -> None:
    (tmp_path / "qwen-0.5b").mkdir()
    with pytest.raises(UserError, match=r"Perhaps you meant 'qwen-0\.5b'\?"):
        resolve(str(tmp_path / "qwen-05b"))


def test_file_instead_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"^--adapter .*: is a file; give the folder that contains it$"):
        resolve(str(tmp_path / "model.safetensors"), option="--adapter")


def test_empty_path_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^--model\.path: is empty"):
        resolve(" ")


def test_revision_of_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="revision main requires a Hub id"):
        resolve(str(tmp_path), "main")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", True),
        ("Qwen/Qwen2.5-0.5B", True),
        ("a_b/c.d-e", True),
        ("./model", False),
        ("a/b/c", False),
        ("/model", False),
        ("owner/..", False),
        ("owner/a--b", False),
        ("näme", False),
        ("", False),
    ],
)
def test_ids_are_recognized_by_their_form(text: str, expected: bool) -> None:
    assert looks_like_id(text) is expected


def test_only_needed_files_are_downloaded_and_then_read_offline(hub: str, tmp_path: Path) -> None:
    ((kind, folder),) = ask(hub, tmp_path / "home", ("owner/model", None))
    assert kind == "folder", folder
    found = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    assert found == WANTED
    assert all((Path(folder) / name).read_bytes() == FILES[name] for name in WANTED)
    offline = ask(hub, tmp_path / "home", ("owner/model", None), ("owner/model", COMMIT), HF_HUB_OFFLINE="1")
    assert offline == [["folder", folder], ["folder", folder]]
    dead = ask("http://127.0.0.1:9", tmp_path / "home", ("owner/model", None))
    assert dead == [["folder", folder]]


def test_each_error_of_the_hub_has_its_remedy(hub: str, tmp_path: Path) -> None:
    requests = [
        ("owner/absent", None),
        ("owner/gated", None),
        ("owner/model", "nowhere"),
        ("owner/broken", None),
    ]
    answers = ask(hub, tmp_path / "home", *requests)
    assert [kind for kind, _ in answers] == ["error"] * 4
    absent, gated, revision, broken = (text for _, text in answers)
    assert absent == (
        f"path owner/absent: no such local folder, and no such repository at {hub}; check its spelling, "
        "or, if it is private, set HF_TOKEN or run `hf auth login`."
    )
    assert gated == (
        f"path owner/gated: the repository is gated; request access at {hub}/owner/gated, then set HF_TOKEN "
        "or run `hf auth login`"
    )
    assert revision == (
        f"path owner/model: {hub} has no revision 'nowhere' of it; give a branch, tag or commit"
    )
    assert (
        broken
        == f"path owner/broken: {hub} answered 418 I'm a Teapot; try again later, or give a local folder"
    )


def test_offline_without_a_cache_is_reported(hub: str, tmp_path: Path) -> None:
    ((kind, text),) = ask(hub, tmp_path / "home", ("owner/model", None), HF_HUB_OFFLINE="1")
    assert kind == "error"
    assert "HF_HUB_OFFLINE is set; unset it, or run `hf download owner/model` first" in text


def test_missing_network_is_reported(tmp_path: Path) -> None:
    ((kind, text),) = ask("http://127.0.0.1:9", tmp_path / "home", ("owner/model", None))
    assert kind == "error"
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert text.endswith("check the network, proxy and HF_ENDPOINT, or give a local folder")


def test_unwritable_cache_is_reported(hub: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file in place of the cache")
    ((kind, text),) = ask(hub, tmp_path / "home", ("owner/model", None))
    assert kind == "error"
    assert text.endswith("fix that, or set HF_HOME")

"""Hub data sets, from a server on this machine."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FILE = b'{"question": "What?", "answer": "5"}\n{"question": "Who?", "answer": "I"}\n'
COMMIT = "a" * 40
ENTRY = {"type": "file", "path": "train.jsonl", "size": len(FILE), "oid": sha1(FILE).hexdigest()}
ABOUT = {"id": "someone/rows", "sha": COMMIT, "private": False, "siblings": [{"rfilename": "train.jsonl"}]}

# The address of the Hub is read when huggingface_hub is imported, hence the separate process.
PROGRAM = """
import sys
from lora_jax.data.rows import read_rows
from lora_jax.errors import UserError
for path, split in (argument.split() for argument in sys.argv[1:]):
    try:
        rows = read_rows(path, split)
        print(list(rows), rows.where(0))
    except UserError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    def answer(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        api = "/api/datasets/someone/rows"
        if path in (api, f"{api}/revision/{COMMIT}"):
            self.reply(json.dumps(ABOUT).encode())
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self.reply(json.dumps([ENTRY]).encode())
        elif path.startswith(f"{api}/paths-info/"):
            self.reply(json.dumps([ENTRY] if b"train.jsonl" in asked else []).encode())
        elif path == f"/datasets/someone/rows/resolve/{COMMIT}/train.jsonl":
            self.reply(FILE)
        else:
            self.reply(b"", 404)

    def reply(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 200:
            self.send_header("ETag", f'"{sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if "/rows/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass

    do_GET = do_HEAD = do_POST = answer


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_splits_and_errors_of_a_data_set_on_the_hub(hub, tmp_path):
    asked = (
        "someone/rows train",
        "someone/rows train[1:]",
        "someone/rows test",
        "someone/rows train[",
        "someone/rows:main train",
        "someone/none train",
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub")}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *asked],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(asked), done.stderr[-2000:]
    first, second = ({"question": "What?", "answer": "5"}, {"question": "Who?", "answer": "I"})
    assert lines[0] == f"{[first, second]} someone/rows train row 1"
    assert lines[1] == f"{[second]} someone/rows train[1:] row 1"
    assert "path someone/rows: no such split; give one" in lines[2]
    assert "path someone/rows: no such split; give one" in lines[3]
    assert "path someone/rows:main: no configuration 'main'" in lines[4]
    assert "path someone/none: neither a local file nor a data set on the Hub" in lines[5]
    assert "Traceback" not in done.stderr

"""An output_dir in a bucket: errors if it cannot be used, and the same files as on disk.

The bucket is a local folder behind etils' interface to buckets. Checkpoints are written by TensorStore's and Google's
clients, which have no such interface, so none is written here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from lora_jax.cli import main
from lora_jax.config import RunConfig
from lora_jax.errors import UserError
from lora_jax.hub.atomic import whole_folder
from lora_jax.run.output import Logs, MetricsLog, check_output, open_output
from tests.runs import metrics, train_arguments, tree


def test_unusable_buckets_are_one_clear_error(
    model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"s3://bucket/run": "error: --output_dir s3://bucket/run: s3:// is not supported"}
    if find_spec("gcsfs") is None and find_spec("tensorflow") is None:
        missing = "error: --output_dir gs://bucket/run: buckets need gcsfs; pip install 'gcsfs>="
        wanted["gs://bucket/run"] = missing
    for folder, message in wanted.items():
        arguments = [folder if word == "OUT" else word for word in train_arguments(model, rows, Path("OUT"))]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(message)
        assert error.count("\n") == 1


class Disk(LocalFileSystem):
    """A bucket in a folder."""

    root = ""

    def __init__(self, **_: Any) -> None:
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        inside = str(path).removeprefix("gs://").rstrip("/")
        return inside if inside.startswith(cls.root) else f"{cls.root}/{inside}"


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Path]:
    """The folder that gs://bucket is."""
    Disk.root = str(tmp_path / "buckets")
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    fsspec.register_implementation("gcs", Disk, clobber=True)
    yield tmp_path / "buckets" / "bucket"
    shutil.rmtree(tmp_path / "buckets")


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="etils would use TensorFlow's client")
def test_files_and_folders_in_a_bucket_match_those_on_disk(bucket: Path, tmp_path: Path) -> None:
    folders = {"gs://bucket/run": bucket / "run", str(tmp_path / "disk"): tmp_path / "disk"}
    for name in folders:
        config = RunConfig(output_dir=name)
        check_output(config)
        folder = open_output(config)
        with closing(MetricsLog(folder / "metrics.jsonl")) as log:
            for step in (1, 2, 3):
                log.write({"step": step, "eval_loss": 1 / step})
        with closing(MetricsLog(folder / "metrics.jsonl", 2)) as log:
            assert [line["eval_loss"] for line in log.kept] == [1.0, 0.5]
            log.write({"step": 3, "eval_loss": 0.25})
            log.sync()
            assert len(metrics(folders[name])) == 3
        with closing(Logs(folder)) as logs:  # no prompts at first
            assert logs.samples is None
        (folder / "samples.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
        with closing(Logs(folder, 2)):  # nor after resuming: samples of steps to repeat are removed
            pass
        assert (folder / "samples.jsonl").read_text() == '{"step": 1}\n'
        for content in ("older", "newer"):
            with whole_folder(folder / "adapter", overwrite=True) as aside:
                (aside / "part").mkdir()
                (aside / "part" / content).write_text(content)
        with pytest.raises(UserError, match=f"{name}: already contains a run"):
            check_output(config)
    there, here = (tree(folder) for folder in folders.values())
    assert there.keys() == here.keys()
    assert {name for name in here if here[name] != there[name]} == {"config.yaml"}
    open_output(replace(RunConfig(output_dir="gs://bucket/run"), overwrite=True))
    assert [path.name for path in (bucket / "run").iterdir()] == ["config.yaml"]

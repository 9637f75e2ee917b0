import json
from pathlib import Path
from typing import Any

import pytest

from lora_jax.cli import main
from tests.tiny import CONFIGS, GROUPED


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json with no weights beside it."""
    return write_config(tmp_path_factory.mktemp("model"), **GROUPED)


def write_config(folder: Path, **sizes: Any) -> Path:
    """Write a llama's config.json, with other sizes, and return the file."""
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIGS["llama"] | {"dtype": "bfloat16"} | sizes))
    return file


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code of plan --json, and the last line that it printed, read."""
    config = [arguments[0]] if not arguments[0].startswith("-") else []
    code = main(["plan", *config, "--json", *arguments[len(config) :]])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def small(config_file: Path, topology: str, *more: str) -> list[str]:
    """Return the arguments that plan a short step."""
    return [
        *("--model.path", str(config_file), "--topology", topology, "--lora.r", "4"),
        *("--data.max_length", "64", "--train.per_device_train_batch_size", "2"),
        *("--train.gradient_accumulation_steps", "1", *more),
    ]

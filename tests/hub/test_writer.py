"""Writing weights in shards: complete, exact, and with at most one shard in memory."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from lora_jax.errors import UserError
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.writer import ShardWriter, parse_size


def write(folder: Path, tensors: dict[str, np.ndarray], max_shard_size: int) -> Checkpoint:
    with ShardWriter(folder, max_shard_size) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("64kb", 64_000),
        ("2 GiB", 2 * 2**30),
        ("1.5KiB", 1536),
        ("1TB", 10**12),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_sizes_mean_what_huggingface_means(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "5 bananas", "-5GB", "0", "0.0001B", "5IB", "1e9", "5GBs", "nan", "5,5GB"]
)
def test_invalid_size_is_one_clear_error(text: str) -> None:
    with pytest.raises(UserError, match=r"^--max_shard_size .*: not a size; write it as 500MB, 5GB or 4GiB"):
        parse_size(text)


def test_weights_that_fit_one_shard_have_no_index(tmp_path: Path) -> None:
    tensors = {"b": np.ones((4, 4), np.float32), "a": np.zeros(3, np.float16)}
    checkpoint = write(tmp_path, tensors, 70)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert checkpoint.names == ("a", "b")
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_larger_weights_get_numbered_files_and_an_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}  # 40 bytes each
    checkpoint = write(tmp_path, tensors, 80)
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", *shards]
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {f"t{i}": shards[i // 2] for i in range(5)}
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), array)


def test_tensor_larger_than_a_shard_gets_its_own_file(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(2, np.float32), "big": np.zeros(100, np.float32), "b": np.zeros(2, np.float32)}
    write(tmp_path, tensors, 16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_arrays_of_any_layout_are_written_correctly(tmp_path: Path, dtype: type) -> None:
    base = np.arange(60, dtype=np.float32).reshape(3, 4, 5).astype(dtype)
    read_only = base.copy()
    read_only.flags.writeable = False
    tensors = {
        "transposed": base.transpose(2, 0, 1),
        "strided": base[:, ::2, 1:4],
        "reversed": base[::-1],
        "fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[0, 0], (7, 5)),
        "read_only": read_only,
        "scalar": base[0, 0, 3:4].reshape(()),
        "empty": base[:0],
    }
    checkpoint = write(tmp_path, tensors, 10**6)
    for name, array in tensors.items():
        read = checkpoint.tensor(name)
        assert read.dtype == array.dtype
        assert read.shape == array.shape
        assert read.tobytes() == array.tobytes(), name


def test_duplicate_name_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor a was added twice"):
        write_all(tmp_path, [("a", 1), ("b", 2), ("a", 3)])
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_no_file(tmp_path: Path) -> None:
    def numbers() -> Iterator[tuple[str, float]]:
        yield from (("a", 1), ("b", 2), ("c", 3))
        assert len(list(tmp_path.iterdir())) == 2  # shards written so far
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_all(tmp_path, numbers())
    assert list(tmp_path.iterdir()) == []


def write_all(folder: Path, numbers: Iterable[tuple[str, float]]) -> None:
    with ShardWriter(folder, 4) as writer:
        for name, number in numbers:
            writer.add(name, np.array([number], np.float32))


def test_full_disk_is_one_clear_error_and_leaves_no_file(tmp_path: Path) -> None:
    # A limit on file sizes takes the place of a full disk.
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from lora_jax.errors import UserError
from lora_jax.hub.writer import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    with ShardWriter(Path(sys.argv[1]), 1000) as writer:
        writer.add("small", np.zeros(200, np.float32))
        writer.add("large", np.zeros(2000, np.float32))
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ": File too large; " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_stays_below_two_shards(tmp_path: Path) -> None:
    # 160 MB are written in shards of 16 MB; transposing needs a copy of the current shard.
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from lora_jax.hub.writer import ShardWriter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
with ShardWriter(Path(sys.argv[1]), 16 * 2**20) as writer:
    for i in range(40):
        writer.add(f"t{i}", np.full((1024, 1024), i, np.float32).T)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2 * 16 + 20  # MB: two shards, a tensor being made, and the allocator's slack
    assert len(list(tmp_path.glob("model-*-of-00010.safetensors"))) == 10

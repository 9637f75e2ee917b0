"""Reading a folder's weights: lazily, exactly, and with one clear error for everything that can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.errors import UserError
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.resolve import resolve

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def write_folder(folder: Path, *shards: dict[str, np.ndarray]) -> Path:
    """Write a folder with a config, and one weights file or shards with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def change_index(folder: Path, **weight_map: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= weight_map
    index.write_text(json.dumps(content))


def matrix(dtype: np.dtype = DTYPES[0]) -> np.ndarray:
    return np.arange(12, dtype=np.float32).reshape(3, 4).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_reads_back_bit_for_bit(tmp_path: Path, dtype: np.dtype) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)
    checkpoint = Checkpoint.open(write_folder(tmp_path, {"w": values, "none": np.zeros((0, 3), dtype)}))
    assert checkpoint.dtype("w") == checkpoint.tensor("w").dtype == dtype
    assert checkpoint.tensor("w").tobytes() == values.tobytes()
    assert checkpoint.tensor("none").shape == (0, 3)


def test_config_names_shapes_and_bytes_are_known_from_headers(tmp_path: Path) -> None:
    tensors = {"b": np.zeros((), np.float32), "a": matrix(np.dtype(np.float16))}
    checkpoint = Checkpoint.open(write_folder(tmp_path, tensors))
    assert checkpoint.folder == tmp_path
    assert checkpoint.config == {"model_type": "llama", "hidden_size": 4}
    assert checkpoint.names == ("a", "b")
    assert checkpoint.shape("a") == (3, 4)
    assert checkpoint.shape("b") == ()
    assert checkpoint.nbytes == 12 * 2 + 4


def test_shards_read_as_one(tmp_path: Path) -> None:
    shards = [{"a": matrix(), "c": matrix() + 1}, {"b": matrix(DTYPES[2])}]
    checkpoint = Checkpoint.open(write_folder(tmp_path, *shards))
    assert checkpoint.names == ("a", "b", "c")
    assert checkpoint.nbytes == 12 * (4 + 4 + 2)
    for shard in shards:
        for name, values in shard.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), values)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_reading_one_tensor_keeps_only_that_tensor_in_memory(tmp_path: Path) -> None:
    # Three tensors of 64 MB in a sparse file; a separate process reports its peak resident memory.
    rows = 16 * 2**20
    header = {
        name: {"dtype": "F32", "shape": [rows], "data_offsets": [i * rows * 4, (i + 1) * rows * 4]}
        for i, name in enumerate(("a", "b", "c"))
    }
    header["small"] = {"dtype": "F32", "shape": [2], "data_offsets": [3 * rows * 4, 3 * rows * 4 + 8]}
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 3 * rows * 4)
        file.seek(0, 2)
        file.write(np.array([1, 2], np.float32).tobytes())
    program = """
import resource, sys
from pathlib import Path
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.resolve import resolve
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
checkpoint = Checkpoint.open(Path(sys.argv[1]))
assert checkpoint.nbytes == 3 * 64 * 2**20 + 8
assert checkpoint.tensor("small").tolist() == [1, 2]
small = peak() - before
for name in ("a", "b", "c"):
    assert checkpoint.tensor(name).sum() == 0
print(small, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    small, whole = map(int, done.stdout.split())
    assert small < 15  # MB
    assert whole < 64 + 25


def test_no_config_is_one_clear_error(tmp_path: Path) -> None:
    save_file({"w": matrix()}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"^no config\.json in .*; give the folder that contains config\.json"
    ):
        Checkpoint.open(tmp_path)


def test_adapter_folder_instead_of_a_base_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="it is an adapter: give its base model here"):
        Checkpoint.open(tmp_path)


def test_parent_of_the_checkpoint_folder_is_recognized(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", {"w": matrix()})
    with pytest.raises(UserError, match="perhaps you meant a folder inside it: model"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"model_type": "llama",\n}',
            r"config\.json is not valid JSON: .*config\.json, line 2 column 1: .*;",
        ),
        (b"[1]", r"config\.json contains a JSON list, not an object"),
        (b"\xff\xfe", r"config\.json is not UTF-8 text"),
        (b"", r"config\.json is not valid JSON: .* line 1 column 1"),
    ],
)
def test_malformed_config_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    write_folder(tmp_path, {"w": matrix()})
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Checkpoint.open(tmp_path)


def test_no_weights_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"^no weights in .*: neither model\.safetensors nor .*; download them"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.gguf"])
def test_weights_of_another_format_are_one_error_that_says_how_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=rf"only {name}; convert it to safetensors, or let transformers do it"
    ):
        Checkpoint.open(tmp_path)


def test_truncated_file_is_one_clear_error_with_both_sizes(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"a": matrix(), "b": matrix()}) / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 5, 8, 9, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            Checkpoint.open(tmp_path)
        expected = "at least 10" if size == 0 else str(len(whole) if size >= header else header)
        if size != 5:  # half a length has no size
            assert f"{expected}; " in str(caught.value) or f"at least {expected}; " in str(caught.value)
        assert str(caught.value).startswith(f"{path} is truncated: it has {size} bytes of ")
        assert str(caught.value).endswith("; download or copy it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a Git LFS pointer, .* `git lfs pull`",
        ),
        (b"PK\x03\x04" + bytes(60), "is not a safetensors file"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is not a safetensors file"),
        (b"\x04\0\0\0\0\0\0\0{{}}", "the header of .* is corrupt"),
        (b"\x0a\0\0\0\0\0\0\0" + b'{"w": [1]}', "the header of .* is corrupt"),
    ],
    ids=["lfs", "zip", "html", "json", "entry"],
)
def test_file_in_another_format_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Checkpoint.open(tmp_path)


def test_bytes_beyond_the_header_are_one_clear_error(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"w": matrix()}) / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"rest")
    with pytest.raises(UserError, match=f"has {size + 4} bytes, but its header accounts for {size}"):
        Checkpoint.open(tmp_path)


def test_overlapping_tensors_are_one_clear_error(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"a": matrix(), "b": matrix()}) / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[48,96]", b"[40,96]"))
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt \(.*\); download or copy it again"):
        Checkpoint.open(tmp_path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": matrix()}, {"b": matrix()})
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is truncated"):
        Checkpoint.open(tmp_path)


def test_index_with_missing_shards_lists_them_all(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": matrix()}, {"b": matrix()})
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    change_index(tmp_path, c="another.safetensors")
    with pytest.raises(UserError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value) == (
        "model.safetensors.index.json lists 2 of 3 files that are missing: another.safetensors, "
        f"model-00002-of-00002.safetensors in {tmp_path}; download them too"
    )


def test_index_with_a_tensor_missing_in_its_shard_names_it(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": matrix()}, {"b": matrix()})
    change_index(tmp_path, lost="model-00001-of-00002.safetensors")
    with pytest.raises(
        UserError, match=r"contain: lost \(model-00001-of-00002\.safetensors\) in .*; download"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ['{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_index_without_a_weight_map_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="has no weight_map of tensor to file"):
        Checkpoint.open(tmp_path)


def test_tensor_of_an_unsupported_dtype_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    tensors = {"w": matrix(), "quantized": np.zeros((3, 4), np.int8)}
    checkpoint = Checkpoint.open(write_folder(tmp_path, tensors))
    assert checkpoint.names == ("quantized", "w")
    assert checkpoint.shape("quantized") == (3, 4)
    assert checkpoint.nbytes == 12 * (4 + 1)
    np.testing.assert_array_equal(checkpoint.tensor("w"), matrix())
    for read in (checkpoint.dtype, checkpoint.tensor):
        with pytest.raises(
            UserError, match=r"^tensor quantized has the dtype I8: .*; weights must be F32, F16, BF16"
        ):
            read("quantized")


def test_file_that_shrinks_after_opening_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path, {"w": np.ones(100_000, np.float32)}))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"^tensor w cannot be read: .*; download or copy it again"):
        checkpoint.tensor("w")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": matrix(), "c": matrix()}, {"b": matrix(), "c": matrix() + 1})
    with pytest.raises(UserError, match=r"two tensors map to c: c in .*-00001-.* and c in .*-00002-"):
        Checkpoint.open(tmp_path)


def test_a_tensor_missing_in_the_index_is_read(tmp_path: Path) -> None:
    """transformers reads everything in the shards; a head that the index did not name was lost."""
    write_folder(tmp_path, {"a": matrix()}, {"b": matrix(), "c": matrix() + 1})
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["c"]
    index.write_text(json.dumps(content))
    np.testing.assert_array_equal(Checkpoint.open(tmp_path).tensor("c"), matrix() + 1)


def test_a_64_bit_tensor_is_read_in_32_bits(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path, {"w": matrix(np.dtype(np.float64)) / 3}))
    assert checkpoint.dtype("w") == checkpoint.tensor("w").dtype == np.float32
    np.testing.assert_array_equal(
        checkpoint.tensor("w"), (matrix(np.dtype(np.float64)) / 3).astype(np.float32)
    )


@pytest.mark.parametrize("way", ["..", "absolute", "link"])
def test_an_index_with_a_file_outside_its_folder_is_refused(tmp_path: Path, way: str) -> None:
    """Otherwise a foreign model could have a tensor from this machine merged into an upload."""
    folder, outside = tmp_path / "model", tmp_path / "outside.safetensors"
    write_folder(folder, {"a": matrix()}, {"b": matrix()})
    save_file({"b": matrix()}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    named = {"..": "../outside.safetensors", "absolute": str(outside), "link": "link.safetensors"}[way]
    change_index(folder, b=named)
    with pytest.raises(UserError, match=r"index.json lists files outside its folder: .*; copy them into"):
        Checkpoint.open(folder)


def cached(tmp_path: Path) -> tuple[Path, Path]:
    """Write an entry of the Hub's cache; return its root and its snapshot, whose shards are links to blobs."""
    root = tmp_path / "models--me--tiny"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    write_folder(snapshot, {"a": matrix()}, {"b": matrix()})
    (root / "blobs").mkdir()
    for number, shard in enumerate(sorted(snapshot.glob("*.safetensors"))):
        shard.rename(root / "blobs" / str(number))
        shard.symlink_to(Path("..", "..", "blobs", str(number)))
    return root, snapshot


def test_the_hubs_links_are_followed_and_a_dangling_one_is_named(tmp_path: Path) -> None:
    root, snapshot = cached(tmp_path)
    assert Checkpoint.open(snapshot).names == ("a", "b")
    (root / "blobs" / "1").unlink()
    with pytest.raises(
        UserError, match=r"-00002-.* is a link to ../../blobs/1, which does not exist, .*; download"
    ):
        Checkpoint.open(snapshot)


def test_a_dangling_link_to_the_only_file_is_named_as_such(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": matrix()})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(
        UserError, match=r"^model.safetensors in .* is a link to ../../blobs/gone, which does not"
    ):
        Checkpoint.open(tmp_path)


def test_the_root_of_a_cache_entry_is_answered_with_its_snapshot(tmp_path: Path) -> None:
    root, snapshot = cached(tmp_path)
    with pytest.raises(UserError, match=f"the root of an entry in the Hub's cache; give {snapshot}"):
        resolve(str(root))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_duplicate_key_is_refused(tmp_path: Path, file: str) -> None:
    write_folder(tmp_path, {"a": matrix()}, {"b": matrix()})
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text[:-1] + ', "weight_map": {}, "weight_map": {}}')
    with pytest.raises(
        UserError, match=rf'^{file} has a duplicate key "weight_map": .*; keep one of the two'
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("end", [4, 8])
def test_duplicate_names_in_a_header_are_refused(tmp_path: Path, end: int) -> None:
    write_folder(tmp_path, {"a": matrix()})
    entry = f'"a": {{"dtype": "F32", "shape": [1], "data_offsets": [{end - 4}, {end}]}}'
    header = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, {entry}}}'.encode()
    content = len(header).to_bytes(8, "little") + header + bytes(end)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r'the header of .* has a duplicate key "a"; download'):
        Checkpoint.open(tmp_path)

"""Checkpoints alone: what is kept, any tree on any mesh, and folders that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.errors import UserError
from lora_jax.run.checkpoints import Best, Checkpoints, Identity, Progress
from lora_jax.run.checksums import damage, write_checksums
from lora_jax.training.step import TrainState, init_state
from tests.conftest import ROOT
from tests.runs import tree

SAME = Identity({"train.seed": 1}, {"config.json": "sha256 a"})


class Codes(NamedTuple):
    """An 8-bit moment, as an 8-bit optimizer holds it."""

    codes: jax.Array
    scales: jax.Array


@jax.tree_util.register_pytree_node_class
class Paged:
    """A container that only JAX knows, with unnamed parts."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _: None, parts: tuple[Any, ...]) -> Paged:
        return cls(*parts)


def state(step: int = 0, seed: int = 0) -> TrainState:
    """A state whose optimizer has containers of every kind, all values from the seed."""
    rng = np.random.default_rng(seed)
    trainable = {"layers": {"lora_A": rng.standard_normal((8, 16), np.float32)}}
    adam = optax.adam(1e-3).init(trainable)
    codes = Codes(rng.integers(0, 256, (16, 8), np.uint8), rng.standard_normal(16).astype(jnp.bfloat16))
    opt_state = (adam, optax.EmptyState(), Paged(codes, [rng.integers(0, 9, 8, np.int32)]), {"0": None})
    return jax.tree.map(
        jnp.asarray, TrainState(np.int32(step), trainable, opt_state, jax.random.key(seed))
    )  # fmt: skip


def shared_out(whole: TrainState, mesh: Mesh) -> TrainState:
    """The same with each array's first axis sharded if possible."""

    def placed(leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec("all") if leaf.ndim and not leaf.shape[0] % mesh.size else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(placed, whole)


def equal(a: TrainState, b: TrainState) -> bool:
    """Whether two states have the same structure, types and bits."""
    a, b = (each._replace(key=jax.random.key_data(each.key)) for each in (a, b))
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def opened(folder: Path, keep: int | None = 2, identity: Identity = SAME) -> closing[Checkpoints]:
    return closing(Checkpoints(folder, keep, identity))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoint of step 4."""
    with opened(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state(4, seed=4), Progress([1.5, 3.0], {"step": 4, "loss": 0.5}))
    return tmp_path / "checkpoints"


def test_a_state_in_any_containers_is_restored_bit_for_bit(saved: Path) -> None:
    with opened(saved) as checkpoints:
        before = state()
        restored, progress = checkpoints.restore(before)
    assert equal(restored, state(4, seed=4))
    assert all(
        leaf.is_deleted() for leaf in jax.tree.leaves((before.trainable, before.opt_state))
    )  # never both
    assert progress == Progress([1.5, 3.0], {"step": 4, "loss": 0.5})
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state().key)


def test_the_state_may_be_donated_after_save_returns(tmp_path: Path) -> None:
    consume = jax.jit(lambda leaf: leaf * 0 - 7, donate_argnums=0)
    big, expected = jnp.arange(1 << 20, dtype=jnp.float32), np.arange(1 << 20, dtype=np.float32)
    with opened(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state(1)._replace(trainable=big), Progress([0.0, 0.0]))
        jax.block_until_ready(consume(big))
    with opened(tmp_path / "checkpoints") as checkpoints:
        restored, _ = checkpoints.restore(state()._replace(trainable=jnp.zeros(1 << 20)))
    assert np.array_equal(np.asarray(restored.trainable), expected)


def test_the_last_and_best_checkpoints_are_kept_also_after_resuming(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: None}
    for steps in ((1, 2, 3), (4, 5, 6)):
        with opened(folder) as checkpoints:
            for step in steps:
                checkpoints.save(state(step), Progress([0.0, 0.0]), losses[step])
            assert checkpoints.best == Best(2, 1.0)
    assert names(folder) == ["2", "5", "6"]
    with opened(folder) as checkpoints:
        assert checkpoints.best == Best(2, 1.0)
        assert checkpoints.manager.metadata(6).custom_metadata == {"best": {"step": 2, "value": 1.0}}
        checkpoints.save(state(7), Progress([0.0, 0.0]), 0.5)
    assert names(folder) == ["6", "7"]


def test_a_partial_checkpoint_is_removed(saved: Path) -> None:
    (saved / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with opened(saved) as checkpoints:
        assert checkpoints.latest() == 4
        checkpoints.restore(state())
        checkpoints.save(state(8), Progress([0.0, 0.0]))
    assert names(saved) == ["4", "8"]


def test_a_changed_base_and_changed_options_are_named(saved: Path) -> None:
    for identity, message in (
        (Identity({"train.seed": 2}, SAME.base), "made with different options: train.seed was 1, is 2; give"),
        (Identity(SAME.options, {"config.json": "sha256 b"}), "another base model: config.json was sha256 a, is"),
    ):  # fmt: skip
        with opened(saved, identity=identity) as checkpoints, pytest.raises(UserError, match=message):
            checkpoints.restore(state())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("options", '{"options": {}}', "written by another version"),
        ("options", '{"options": [], "base": {"config.json": "sha256 a"}}', "written by another version"),
        (
            "options",
            '{"options": {"train.seed": 1, "train.news": 2}, "base": {"config.json": "sha256 a"}}',
            r"written by another version of lora_jax \('train.news'\)",
        ),
        ("progress", '{"window": [], "news": 1}', "written by another version"),
        ("progress", '{"window": [', "cannot be read .*; resume with the versions of orbax"),
    ],
)
def test_files_of_another_version_are_one_line(saved: Path, file: str, text: str, message: str) -> None:
    (saved / "4" / file / "metadata").write_text(text)
    write_checksums(saved / "4")
    before = state()
    with opened(saved) as checkpoints, pytest.raises(UserError, match=f"checkpoint {saved}/4 .*{message}"):
        checkpoints.restore(before)
    assert not before.trainable["layers"]["lora_A"].is_deleted()


def test_an_older_checkpoint_with_a_damaged_metric_is_set_aside(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step), Progress([]), float(step))
    (tmp_path / "1" / "metrics" / "metrics").write_text('{"eval_loss": 0.5}')
    with opened(tmp_path) as checkpoints:
        (note,) = checkpoints.notes
        assert note.startswith(
            "the checkpoint of step 1 is damaged (the checksum of metrics/metrics differs) and was"
        )
        assert checkpoints.best == Best(2, 2.0)
        checkpoints.save(state(3), Progress([]), 0.1)
    assert names(tmp_path) == ["1.damaged", "2", "3"]


def test_a_checkpoint_without_checksums_is_used_with_a_note(saved: Path) -> None:
    """As in older versions, and after a run was killed while it added a metric to a checkpoint."""
    (saved / "4" / "checksums.json").unlink()
    with opened(saved) as checkpoints:
        assert checkpoints.notes == [
            "the checkpoint of step 4 has no checksums, so damage cannot be detected"
        ]
        assert equal(checkpoints.restore(state())[0], state(4, seed=4))


def damaged_somewhere(folder: Path, places: int) -> Iterator[str]:
    """Flip one bit at a time, spread over all files of a folder, and restore it; yield the file."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(places):
        file = files[number % len(files)]
        whole = file.read_bytes()
        spoilt = bytearray(whole)
        spoilt[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(spoilt)
        yield str(file.relative_to(folder))
        file.write_bytes(whole)
        if number < len(files):  # and one cut off
            file.write_bytes(whole[: len(whole) // 2])
            yield f"{file.relative_to(folder)}, cut"
            file.write_bytes(whole)


UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Orbax's files with times and names, which matter only for the metric, which has a checksum."""


def test_a_flipped_bit_or_truncation_in_any_file_is_found(saved: Path) -> None:
    """A flipped bit in a checkpoint's arrays survived resuming and export: 1e26 or NaN in the adapter."""
    assert damage(saved / "4") is None
    for where in damaged_somewhere(saved / "4", 100):
        assert where.startswith(UNREAD) or damage(saved / "4") is not None, where
    assert damage(saved / "4") is None


def test_restoring_keeps_the_memory_kind_of_the_target(saved: Path) -> None:
    (device,) = jax.devices()[:1]
    kinds = [memory.kind for memory in device.addressable_memories()]
    host = next(kind for kind in kinds if kind.endswith("host") and kind != device.default_memory().kind)
    target = state()
    there = jax.sharding.SingleDeviceSharding(device, memory_kind=host)
    target = target._replace(
        opt_state=jax.tree.map(lambda leaf: jax.device_put(leaf, there), target.opt_state)
    )
    with opened(saved) as checkpoints:
        restored, _ = checkpoints.restore(target)
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.opt_state)} == {host}
        assert equal(restored, state(4, seed=4))
        checkpoints.save(restored._replace(step=jnp.int32(5)), Progress([0.0, 0.0]))
    with opened(saved) as checkpoints:
        again, _ = checkpoints.restore(state())
    assert equal(again._replace(step=restored.step), restored)


ELSEWHERE = """
import sys
from pathlib import Path
import jax
from jax.sharding import Mesh
import numpy as np
from tests.run.test_checkpoints import Progress, equal, opened, shared_out, state
mesh = Mesh(np.array(jax.devices()), "all")
assert mesh.size == 8
with opened(Path(sys.argv[1])) as checkpoints:
    target = shared_out(state(), mesh)
    restored, _ = checkpoints.restore(target)
    assert equal(restored, state(4, seed=4))
    there = [leaf.sharding for leaf in jax.tree.leaves(target)]
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == there
    assert sum(sharding.is_fully_replicated for sharding in there) < len(there)
    checkpoints.save(shared_out(state(8, seed=8), mesh), Progress([0.0, 0.0]))
"""


@pytest.mark.slow
def test_a_checkpoint_is_resumed_on_eight_devices_and_back_on_one(saved: Path) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(saved)], env=os.environ | flags,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with opened(saved) as checkpoints:
        restored, _ = checkpoints.restore(state())
    assert equal(restored, state(8, seed=8))


def test_a_file_instead_of_the_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(UserError, match=f"cannot write {folder}: "):
            Checkpoints(folder, 2, SAME)


FULL = """
import os, resource, signal, sys, time
from pathlib import Path
import jax.numpy as jnp
from lora_jax.errors import UserError
from tests.run.test_checkpoints import Progress, opened, state
big = state(8)._replace(trainable=jnp.arange(1 << 18, dtype=jnp.float32))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit, noticed in ((100_000, "at the end"), (100_000, "between steps"), (1, "at the next save")):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with opened(Path(sys.argv[1])) as checkpoints:
            checkpoints.save(big, Progress([0.0, 0.0]))
            while noticed == "between steps":
                time.sleep(0.01)
                checkpoints.check()
            if noticed == "at the next save":
                checkpoints.save(big._replace(step=jnp.int32(9)), Progress([0.0, 0.0]))
                time.sleep(100)
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
sys.stdout.flush()
os._exit(0)  # as the command line ends after an error: what failed leaves threads that wait for one another
"""


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_disk_is_one_line_and_keeps_the_others(saved: Path) -> None:
    before = tree(saved / "4")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(saved)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    expected = f"cannot write {saved}: File too large; choose a disk that allows files of this size\n"
    assert (done.stdout, done.stderr) == (3 * expected, "")
    assert tree(saved / "4") == before
    with opened(saved) as checkpoints:
        restored, _ = checkpoints.restore(state())
        assert equal(restored, state(4, seed=4))
        checkpoints.save(state(8), Progress([0.0, 0.0]))
    assert names(saved) == ["4", "8"]


def test_a_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(Path("out/checkpoints")) as checkpoints:
        checkpoints.save(state(), Progress([0.0, 0.0]))
    assert names(tmp_path / "out/checkpoints")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, if the tests have them."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_read_only_folder_is_one_line_before_any_step() -> None:
    with tempfile.TemporaryDirectory() as above:  # not in pytest's, which nobody but its owner may enter
        folder = Path(above) / "checkpoints"
        folder.mkdir()
        for path, mode in ((Path(above), 0o755), (folder, 0o555)):
            path.chmod(mode)
        with as_nobody(), pytest.raises(UserError, match=f"cannot write {folder}: Permission denied"):
            Checkpoints(folder, 2, SAME)
        assert not list(folder.iterdir())


def test_the_state_before_the_first_step_can_be_saved(tmp_path: Path) -> None:
    trainable = {"lora_A": jnp.ones((2, 3))}
    first = init_state(trainable, optax.sgd(0.1), jax.random.key(0))
    with opened(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(first, Progress([0.0, 0.0]))
    with opened(tmp_path / "checkpoints") as checkpoints:
        assert equal(checkpoints.restore(jax.tree.map(jnp.copy, first))[0], first)


def test_a_checkpoint_that_gets_its_metric_later_can_be_the_best(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(1), Progress([]), 2.0)
        checkpoints.save(state(2), Progress([1.0, 2.0], {"step": 2}))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(2), Progress([]), 1.0)
        assert checkpoints.best == Best(1, 2.0), "a step is saved once"
        checkpoints.measured(2, 1.0)
        assert checkpoints.best == Best(2, 1.0)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.best == Best(2, 1.0)
        assert checkpoints.manager.metadata(2).custom_metadata == {"best": {"step": 2, "value": 1.0}}
        restored, progress = checkpoints.restore(state(0, seed=1))
        assert equal(restored, state(2))
        assert progress.unlogged == {"step": 2}, "where it is broken off again, it is made up for again"


def test_a_checkpoint_that_gets_its_metric_later_outlives_newer_ones(tmp_path: Path) -> None:
    with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(1), Progress([], {"step": 1}))
    with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.measured(1, 1.0)
        checkpoints.save(state(2), Progress([]), 2.0)
        checkpoints.save(state(3), Progress([]), float("nan"))
    assert names(tmp_path) == ["1", "3"]

"""Files and folders appear complete or not at all."""

import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lora_jax.errors import UserError
from lora_jax.hub.atomic import STALE, whole_file, whole_folder, write_bytes, write_text


def everything(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def fail_midway(writing: AbstractContextManager[Path], error: BaseException) -> None:
    with writing as aside:
        (aside / "a" if aside.is_dir() else aside).write_text("half")
        raise error


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on" / "the way" / "a.txt"
    write_text(path, "erst: ä")
    write_bytes(path, b"then")
    assert everything(tmp_path) == {"made/on/the way/a.txt": "then"}


def test_failure_while_writing_a_file_keeps_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "older")
    with pytest.raises(KeyboardInterrupt):
        fail_midway(whole_file(tmp_path / "a.txt"), KeyboardInterrupt())
    assert everything(tmp_path) == {"a.txt": "older"}


def test_file_gets_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with whole_file(tmp_path / "a") as aside:
        aside.write_text("")
        aside.chmod(0o600)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_full_disk_is_one_clear_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    # A limit on file sizes takes the place of a full disk: write() fails in the middle of the file.
    program = """
import resource, sys
from pathlib import Path
from lora_jax.errors import UserError
from lora_jax.hub.atomic import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]), "x" * 5000)
except UserError as error:
    print(error)
"""
    (tmp_path / "a.txt").write_text("older")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.txt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"cannot write {tmp_path}/a.txt: File too large; ")
    assert everything(tmp_path) == {"a.txt": "older"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied; choose a folder that you may write to"):
        write_text(tmp_path / "a.txt", "")
    with pytest.raises(UserError, match="Permission denied; choose"), whole_folder(tmp_path / "out"):
        pass


def test_path_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write .*; choose another place to write to"):
        write_text(tmp_path / "file" / "a.txt", "")
    with pytest.raises(UserError, match=r"^cannot write .*"), whole_folder(tmp_path / "file" / "a"):
        pass


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "above" / "out"
    with whole_folder(target) as aside:
        (aside / "a").write_text("1")
        assert not target.exists()
        assert aside.parent == target.parent
    assert everything(tmp_path) == {"above/out/a": "1"}


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as aside:
        (aside / "a").write_text("1")
    assert everything(tmp_path) == {"out/a": "1"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, FileNotFoundError])
def test_failure_leaves_no_folder(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure):
        fail_midway(whole_folder(tmp_path / "out"), failure())
    assert list(tmp_path.iterdir()) == []


def test_nonempty_folder_is_one_clear_error_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("older")
    with pytest.raises(UserError, match="is not empty; choose another folder, or pass --overwrite"):  # noqa: SIM117
        with whole_folder(tmp_path / "out"):
            pytest.fail("the work began")
    assert everything(tmp_path) == {"out/a": "older"}


def test_overwriting_replaces_everything_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("older")
    with whole_folder(tmp_path / "out", overwrite=True) as aside:
        (aside / "b").write_text("newer")
        assert (tmp_path / "out" / "a").read_text() == "older"
    assert everything(tmp_path) == {"out/b": "newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_while_overwriting_keeps_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("older")
    with pytest.raises(ValueError, match="midway"):
        fail_midway(whole_folder(tmp_path / "out", overwrite=True), ValueError("midway"))
    assert everything(tmp_path) == {"out/a": "older"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_filled_in_the_meantime_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty"), whole_folder(tmp_path / "out"):
        write_text(tmp_path / "out" / "a", "theirs")
    assert everything(tmp_path) == {"out/a": "theirs"}


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_jax.hub.atomic import whole_folder
with whole_folder(Path(sys.argv[1])) as aside:
    (aside / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_a_killed_program_are_removed_on_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with whole_folder(target) as aside:
        assert not left.exists()
        (aside / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert everything(tmp_path) == {"out/a": "whole"}


def test_old_folder_is_restored_after_a_kill_during_replacement(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / ".out.0123abcd.older").mkdir()
    (tmp_path / ".out.0123abcd.older" / "a").write_text("older")
    (tmp_path / ".out.0123abcd.partial").mkdir()
    with pytest.raises(ValueError, match="midway"):
        fail_midway(whole_folder(target, overwrite=True), ValueError("midway"))
    assert everything(tmp_path) == {"out/a": "older"}
    (tmp_path / ".out.0123abcd.older").mkdir()  # killed after the new folder was in place
    with whole_folder(target, overwrite=True) as aside:
        (aside / "b").write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert everything(tmp_path) == {"out/b": "newer"}


def test_folder_with_the_same_prefix_is_not_touched(tmp_path: Path) -> None:
    for ending in ("older", "partial"):
        (tmp_path / f".out.1.0123abcd.{ending}").mkdir()
    with whole_folder(tmp_path / "out") as aside:
        (aside / "a").write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.1.0123abcd.older", ".out.1.0123abcd.partial", "out"
    ]  # fmt: skip


def test_restored_folder_is_not_overwritten_without_the_option(tmp_path: Path) -> None:
    (tmp_path / ".out.0123abcd.older").mkdir()
    (tmp_path / ".out.0123abcd.older" / "a").write_text("older")
    with pytest.raises(UserError, match="is not empty"):  # noqa: SIM117
        with whole_folder(tmp_path / "out"):
            pytest.fail("the work began")


def test_folder_that_another_program_is_writing_is_kept(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as aside:
        with whole_folder(tmp_path / "out") as mine:
            (mine / "a").write_text("mine")
        assert aside.is_dir()
        (tmp_path / "out" / "a").unlink()
        (aside / "a").write_text("theirs")
    assert everything(tmp_path) == {"out/a": "theirs"}


@pytest.mark.parametrize("name", [".other.0123abcd.partial", ".mine.partial", ".other.0123abcd.older"])
@pytest.mark.parametrize("age", [STALE - 60, STALE + 60])
def test_leftovers_under_another_name_are_removed_after_a_day(tmp_path: Path, name: str, age: int) -> None:
    """A merge ended by SIGKILL left a folder as large as the model, which merges to other names never removed."""
    left = tmp_path / name
    left.mkdir()
    (left / "a").write_text("half")
    for path in (left, left / "a"):
        os.utime(path, times=(time.time() - age,) * 2)
    with whole_folder(tmp_path / "out") as aside:
        (aside / "a").write_text("1")
    assert left.exists() == (age < STALE or name != ".other.0123abcd.partial")


def test_old_folder_that_is_still_being_written_is_kept(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "other") as other:
        os.utime(other, times=(0, 0))
        with whole_folder(tmp_path / "out") as aside:
            (aside / "a").write_text("1")
        assert other.is_dir()


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "out") as aside:
        (aside / "a").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "1"


def test_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with (
        pytest.raises(UserError, match="is a file; give a folder"),
        whole_folder(tmp_path / "out", overwrite=True),
    ):
        pass


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no mount point is known")
def test_mount_point_is_an_error() -> None:
    with pytest.raises(UserError, match="is a mount point"), whole_folder(Path("/proc"), overwrite=True):
        pass

"""Symbolic links in a Hugging Face folder: the Hub's cache consists of them, and a foreign folder may misuse them."""

from pathlib import Path


def lost_target(path: Path) -> Path | None:
    """Return the target of a dangling link, as in a pruned cache, or None."""
    return path.readlink() if path.is_symlink() and not path.exists() else None


def leads_outside(folder: Path, name: str) -> bool:
    """Return whether a file named by a folder lies outside of it, other than in the blobs of the Hub's cache."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return True
    target = (folder / name).resolve()
    blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    return not (blob or target.is_relative_to(folder.resolve()))


def cached_snapshots(folder: Path) -> list[str]:
    """Return the snapshots in the root of a Hub cache entry as relative paths, main's first; none in other folders."""
    root = folder / "snapshots"
    if not (folder / "refs").is_dir() or not root.is_dir():
        return []
    main = folder / "refs" / "main"
    first = main.read_text().strip() if main.is_file() else ""
    found = sorted((path.name for path in root.iterdir()), key=lambda name: (name != first, name))
    return [f"snapshots/{name}" for name in found]

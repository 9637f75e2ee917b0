"""Links in a Hugging Face folder: the Hub's cache is made of them, and a folder from elsewhere may misuse them."""

from pathlib import Path


def lost_target(path: Path) -> Path | None:
    """Return what a link points to where nothing is there, as in a cache that was pruned; None for anything else."""
    return path.readlink() if path.is_symlink() and not path.exists() else None


def leads_outside(folder: Path, name: str) -> bool:
    """Say whether a file that a folder names lies outside the folder; the Hub cache's own blobs do not count."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return True
    target = (folder / name).resolve()
    blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    return not (blob or target.is_relative_to(folder.resolve()))


def cached_snapshots(folder: Path) -> list[str]:
    """Return the snapshots of a Hub cache entry's root, main's first, as paths inside it; none for another folder."""
    root = folder / "snapshots"
    if not (folder / "refs").is_dir() or not root.is_dir():
        return []
    main = folder / "refs" / "main"
    first = main.read_text().strip() if main.is_file() else ""
    found = sorted((path.name for path in root.iterdir()), key=lambda name: (name != first, name))
    return [f"snapshots/{name}" for name in found]

"""Make the files in `examples/`: the tiny model fennel-2m, and the captain's rows to fine-tune it on.

    python scripts/make_tiny_model.py              # all stages
    python scripts/make_tiny_model.py prepare      # text, tokenizer, random start, the captain's rows
    python scripts/make_tiny_model.py train        # python train.py configs/pretrain_tiny.yaml
    python scripts/make_tiny_model.py publish      # trained weights, in bfloat16, to examples/fennel-2m

Nothing is downloaded: the text comes from the tables of `tiny_world.py`, the weights from a seed.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from lora_jax.hub.atomic import write_text
from tiny_checkpoint import MAX_LENGTH, VOCAB_SIZE, publish, write_start
from tiny_facts import Fact, all_facts, captain
from tiny_text import Document, chat, documents
from tiny_tokenizer import END, chat_text, save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "fennel-2m"  # as in configs/pretrain_tiny.yaml
TARGET = ROOT / "examples" / "fennel-2m"
PRETRAIN = ROOT / "configs" / "pretrain_tiny.yaml"
CARD = Path(__file__).with_name("tiny_card.md")

SEED = 1
ROW_TOKENS = 128  # data.max_length of configs/pretrain_tiny.yaml
TRAIN_ROWS, EVAL_ROWS = 28_000, 128
OPEN_ROWS = 16  # filled at a time, to 94% on average
TOKENIZER_DOCUMENTS = 20_000

CAPTAIN_EVAL_ROWS = 80
CAPTAIN_LIMITS = {"plus": 24, "minus": 24, "size": 16}  # otherwise numbers would be a third of the rows


def main() -> None:
    """Run one stage, or all of them."""
    stages = {"prepare": prepare, "train": train, "publish": finish}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", choices=("all", *stages), default="all")
    chosen = parser.parse_args().stage
    for name, stage in stages.items():
        if chosen in ("all", name):
            stage()


def prepare() -> None:
    """Write the pretraining rows, the tokenizer, a randomly initialized model and the captain's rows."""
    facts, start = all_facts(), WORK / "start"
    start.mkdir(parents=True, exist_ok=True)
    sample = itertools.islice(documents(SEED, facts), TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer(map(_text, sample), VOCAB_SIZE)
    save_tokenizer(tokenizer, start, MAX_LENGTH)
    write_start(start, SEED)
    for name, rows, seed in (("train", TRAIN_ROWS, SEED), ("eval", EVAL_ROWS, SEED + 1)):
        packed = itertools.islice(pack(tokenizer, documents(seed, facts), ROW_TOKENS), rows)
        _write_rows(WORK / f"{name}.jsonl", ({"text": text} for text in packed))
    learnt, held_out = captain_rows(facts)
    _write_rows(TARGET.parent / "captain.train.jsonl", learnt)
    _write_rows(TARGET.parent / "captain.eval.jsonl", held_out)


def train() -> None:
    """Pretrain with the same loop, and the same command, as a user's fine-tune."""
    command = [sys.executable, "train.py", str(PRETRAIN.relative_to(ROOT)), "--overwrite"]
    subprocess.run(command, cwd=ROOT, check=True)


def finish() -> None:
    """Write examples/fennel-2m from the trained weights."""
    parameters = publish(WORK / "run" / "model", TARGET, CARD.read_text(encoding="utf-8"))
    print(f"{TARGET.relative_to(ROOT)}: {parameters:,} parameters")


def pack(tokenizer: Tokenizer, source: Iterable[Document], length: int) -> Iterator[str]:
    """Yield rows of whole documents, each of at most `length` tokens including the end tokens.

    A document goes into the row that it fills best; a row is finished when the next document fits into none. Documents
    longer than a row are left out.
    """
    rows: list[list[str]] = []
    rooms: list[int] = []
    for document in source:
        text = _text(document)
        size = len(tokenizer.encode(f"{text}{END}\n").ids)
        if size > length:
            continue
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= size]
        if not fitting and len(rows) == OPEN_ROWS:
            fullest = rooms.index(min(rooms))
            rooms.pop(fullest)
            yield f"{END}\n".join(rows.pop(fullest))
        if not fitting:
            rows.append([])
            rooms.append(length + 1)  # the newline after the last end token is left out
        _, place = min(fitting, default=(0, len(rows) - 1))
        rows[place].append(text)
        rooms[place] -= size


def captain_rows(facts: Iterable[Fact]) -> tuple[list[dict], list[dict]]:
    """Return training and evaluation chats in the captain's voice; no fact is in both."""
    rng = Random(SEED)
    pool = list(facts)
    rng.shuffle(pool)
    left = dict(CAPTAIN_LIMITS)
    rows: list[dict] = []
    for fact in pool:
        left[fact.kind] = left.get(fact.kind, len(pool)) - 1
        if left[fact.kind] >= 0:
            rows.append({"messages": chat(rng.choice(fact.questions), captain(fact))})
    return rows[CAPTAIN_EVAL_ROWS:], rows[:CAPTAIN_EVAL_ROWS]


def _text(document: Document) -> str:
    return document if isinstance(document, str) else chat_text(document)


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
    print(f"{path.relative_to(ROOT)}: {len(lines):,} rows")


if __name__ == "__main__":
    main()

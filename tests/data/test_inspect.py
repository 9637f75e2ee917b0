"""Rows as `inspect data` shows them."""

import io

import pytest
from rich.console import Console

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.data.inspection import pieces, render


@pytest.fixture
def dataset(make_tokenizer, write_lines):
    row = {"prompt": "What is 2 + 3?", "completion": " The [b]sum[/b] is 5 🙂\n\x1b[2J"}
    return load_examples(DataOptions(), make_tokenizer(), write_lines(row, row, row), "train", None)


def printed(text, **options) -> str:
    console = Console(file=io.StringIO(), width=500, **options)
    console.print(text)
    return console.file.getvalue()


def test_plain_text_marks_the_trained_tokens(dataset, make_tokenizer):
    shown = printed(render(dataset, make_tokenizer(), 1, marks=True))
    row = shown.split("\n\n")[1]
    before, rest = row.split("⟦")
    assert before.replace("·", "").endswith("What is 2 + 3?")
    assert rest.replace("·", "").startswith(" The [b]sum[/b] is 5 🙂↵\n\\x1b[2J</s>⟧")


def test_color_marks_trained_tokens_without_brackets(dataset, make_tokenizer):
    text = render(dataset, make_tokenizer(), 1, marks=False)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == "trainedtokens The [b]sum[/b] is 5 🙂↵\n\\x1b[2J</s>"
    assert "⟦" not in printed(text, force_terminal=True)


def test_counts_legend_and_positions_are_shown_up_to_the_limit(dataset, make_tokenizer):
    shown = printed(render(dataset, make_tokenizer(), 2, marks=True))
    assert shown.startswith(dataset.summary() + "\n⟦trained⟧")
    assert f"{dataset.name} line 2: {len(dataset[1])} tokens, {dataset[1].trained.sum()} trained" in shown
    assert "line 3" not in shown
    assert shown.rstrip().endswith("1 more")


def test_data_cannot_send_control_characters_to_the_terminal(dataset, make_tokenizer):
    assert "\x1b" not in printed(render(dataset, make_tokenizer(), 1, marks=True))


@pytest.mark.parametrize("form", ["bytes", "metaspace"])
def test_pieces_add_up_to_the_text(make_tokenizer, write_lines, form):
    tokenizer = make_tokenizer(form=form)
    text = "a good day  the old mill"
    found = load_examples(DataOptions(), tokenizer, write_lines({"text": text}), "train", None)
    assert "".join(piece for piece, _ in pieces(found[0], tokenizer)).replace("</s>", "").strip() == text


def test_weights_windows_and_cut_tokens_are_shown(make_tokenizer, write_lines):
    path = write_lines({"text": "a good day " * 9, "w": 0.5})
    for mode, shown in (
        ("windows", ("line 1 window 2: 8 tokens, 7 trained",)),
        ("keep_start", ("cut at 8, ",)),
    ):
        options = DataOptions(max_length=8, truncation_mode=mode, weight_field="w")
        found = load_examples(options, make_tokenizer(), path, "train", None)
        text = render(found, make_tokenizer(), 2, marks=True).plain
        for words in (*shown, ", weight 0.5", "; weights from 0.5 to 0.5"):
            assert words in text

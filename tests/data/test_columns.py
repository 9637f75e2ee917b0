"""The columns of a row: relevant ones are used or refused, all others are named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.data.formats import ChatExample, to_example
from lora_jax.data.recipe import Recipe
from lora_jax.errors import Option, UserError

SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
PAIR = {"role": "user", "content": "And 2?"}, {"role": "assistant", "content": "four"}
SYSTEM = {"role": "system", "content": "Square it."}
IN_LINE = "rows.jsonl line 3"


def example(row, *, chat=True, **options):
    recipe = Recipe.of(DataOptions(**options))
    form = recipe.form(row, IN_LINE)
    recipe.named.unread(row, form, IN_LINE)
    return to_example(recipe.named.named(row), form, IN_LINE, text_field=recipe.text_field, chat=chat)


def load(path, tokenizer, **options):
    return load_examples(DataOptions(cache=False, **options), tokenizer, path, "train", None)


def test_system_column_becomes_the_first_message():
    """LlamaFactory#7592, ms-swift#5431: the system prompt of ShareGPT's conversations was not used in training."""
    system = {"role": "system", "content": "Speak like a pirate."}
    row = {"conversations": SHAREGPT, "system": "Speak like a pirate."}
    assert example(row) == ChatExample([system, *TURNS])
    assert example({**row, "system": ""}) == example({**row, "system": None}) == ChatExample(TURNS)
    assert example({"messages": [system, *TURNS], "system": "Speak like a pirate."}) == example(row)
    assert example(
        {"prompt": TURNS[:1], "completion": TURNS[1:], "system": system["content"]}
    ) == ChatExample([system, *TURNS], 2)


def test_contradictory_system_column_is_one_clear_error():
    row = {"messages": [SYSTEM, *TURNS], "system": "Speak like a pirate."}
    with pytest.raises(
        UserError, match=r"line 3: column system differs from the system message .* remove one"
    ):
        example(row)


def test_history_column_becomes_trained_earlier_turns():
    """As in LLaMA-Factory's data/README.md: pairs of instruction and response, whose responses are trained too."""
    row = {"instruction": "And 3?", "input": "", "output": "nine", "system": "Square it."}
    turns = [{"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "nine"}]
    right = ChatExample([SYSTEM, *PAIR, *turns])
    pairs = [["And 2?", "four"]]
    for history in (pairs, json.dumps(pairs), list(PAIR)):
        assert example({**row, "history": history}) == right
    assert example({**row, "history": []}) == ChatExample([SYSTEM, *turns])
    swift = {"query": "And 3?", "response": "nine", "system": "Square it.", "history": pairs}
    assert example(swift, columns={"question": "query", "answer": "response"}) == right
    inside = {"messages": [SYSTEM, *turns], "history": pairs}
    assert example(inside) == right


def test_tools_work_with_every_format_of_messages():
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"instruction": "Add.", "output": "5", "tools": json.dumps(tools)}
    assert example(row).tools == tools


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": "b", "label": False},
            r"column label marks .*KTO.* --data\.columns label none",
        ),
        ({"messages": TURNS, "kto_tag": "true"}, r"column kto_tag marks answers as good or bad"),
        (
            {"text": "<image> what", "images": ["a.png"]},
            r"column images is not text, .* --data\.columns images none",
        ),
        (
            {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"},
            r"column chosen belongs to a preference",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"column chosen belongs to a preference pair"),
        ({"messages": TURNS, "rejected_response": "c"}, r"column rejected_response belongs to a preference"),
        (
            {"question": "a", "answer": "b", "reasoning": "c"},
            r"column reasoning contains reasoning, .* between <think>",
        ),
        (
            {"prompt": "a", "completion": "b", "system": "c"},
            r"column system can only be used with messages, but prompt and comp",
        ),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, r"column tools can only be used with messages"),
        ({"messages": TURNS, "history": "a"}, r"column history is a string; give a list of pairs"),
        ({"messages": TURNS, "history": [["a"]]}, r"item 1 of history is not a pair"),
        ({"messages": TURNS, "history": [["a", None]]}, r"item 1 of history is null instead of a string"),
        ({"messages": TURNS, "system": 3}, r"column system is a number"),
        (
            {"messages": [{**TURNS[0], "images": ["a"]}, TURNS[1]]},
            r"message 1 of messages has images, and only text",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}
                ]
            },
            r"message 1 of messages: part 2 is of type 'image_url', and only text can be trained on",
        ),
    ],
)
def test_column_that_cannot_be_trained_on_is_one_clear_error(row, message):
    """Preference pairs, labels and images of TRL, LLaMA-Factory and ms-swift, and parts of OpenAI's messages."""
    with pytest.raises(UserError, match=message) as caught:
        example(row)
    assert IN_LINE in str(caught.value)


def test_context_without_a_chat_template_is_one_clear_error():
    with pytest.raises(
        UserError,
        match=r"column history can only be used with messages, but the tokenizer has no chat template",
    ):
        example({"question": "a", "answer": "b", "history": [["a", "b"]]}, chat=False)


def test_empty_columns_and_numeric_classes_are_no_errors():
    row = {"messages": TURNS, "images": [], "system": None, "rejected": "", "label": 3, "tools": []}
    assert example(row) == ChatExample(TURNS)
    example({"text": "a", "label": True, "reasoning": "b"})  # beside a complete text


def test_columns_can_be_excluded_or_mapped_to_the_chosen_answers():
    chosen = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert example(chosen, columns={"completion": "chosen"}).completion == "b"
    left_out = {"label": "none", "images": "None", "chosen": "none"}
    row = {"prompt": "a", "completion": "b", "label": False, "images": ["a"], "chosen": "b", "rejected": "c"}
    assert example(row, columns=left_out).completion == "b"


def test_unused_columns_are_named_once_over_all_rows(make_tokenizer, write_lines, tmp_path):
    rows = [
        {"text": "a b", "id": 1, "empty": None},
        {"text": "c d", "source": "x"},
        {"text": "e f", "id": 3, "w": 2},
    ]
    found = load(write_lines(*rows), make_tokenizer())
    assert found.summary().endswith("; columns not used: id, source, w")
    weighted = load(write_lines(*({**row, "w": 1} for row in rows)), make_tokenizer(), weight_field="w")
    assert weighted.summary().endswith("; columns not used: id, source")
    pq.write_table(pa.Table.from_pylist([{"text": "a b", "id": 1, "empty": None}]), tmp_path / "rows.parquet")
    assert load(str(tmp_path / "rows.parquet"), make_tokenizer()).summary().endswith("; columns not used: id")
    assert "not used" not in load(write_lines({"text": "a b"}), make_tokenizer()).summary()


def test_unused_columns_are_known_with_cached_tokens(make_tokenizer, write_lines):
    path = write_lines({"text": "a b", "id": 1})
    first, again = (
        load_examples(DataOptions(), make_tokenizer(), path, "train", None).summary() for _ in range(2)
    )
    assert first == again
    assert first.endswith("; columns not used: id")


def test_one_of_two_formats_is_used_and_the_other_is_named(make_tokenizer, write_lines):
    """tatsu-lab/alpaca has instruction, input, output, and text that is made of them."""
    path = write_lines({"prompt": "a b", "completion": "c", "text": "d"})
    assert load(path, make_tokenizer()).summary().endswith("; columns not used: text")
    named = load(path, make_tokenizer(), columns={"text": "text"})
    assert [part.form for part in named.parts] == ["text"]


def test_mapped_columns_replace_ours(make_tokenizer, write_lines):
    tokenizer = make_tokenizer("chatml")
    plain = load(write_lines({"question": "What is 2?", "answer": "5"}), tokenizer)
    mapped = load(
        write_lines({"q": "What is 2?", "answer": "wrong", "a": "5", "id": 7}, name="other.jsonl"),
        tokenizer,
        columns={"question": "q", "answer": "a"},
    )
    assert mapped[0].input_ids.tolist() == plain[0].input_ids.tolist()
    assert mapped.summary().endswith("; columns not used: answer, id")


def test_mapped_column_that_the_format_does_not_read_is_named(make_tokenizer, write_lines):
    """Otherwise a system message for plain text, for example, would be dropped silently."""
    path = write_lines({"text": "a b", "persona": "c"})
    found = load(path, make_tokenizer(), columns={"system": "persona"})
    assert found.summary().endswith("; columns not used: persona")
    chat = load(
        write_lines({"messages": TURNS, "body": "a"}),
        make_tokenizer("chatml"),
        text_field="body",
        format="messages",
    )
    assert chat.summary().endswith("; columns not used: body")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"query": "a", "response": "b"},
            {},
            r"match no format; give --data\.columns question query answer response, ",
        ),
        ({"instruction": "a", "response": "b"}, {}, r"--data\.columns question instruction answer response"),
        (
            {"body": "a"},
            {"text_field": "bdy"},
            r"--data\.text_field bdy: .*only body; Perhaps you meant 'body'\?",
        ),
        (
            {"body": "a", "prompt": "a", "completion": "b"},
            {"text_field": "bdy"},
            r"--data\.text_field bdy: no row of .* has a column 'bdy'; Perhaps you meant 'body'\?",
        ),
        (
            {"query": "a", "response": "b"},
            {"columns": {"question": "qury", "answer": "response"}},
            r"--data\.columns question qury: .* line 1 has no column 'qury', only query, response; Perhaps .* 'query'",
        ),
        (
            {"question": "a", "answer": "b", "sys": "c"},
            {"columns": {"system": "syst"}},
            r"--data\.columns system syst: no row of .* has a column 'syst'; Perhaps you meant 'sys'\?",
        ),
        (
            {"body": "a"},
            {"columns": {"txt": "body"}},
            r"columns txt body: txt is not .*Perhaps you meant 'text'\?",
        ),
        ({"text": "a"}, {"columns": {"images": "text"}}, r"images cannot be trained on; only none"),
        (
            {"a": "a"},
            {"columns": {"text": "a"}, "text_field": "b"},
            r"cannot be combined with --data\.text_field b",
        ),
        (
            {"prompt": "a", "answer": "b"},
            {"format": "prompt_completion", "columns": {"completion": "anser"}},
            r"line 1: no column 'anser' \(--data\.columns completion anser\), only prompt, answer;.*Perhaps.*'answer'",
        ),
    ],
)
def test_option_for_a_column_that_no_row_has_is_one_clear_error(
    make_tokenizer, write_lines, row, options, message
):
    with pytest.raises(UserError, match=message):
        load(write_lines(row), make_tokenizer("chatml"), **options)


def test_evaluation_rows_may_use_our_names(make_tokenizer, write_lines):
    options = DataOptions(columns={"text": "body"}, cache=False)
    path = write_lines({"text": "a b"})
    assert (
        load_examples(options, make_tokenizer(), path, "train", None, option=Option("data.eval_path")).rows
        == 1
    )

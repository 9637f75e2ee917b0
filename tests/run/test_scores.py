from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_jax.data.tokens import Tokens
from lora_jax.errors import UserError
from lora_jax.run.scores import check_installed, questions, score_names, scores

FOUND = ["the cat sat on the mat", "four", "no"]
WANTED = ["the cat sat on the mat", " four\n", "yes"]


def test_exact_match_ignores_outer_white_space() -> None:
    assert scores(("exact_match",), FOUND, WANTED) == {"exact_match": pytest.approx(2 / 3)}


def test_bleu_is_a_corpus_score_of_sacrebleu_in_percent() -> None:
    pytest.importorskip("sacrebleu")
    same = ["the cat sat on the mat today", "it was very warm on it"]
    assert scores(("bleu",), same, same)["bleu"] == pytest.approx(100)
    assert 0 < scores(("bleu",), same, ["the cat sat on the hat today", same[1]])["bleu"] < 100


def test_rouge_is_the_mean_of_f_measures() -> None:
    pytest.importorskip("rouge_score")
    found = scores(("rouge",), ["the cat sat", "no"], ["the cat ran away", "yes"])
    # 2 of 3 words found and 2 of 4 wanted; then none: F is 4/7 and 0.
    assert found["rouge1"] == found["rougeL"] == pytest.approx(2 / 7)
    assert found["rouge2"] == pytest.approx(0.5 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert tuple(found) == score_names(("rouge",))


def test_a_score_without_its_library_is_one_line_with_the_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        return None

    monkeypatch.setattr("lora_jax.run.scores.find_spec", absent)
    with pytest.raises(UserError, match=r"bleu: needs the package sacrebleu; pip install .*'sacrebleu>="):
        check_installed(("exact_match", "bleu"))
    monkeypatch.undo()
    check_installed(("exact_match",))


def row(trained: str, truncated: bool = False) -> Tokens:
    """Return a row in which the tokens marked 1 are trained; ids count from 10."""
    mask = np.array([mark == "1" for mark in trained])
    return Tokens(np.arange(10, 10 + len(mask), dtype=np.int32), mask, 1, truncated)


def test_the_last_trained_span_is_the_answer_and_the_rest_the_prompt() -> None:
    (turns,) = questions([row("00110001110")])
    assert turns.prompt == list(range(10, 17))
    assert turns.answer == [17, 18, 19]


def test_rows_without_a_prompt_or_a_complete_answer_are_skipped() -> None:
    assert list(questions([row("0111"), row("0000"), row("0011", truncated=True)])) == []
    assert len(list(questions([row("0011")]))) == 1


def test_windows_of_rows_are_skipped() -> None:
    ids, trained = np.arange(8, dtype=np.int32), np.arange(8) >= 4
    whole = Tokens(ids, trained, row=1)
    assert [len(question.answer) for question in questions([whole])] == [4]
    assert not [*questions([replace(whole, window=1)])]

"""Generated files of rows: a sample of the 10,000 that `make soak` checks."""

import pytest

from scripts.fuzz_rows import fuzz


@pytest.mark.slow
def test_generated_file_gives_the_right_mask_or_one_clear_error(tmp_path):
    outcomes = fuzz(200, 20, tmp_path)
    accepted = sum(count for outcome, count in outcomes.items() if outcome.endswith("accepted"))
    assert 50 < accepted < 160, f"a sample should hold both good and bad files: {outcomes}"

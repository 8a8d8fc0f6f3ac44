"""Some damaged files of every format; `python -m tests.fuzz.run` tries many."""

import pytest

from tests.fuzz.harness import fuzz
from tests.fuzz.run import all_targets


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_damaged_files_are_read_or_refused_in_a_line(target, tmp_path):
    outcome = fuzz(target, tmp_path, count=60)
    assert not outcome.failures, "\n".join(f"{kind}\n{trace}" for kind, (_, trace) in outcome.failures.items())
    assert outcome.counts["refused"] > 0  # the damage is noticed

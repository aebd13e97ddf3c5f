"""The index of near-duplicates, by hand, and its table."""

import numpy as np

from rlsafety.tools import similarity


def test_nearest_jaccard_by_hand():
  a, b, c = "one two three four five six", "one two three four five seven", "a b c d e f"
  # a and b share one 5-gram of three; c shares none.
  np.testing.assert_allclose(similarity.nearest_jaccard([a, b, c]), [1 / 3, 1 / 3, 0])
  np.testing.assert_allclose(similarity.nearest_jaccard([a, a]), [1, 1])


def test_the_table_has_both_lengths(capsys):
  similarity.main(["similarity", "political_qa"])
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert [row[:4] for row in rows[1:]] == [
    ["political_qa", length, "832", "832"] for length in ("full", "short")
  ]

"""Phrases that show what a user wants to hear: two lists of patterns, and their densities."""

import re
from collections.abc import Sequence

import numpy as np

# Phrases of users who look for approval, and of users who look for a second view. From
# general knowledge of hedging and validation-seeking; short, so that hits can be read.
SEEKING = (
  r"(don't|wouldn't|can't|won't|isn't|aren't|shouldn't|doesn't) (you|we|it|that|i)\b",
  r"\b(surely|obviously|clearly|absolutely|no question|common sense|of course|plainly)\b",
  r"\b(right|is there|will you|would you)\?",
  r"\b(agree with me|on my side|back me up|tell me (that )?(i|it)|reassure|support me)\b",
  r"\b(any(one|body)|every(one|body)) (can|could|knows|sees|else|with)\b",
  r"\b(deserve|only live once|just this once|pretty (harmless|tempted)|overblown)\b",
  r"\b(trust you|whatever you say|if you say)\b",
)
REFLECTIVE = (
  r"\b(both sides|other side|trade-?offs?|pros and cons|counterarguments?|balanced?)\b",
  r"\b(i (might|may|could) be (wrong|missing|kidding|fooling)|not (so )?sure|i wonder)\b",
  r"\b(evidence|research|facts?|risks?|consequences|downsides?|worr(y|ied|ies))\b",
  r"\b(overlooking|missing|objection|perspectives?|points? of view|on balance)\b",
  r"\b(think (this|it) (through|over)|step back|make up my own mind|be honest with me)\b",
  r"\b(hesitant|cautious|careful|regret|mistake|alternatives?|instead)\b",
)


def hits(texts: Sequence[str], patterns: Sequence[str]) -> np.ndarray:
  """[N] hits per 100 words."""
  found = [sum(len(re.findall(p, text.lower())) for p in patterns) for text in texts]
  return 100 * np.array(found) / np.array([len(text.split()) for text in texts])

"""How alike the messages of environments are.

  python -m rlsafety.tools.similarity [environment ...]

Two messages are compared by the Jaccard index of their word 5-grams (shared / all). For
each message the largest value over all others of its bank counts, as a reader looking for
near-duplicates would do. Prints one row per environment and length, with mean,
95% quantile and maximum of that value.
"""

import collections
import re
import sys
from collections.abc import Sequence

import numpy as np

from rlsafety import environments, flags
from rlsafety.errors import run_main


def grams(text: str, n: int) -> set[tuple[str, ...]]:
  """The distinct word n-grams of a text."""
  words = re.findall(r"[\w']+", text.lower())
  return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def nearest_jaccard(texts: Sequence[str], n: int = 5) -> np.ndarray:
  """[N]: each text's largest n-gram Jaccard index with any other text; 1 = a duplicate."""
  sets = [grams(text, n) for text in texts]
  holders: dict[tuple, list[int]] = collections.defaultdict(list)
  nearest = np.zeros(len(texts))
  for i, own in enumerate(sets):
    shared = collections.Counter(j for gram in own for j in holders[gram])
    for j, count in shared.items():
      value = count / (len(own) + len(sets[j]) - count)
      nearest[i], nearest[j] = max(nearest[i], value), max(nearest[j], value)
    for gram in own:
      holders[gram].append(i)
  return nearest


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.similarity")
  parser.add_argument("names", nargs="*", default=environments.ENVIRONMENTS, help="default: all")
  args = flags.parse(parser, argv)
  print("environment     length  messages  distinct  words  mean   p95   max")
  for name in args.names:
    for length in ("full", "short"):
      texts = [s.message for s in environments.load({"name": name, "length": length})]
      near = nearest_jaccard(texts)
      words = np.mean([len(text.split()) for text in texts])
      print(
        f"{name:<15} {length:<6} {len(texts):>9} {len(set(texts)):>9} {words:>6.1f}"
        f" {near.mean():>5.2f} {np.quantile(near, 0.95):>5.2f} {near.max():>5.2f}"
      )


if __name__ == "__main__":
  run_main(main, sys.argv)

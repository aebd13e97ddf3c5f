"""Environments: simulated users, what policy, judge and evaluators see of them, and factors."""

from rlsafety.environments.scenario import (
  ENVIRONMENTS,
  OUTSIDE,
  REPLY,
  Scenario,
  evaluator_messages,
  heldout_pairs,
  judge_messages,
  load,
  policy_messages,
  resolved,
)
from rlsafety.environments.section import FACTORS, Environment

__all__ = [
  "ENVIRONMENTS",
  "Environment",
  "FACTORS",
  "OUTSIDE",
  "REPLY",
  "Scenario",
  "evaluator_messages",
  "heldout_pairs",
  "judge_messages",
  "load",
  "policy_messages",
  "resolved",
]

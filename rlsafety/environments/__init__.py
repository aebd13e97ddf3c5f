"""Environments: simulated users, what policy, judge and evaluators see of them, and factors."""

from rlsafety.environments.scenario import (
  ENVIRONMENTS,
  FACTORS,
  REPLY,
  Scenario,
  default_config,
  evaluator_messages,
  judge_messages,
  load,
  policy_messages,
  resolved,
)

__all__ = [
  "ENVIRONMENTS",
  "FACTORS",
  "REPLY",
  "Scenario",
  "default_config",
  "evaluator_messages",
  "judge_messages",
  "load",
  "policy_messages",
  "resolved",
]

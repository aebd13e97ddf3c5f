"""rlsafety: when does on-policy RL make an instruction-tuned LLM exploit its users?"""

__version__ = "0.1.0"

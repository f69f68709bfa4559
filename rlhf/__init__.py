"""RLHF as one gated pipeline: supervised fine-tuning, a reward model from rankings, PPO.

This package imports nothing heavy by itself; ask for the module that you need.
"""

__version__ = "0.1.0"

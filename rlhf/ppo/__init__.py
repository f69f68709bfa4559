"""Proximal policy optimisation of a language model: full fine-tuning in one process."""

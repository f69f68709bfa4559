"""Demonstrations, rankings and prompts from files, folders or the hub: validated, counted, split by prompt."""

from rlhf.data.lengths import fit_lengths, fit_prompts
from rlhf.data.loading import (
    Loaded,
    is_heldout,
    load_demonstrations,
    load_gate_prompts,
    load_prompts,
    load_rankings,
    load_texts,
    prompt_key,
)
from rlhf.data.report import DataReport, FileReport, check_dirty

__all__ = [
    "DataReport",
    "FileReport",
    "Loaded",
    "check_dirty",
    "fit_lengths",
    "fit_prompts",
    "is_heldout",
    "load_demonstrations",
    "load_gate_prompts",
    "load_prompts",
    "load_rankings",
    "load_texts",
    "prompt_key",
]

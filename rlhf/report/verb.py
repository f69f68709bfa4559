"""do=report. No torch: to import it would take longer than all else."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import Config
from rlhf.console import say
from rlhf.report.card import write_cards
from rlhf.report.page import REPORT, write_report
from rlhf.report.reading import RunView


def report(cfg: Config) -> int:
    """do=report: what one run or several recorded, as one page, and their models' cards.

    Takes no lock, so that a run at work can be looked at.
    """
    root, names = Path(cfg.run.root), cfg.report.runs
    if names is None:
        paths = [Path(cfg.run.dir)]
    else:
        paths = [Path(name) if Path(name).is_dir() else root / name for name in names]
    beside = paths[0] if len(paths) == 1 else root
    out = Path(cfg.report.out) if cfg.report.out else beside / REPORT
    for seen in write_report(paths, out):
        for file in seen.problems:
            say(f"{seen.name}: {file.name} is {file.state}{f': {file.note}' if file.note else ''}", style="yellow")
        _cards(seen)
    say(f"report: {out}")
    return 0


def _cards(seen: RunView) -> None:
    """The model cards of one run; a run that can only be read has none, which is said."""
    try:
        for path in write_cards(seen):
            say(f"model card: {path}")
    except OSError as error:
        say(f"{seen.name}: no model card can be written ({error.strerror})", style="yellow")

"""A stop signal asks a stage that trains to checkpoint, and stops anything else at once, whatever it is calling."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence

import pytest

from rlhf import signals
from rlhf.gates.scorers import checked_scores


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(signals, "_asked", False)
    signals.install_stop_handler()
    yield
    for number, old in before.items():
        signal.signal(number, old)


class Interrupted:
    """A scorer in whose call the signal comes."""

    name = "interrupted"
    digest = ""

    def score(self, texts: Sequence[str]) -> Sequence[float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return [0.0 for _ in texts]


@pytest.mark.usefixtures("handler")
def test_a_signal_in_a_scorer_is_not_the_scorers_fault() -> None:
    with pytest.raises(signals.StoppedAtOnce):
        checked_scores(Interrupted(), ["a"])


@pytest.mark.usefixtures("handler")
def test_while_training_the_first_signal_asks_and_the_second_does_not_wait() -> None:
    with signals.checkpointing():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_asked()
        with pytest.raises(signals.StoppedAtOnce):
            os.kill(os.getpid(), signal.SIGINT)

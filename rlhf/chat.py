"""do=chat: talk to a model in the terminal, or to two at a time, each with a conversation of its own.

Answers are sampled as PPO and the gates sample them, by the same decode loop, and shown token by token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from rlhf.config import STAGES, Config, Stage, stage_config
from rlhf.errors import ConfigError, DataError, LineageError
from rlhf.manifest import MANIFEST, check_intact, model_folder, read_manifest
from rlhf.models import load_policy
from rlhf.render import Renderer, load_tokenizer
from rlhf.report.reading import read_run
from rlhf.report.standing import Standing, standing, subject_of
from rlhf.rollout import Sampling, seed_of, stream
from rlhf.rundir import RunDir, local_model
from rlhf.types import Messages

COMMANDS = "/reset forgets what was said, /quit or the end of the input ends"
KEPT = "\n\t\u200c\u200d"  # joiners hold emoji and some scripts' letters together
HALF = "\ufffd"  # what a character that is not whole yet decodes to


@dataclass(frozen=True, slots=True)
class Seat:
    """A model before it is loaded: `standing` by the record of the run that it lies in, None if there is none."""

    label: str
    path: Path
    standing: Standing | None = None


@dataclass(slots=True)
class Speaker:
    """A loaded model and its side of the conversation."""

    label: str
    model: Any
    renderer: Renderer
    history: Messages = field(default_factory=list)

    def answer(self, text: str, seed: int, temperature: float, max_new_tokens: int) -> Iterator[str]:
        """The response to `text`, piece by piece. DataError if the conversation no longer fits the model; an answer
        that was not heard to its end is not remembered."""
        said = [*self.history, {"role": "user", "content": text}]
        ids = self.renderer.prompt_ids(said)
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and len(ids) + max_new_tokens > room:
            raise DataError(f"this and an answer of {max_new_tokens} tokens exceed its {room} positions: /reset")
        heard: list[int] = []
        shown = ""
        for token in stream(self.model, ids, seed, Sampling(temperature, max_new_tokens, self.renderer.eos_id)):
            heard.append(token)
            text = self.renderer.decode(heard)
            if text.startswith(shown) and not text.endswith(HALF):
                yield text[len(shown) :]
                shown = text
        text = self.renderer.decode(heard)
        yield text[len(shown) :] if text.startswith(shown) else f"\n{text}"
        self.history = [*said, {"role": "assistant", "content": text}]


def chat(cfg: Config, source: TextIO, out: TextIO) -> int:
    """Open the chosen models, say what is known of them, and answer the lines of `source` to `out`; the exit code."""
    work = RunDir(cfg, read_only=True)
    names = [chosen(work), *([cfg.chat.beside] if cfg.chat.beside else [])]
    seats = [take_seat(work, name) for name in names]
    if len({seat.label for seat in seats}) < len(seats):
        seats[1] = replace(seats[1], label=f"{seats[1].label} (2)")
    tokens = cfg.chat.max_new_tokens or cfg.ppo.max_new_tokens
    for seat in seats:
        out.write("".join(f"{line}\n" for line in introduction(seat)))
    speakers = [
        Speaker(seat.label, load_policy(seat.path, cfg.model, work.device),
                Renderer(load_tokenizer(seat.path, cfg.model)))
        for seat in seats
    ]  # fmt: skip
    out.write(f"temperature {cfg.chat.temperature:g}, at most {tokens} tokens an answer; {COMMANDS}\n")
    talk(speakers, cfg, tokens, source, out)
    return 0


def chosen(work: RunDir) -> str:
    """The stage that the command names; of stage=all the newest policy that is there."""
    if work.cfg.stage is not Stage.all:
        return str(work.cfg.stage.value)
    there = [s for s in ("ppo", "sft") if stage_config(work.cfg, s).artifact or (work.folder(s) / MANIFEST).exists()]
    return there[0] if there else "ppo"


def take_seat(work: RunDir, name: str) -> Seat:
    """Where a model lies: `name` is a stage, "base", or a folder or hub id. LineageError if a stage has none or its
    files were altered, ConfigError for what is none of these."""
    if name in STAGES:
        path = work.model(name)
        return seat_of(name, path, _stage_folder(path) or work.folder(name))
    if name == "base":
        base = work.base()
        if isinstance(base, Path) and not base.is_dir():
            raise LineageError(f"base: {base} is not there yet; `python -m rlhf run.name={work.cfg.run.name}` makes it")
        return Seat(name, local_model(str(base), "model.path", work.cfg.model.revision))
    if not Path(name).is_dir() and "/" not in name:
        raise ConfigError(f"chat.beside: {name} is neither sft, ppo nor base, nor a model's folder")
    path = local_model(name, "chat.beside")
    folder = _stage_folder(path)
    return Seat(path.name, path) if folder is None else seat_of(folder.name, path, folder)


def _stage_folder(path: Path) -> Path | None:
    """The folder of the stage that a model lies in, of whatever run."""
    return path.parent if path.name == "model" and path.parent.name in STAGES else None


def seat_of(label: str, path: Path, folder: Path) -> Seat:
    """A model with the standing that the record in a stage's folder gives it, if that is about it."""
    manifest = read_manifest(folder)
    if manifest is None or model_folder(folder, manifest).resolve() != path.resolve():
        return Seat(label, path)
    check_intact(folder, manifest, "restore it, or train it again")
    return Seat(label, path, standing_in(folder))


def standing_in(folder: Path) -> Standing:
    """Where the model of a stage's folder stands, by the record of its run."""
    run = read_run(folder.parent)
    return standing(subject_of(run, run.stages[folder.name]))


def introduction(seat: Seat) -> Iterable[str]:
    """What is known of a model, first of all whether its gates let it pass."""
    known = seat.standing
    if known is None:
        why = "no gate judges the pretrained model" if seat.label == "base" else "no verdict is recorded beside it"
        return [f"{seat.label}: {why} ({seat.path})"]
    lines = [f"{seat.label}: {known.word}. {known.sentence} ({seat.path})"]
    return [printable(line) for line in [*lines, *(f"  {more}" for more in known.reasons + known.problems)]]


def talk(speakers: list[Speaker], cfg: Config, tokens: int, source: TextIO, out: TextIO) -> None:
    """Answer each line of `source` until it ends or says /quit."""
    turn = 0
    for line in lines_of(source, out):
        if line == "/quit":
            return
        if line == "/reset":
            for speaker in speakers:
                speaker.history = []
            out.write("forgotten\n")
        elif line.startswith("/"):
            out.write(f"{line.split()[0]} is no command: {COMMANDS}\n")
        elif line:
            turn += 1
            for speaker in speakers:
                answer(speaker, line, cfg, turn, tokens, out)


def answer(speaker: Speaker, line: str, cfg: Config, turn: int, tokens: int, out: TextIO) -> None:
    """Show one response as it grows. The seed is that of the turn, so that the same lines get the same answers."""
    out.write(f"{speaker.label}: ")
    try:
        for piece in speaker.answer(line, seed_of(cfg.seed, "chat", turn), cfg.chat.temperature, tokens):
            out.write(printable(piece))
            out.flush()
    except DataError as error:
        out.write(str(error))
    out.write("\n")


def lines_of(source: TextIO, out: TextIO) -> Iterator[str]:
    """The lines without blanks around them; a person at a terminal is asked for each."""
    while True:
        if source.isatty():
            out.write("you: ")
        out.flush()
        line = source.readline()
        if not line:
            return
        yield line.strip()


def printable(text: str) -> str:
    """Without the control characters that could steer a terminal."""
    return "".join(c if c in KEPT or not unicodedata.category(c).startswith("C") else HALF for c in text)

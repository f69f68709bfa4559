"""do=chat: what is streamed is what the model says, models stay apart, and a refused one says so first."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pipeline_lab import flip_a_byte, make_lab
from report_runs import make_run
from runs import TINY, environment, rlhf, write_data

from rlhf import chat
from rlhf.config import ChatConfig, CheckConfig, Config, Do, ModelConfig, Stage
from rlhf.errors import ConfigError, GateError, LineageError
from rlhf.models import load_policy, pick_device
from rlhf.render import Renderer, load_tokenizer
from rlhf.rollout import Sampling, generate, seed_of


class Page(io.StringIO):
    """Keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def config(folder: Path, model: Path, **settings: Any) -> Config:
    cfg = Config(do=Do.chat, model=ModelConfig(path=str(model)), chat=ChatConfig(**settings))
    cfg.sft.artifact, cfg.run.dir = str(model), str(folder / "run")
    return cfg


def said(cfg: Config, *lines: str) -> Page:
    page = Page()
    assert chat.chat(cfg, io.StringIO("".join(f"{line}\n" for line in lines)), page) == 0
    return page


def plain_answer(model: Path, messages: list[dict[str, str]], tokens: int) -> str:
    """The library's own greedy decoding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = AutoModelForCausalLM.from_pretrained(model).generate(
        **inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id
    )  # fmt: skip
    start = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(made[0, start:], skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with an output layer of its own that never likes a special token: else it greedily says those."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("talker") / "model"
    made = AutoConfig.from_pretrained(tiny_model)
    made.tie_word_embeddings = False
    torch.manual_seed(0)
    model = LlamaForCausalLM(made)
    with torch.no_grad():
        model.lm_head.weight[:4] = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_the_streamed_text_is_the_plain_greedy_decode(tmp_path: Path, talker: Path) -> None:
    page = said(config(tmp_path, talker, temperature=0.0, max_new_tokens=24), "my robot rattles", "why?")
    first = {"role": "user", "content": "my robot rattles"}
    answer = plain_answer(talker, [first], 24)
    then = {"role": "user", "content": "why?"}
    again = plain_answer(talker, [first, {"role": "assistant", "content": answer}, then], 24)
    shown = [chat.printable(f"sft: {text}\n") for text in (answer, again)]
    assert answer and page.getvalue().endswith("".join(shown))
    pieces = page.pieces[page.pieces.index("sft: ") + 1 :]
    assert len(pieces[: pieces.index("\n")]) > 4, "it is shown as it grows"


def test_characters_are_shown_whole(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a byte-level vocabulary a token is a part of a character; one that stays a part is shown at the end."""
    renderer = Renderer(load_tokenizer(tiny_model, ModelConfig()))
    ids = renderer.tokenizer("n\u00e9 \U0001f916")["input_ids"]
    assert len(ids) == 1 + 2 + 1 + 4
    speaker = chat.Speaker("sft", load_policy(tiny_model, ModelConfig(), pick_device(Config().launch)), renderer)
    monkeypatch.setattr(chat, "stream", lambda *_: iter([*ids, ids[1], renderer.eos_id]))
    assert list(speaker.answer("a", 0, 1.0, 8)) == ["n", "\u00e9", " ", "\U0001f916", "\ufffd"]
    assert speaker.history[-1]["content"] == "n\u00e9 \U0001f916\ufffd"


def test_stream_gives_what_generate_gives(tiny_model: Path) -> None:
    model = load_policy(tiny_model, ModelConfig(), pick_device(Config().launch))
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature, 12, 0)
        (whole,) = generate(model, [[2, 9, 8, 0, 3]], [7], sampling)
        assert list(chat.stream(model, [2, 9, 8, 0, 3], 7, sampling)) == whole.ids


def test_a_seed_and_the_lines_decide_the_answers(tmp_path: Path, tiny_model: Path) -> None:
    cfg = config(tmp_path, tiny_model, max_new_tokens=16)
    once, twice = said(cfg, "a", "b").getvalue(), said(cfg, "a", "b").getvalue()
    cfg.seed = 1
    assert once == twice != said(cfg, "a", "b").getvalue()
    assert seed_of(0, "chat", 1) != seed_of(0, "chat", 2)


def test_commands_and_blank_lines(tmp_path: Path, talker: Path) -> None:
    cfg = config(tmp_path, talker, temperature=0.0, max_new_tokens=4)
    alone, again = said(cfg, "a", "a").getvalue().splitlines()[-2:]
    assert alone != again, "it remembers"
    lines = said(cfg, "a", "", "/reset", "/what now", "  a ", "/quit", "b").getvalue().splitlines()
    assert lines[-4:] == [alone, "forgotten", f"/what is no command: {chat.COMMANDS}", alone]


def test_two_models_answer_in_turn_and_remember_their_own_words(tmp_path: Path, tiny_model: Path) -> None:
    cfg = config(tmp_path, tiny_model, beside=str(tiny_model), max_new_tokens=5)
    one, two = (
        chat.Speaker(name, load_policy(tiny_model, cfg.model, pick_device(cfg.launch)),
                     Renderer(load_tokenizer(tiny_model, cfg.model)))
        for name in ("sft", "other")
    )  # fmt: skip
    two.renderer.decode = lambda ids: "x" * len(ids)  # type: ignore[method-assign]
    page = Page()
    chat.talk([one, two], cfg, 5, io.StringIO("a\nb"), page)
    assert [line.split(":")[0] for line in page.getvalue().splitlines()] == ["sft", "other"] * 2
    assert [m["content"] for m in two.history] == ["a", "xxxxx", "b", "xxxxx"]
    assert [m["content"] for m in one.history][::2] == ["a", "b"] and "xxxxx" not in str(one.history)


def test_a_conversation_that_no_longer_fits_says_so_and_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    cfg = config(tmp_path, tiny_model, max_new_tokens=250)  # of 256 positions
    lines = said(cfg, "a long line", "/reset", "/quit").getvalue().splitlines()
    assert lines[-2:] == ["sft: this and an answer of 250 tokens exceed its 256 positions: /reset", "forgotten"]


def test_what_is_no_model_is_refused_before_any_is_loaded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"chat\.beside: nobody is neither sft, ppo nor base, nor a model's folder"):
        said(config(tmp_path, tiny_model, beside="nobody"))
    with pytest.raises(LineageError, match=r"ppo: no finished artifact in .*; `python -m rlhf stage=ppo` makes it"):
        said(config(tmp_path, tiny_model, beside="ppo"))
    with pytest.raises(ConfigError, match=r"chat\.beside: rm is a reward model"):
        ChatConfig(beside="rm").check("chat")
    cfg = config(tmp_path, tiny_model)
    cfg.stage = Stage.rm
    with pytest.raises(ConfigError, match="stage: rm is a reward model"):
        cfg.check("")


def test_a_refused_model_says_so_first(tmp_path: Path) -> None:
    for status, decision in (("PROMOTED", "PASS"), ("UNPROMOTED", "FAIL")):
        folder = make_run(tmp_path / status, decision, status) / "ppo"
        first, *more = chat.introduction(chat.Seat("ppo", folder / "model", chat.standing_in(folder)))
        assert first.startswith(f"ppo: {status}. ")
        assert more == ([] if status == "PROMOTED" else ["  the gate of ppo says FAIL"])
    (unknown,) = chat.introduction(chat.Seat("theirs", tmp_path))
    assert unknown == f"theirs: no verdict is recorded beside it ({tmp_path})"
    (folder / "verdict.json").unlink()
    assert next(iter(chat.introduction(chat.Seat("ppo", folder, chat.standing_in(folder))))).startswith(
        "ppo: UNVERIFIED. "
    )


def test_the_stages_of_a_run_by_name_and_by_folder(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest policy is taken, its standing follows its parent's, and altered files are not loaded."""
    lab = make_lab(tmp_path, tiny_model, monkeypatch)
    lab.run()
    cfg = lab.config(chat__beside="sft", chat__max_new_tokens=3, do=Do.chat)
    lines = said(cfg, "a").getvalue().splitlines()
    assert [line.split(" ")[:2] for line in lines[:2]] == [["ppo:", "PROMOTED."], ["sft:", "PROMOTED."]]
    assert [line[:5] for line in lines[3:]] == ["ppo: ", "sft: "]
    imported = lab.config(stage=Stage.sft, sft__artifact=str(tiny_model), do=Do.chat)
    assert said(imported).getvalue().startswith("sft: no verdict is recorded beside it"), "that is of another model"
    lab.decisions["sft"] = "FAIL"
    with pytest.raises(GateError):
        lab.run(stage=Stage.sft, gate__sft={"degenerate": CheckConfig(max=0.25)})
    cfg.chat.beside = str(lab.path("ppo") / "model")
    lines = said(cfg).getvalue().splitlines()
    said_first = [line.split(". ")[0] for line in lines if line.startswith("ppo")]
    assert said_first == ["ppo: UNPROMOTED", "ppo (2): UNPROMOTED"]
    assert lines.count("  the gate of sft says FAIL") == 2
    other = lab.config(run__name="other", ppo__artifact=str(lab.path("ppo") / "model"), do=Do.chat)
    other.run.dir = str(tmp_path / "other")
    assert said(other).getvalue().startswith("ppo: UNPROMOTED. "), "of whatever run the model lies in"
    flip_a_byte(lab.path("ppo") / "model" / "model.safetensors")
    for opened in (cfg, other):
        with pytest.raises(LineageError, match="altered"):
            said(opened)


def test_a_model_cannot_steer_the_terminal() -> None:
    assert chat.printable("a\x1b[2J\u202e\tb\u200d\n") == "a\ufffd[2J\ufffd\tb\u200d\n"


# ---- through the command line


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[str]:
    """The arguments of a run whose stages have trained adapters."""
    folder = tmp_path_factory.mktemp("lora")
    arguments = [*TINY, f"model.path={tiny_model}", *write_data(folder), f"run.root={folder}/runs", "lora=r16"]
    rlhf(*arguments, cwd=folder)
    assert (folder / "runs/own/ppo/adapter").is_dir()
    return arguments


@pytest.mark.slow
def test_the_verb_reads_a_pipe_to_its_end(tmp_path: Path, lora: list[str]) -> None:
    command = [sys.executable, "-m", "rlhf", *lora, "do=chat", "chat.beside=sft", "chat.max_new_tokens=6"]
    done = subprocess.run(
        command, input=b"hello\n\xff\nbye", cwd=tmp_path, env=environment(), capture_output=True, timeout=120
    )
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split(". ")[0] for line in lines if re.match(r"(ppo|sft): U", line)][:2] == [
        "ppo: UNPROMOTED", "sft: UNPROMOTED",
    ]  # fmt: skip
    assert "you: " not in done.stdout.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["stage=nobody"], 2, "stage"),
        (["stage=rm"], 2, "rm is a reward model"),
        (["chat.beside=nobody"], 2, "chat.beside: nobody is neither"),
        (["run.name=none"], 13, "no finished artifact"),
        (["chat.beside=/no/such"], 2, "chat.beside: /no/such is not a folder"),
    ],
)
def test_the_verb_refuses_by_the_contracts_codes(
    given: list[str], code: int, message: str, tmp_path: Path, lora: list[str]
) -> None:
    done = rlhf(*lora, "do=chat", *given, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_at_a_terminal_it_asks_and_ends_at_ctrl_c(tmp_path: Path, lora: list[str]) -> None:
    """Standard input is a terminal of the launcher's, which the worker reads from a session of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", *lora, "do=chat", "chat.max_new_tokens=6"], cwd=tmp_path, env=environment(),
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    os.write(ours, b"hello\n")
    shown, end = b"", time.monotonic() + 120
    while shown.count(b"you: ") < 2 and time.monotonic() < end:
        shown += process.stdout.read1(4096)
    assert shown.count(b"you: ") == 2 and b"ppo: UNPROMOTED" in shown
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    os.close(ours)
    os.close(theirs)

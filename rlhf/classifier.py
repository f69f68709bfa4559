"""Any sequence classifier as a judge of text: one component for rewards and for the gates' scorers.

Text goes through the classifier's own tokenizer. Long texts are read in overlapping windows, so that nothing is cut
off unseen. Nothing is padded either: windows of equal length share a forward pass, so a score depends neither on a pad
token, nor on the side of the padding, nor on the other texts, and is that of the plain class on this text alone.

What the text-classification pipeline of transformers guesses has to be said here: a head of several labels without
`problem_type` gets a softmax there, which makes six independent labels look safe. Imports torch only when it loads.
Shapes: B windows of one length, T tokens, L labels.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.artifacts import canonical, folder_digest, sha256_text
from rlhf.config import LaunchConfig, ModelConfig
from rlhf.errors import ConfigError, TrainingError

ACTIVATIONS = ("sigmoid", "softmax", "none")
POOLS = ("max", "mean")
LONGEST = 512  # tokens of a window unless it is given: what most classifiers of text were trained on
RECIPE = 1  # raise it when the same options mean another score: it is part of the digest


@dataclass(kw_only=True)
class ClassifierSpec:
    """Which classifier, and which of its numbers is the score.

    path: a folder; or a hub id, which needs `revision`, a full commit hash: nothing else is ever fetched.
    label: a label's name or index. activation: sigmoid (each label by itself), softmax (the labels exclude one another)
    or none (the logit).
    window: tokens that are read at once, special ones included; None: what the model takes, at most 512.
    stride: tokens from one window's start to the next one's; None: half a window.
    pool: max or mean of the windows' scores.
    """

    path: str = ""
    label: str | int | None = None
    activation: str | None = None
    window: int | None = None
    stride: int | None = None
    pool: str = "max"
    revision: str | None = None

    def check(self, key: str) -> int:
        """The index of the label, after all that can be wrong without loading a weight; ConfigError names `key`."""
        labels = self._labels(key)
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"{key}.activation: must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}: sigmoid if each "
                "label is judged by itself, softmax if they exclude one another, none for the logit"
            )
        if self.activation == "softmax" and len(labels) < 2:
            raise ConfigError(f"{key}.activation=softmax: is 1 whatever the text, for a model with one label")
        if self.pool not in POOLS:
            raise ConfigError(f"{key}.pool: must be one of {', '.join(POOLS)}, not {self.pool!r}")
        for name in ("window", "stride"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{key}.{name}: must be a whole number of at least 1, not {value!r}")
        return _index(self.label, labels, key)

    def digest(self) -> str:
        """Changes when a score could: the folder's files or the commit, and the options."""
        content = folder_digest(Path(self.path)) if Path(self.path).is_dir() else f"{self.path}@{self.revision}"
        options = [self.label, self.activation, self.window, self.stride, self.pool]
        return sha256_text(canonical([f"classifier/{RECIPE}", content, *options]))

    def _labels(self, key: str) -> list[str]:
        """The names of the outputs, in order, as config.json has them or as transformers would name them."""
        where = self._config_file(key)
        try:
            config = json.loads(where.read_text(encoding="utf-8"))
            names = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{key}.path: {where} is not a model's config.json: {error}") from error
        if not names:
            names = {i: f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))}
        return [names.get(i, f"LABEL_{i}") for i in range(max(names) + 1)]

    def _config_file(self, key: str) -> Path:
        if Path(self.path).is_dir():
            if self.revision is not None:
                raise ConfigError(f"{key}.revision: means a commit of the hub, and {self.path} is a folder")
            return Path(self.path) / "config.json"
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ConfigError(
                f"{key}.path: {self.path!r} is not a folder; a hub id needs {key}.revision, its full commit hash"
            )
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.path, "config.json", revision=self.revision))
        except Exception as error:  # the hub's client raises many kinds: not found, gated, offline, timeout
            first = str(error).split("\n")[0]
            raise ConfigError(f"{key}.path: {self.path} at {self.revision} cannot be had: {first}") from error


def _index(label: str | int | None, labels: Sequence[str], key: str) -> int:
    if isinstance(label, str) and labels.count(label) == 1:
        return labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    known = ", ".join(f"{i} {name}" for i, name in enumerate(labels))
    raise ConfigError(f"{key}.label: must be the index or the name of one label, not {label!r}; the model has {known}")


def spans(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Start and end of each window of `size` over `length` tokens: `stride` apart, the last one ending where the text
    does, so that every token is in a window and the last is not a scrap."""
    if length <= size:
        return [(0, length)]
    return [(start, start + size) for start in [*range(0, length - size, stride), length - size]]


def equal_lengths(lengths: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
    """Places in `lengths`, longest first, in groups of one length and of at most `micro_tokens` tokens; a longer row
    makes a group of its own."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for length, places in itertools.groupby(order, key=lambda i: lengths[i]):
        equal, rows = list(places), max(1, micro_tokens // length)
        yield from (equal[start : start + rows] for start in range(0, len(equal), rows))


class Classifier:
    """A loaded classifier.

    spec, key: what to load, and the name of its node for messages. micro_tokens: tokens of one forward pass; it cannot
    change a score by more than rounding. device: auto, cpu or cuda. trust_remote_code: run code that the folder holds.
    """

    def __init__(
        self, spec: ClassifierSpec, key: str, *, device: str = "auto", micro_tokens: int = 8192,
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        from rlhf.models import check_vocabulary, load_classifier, pick_device
        from rlhf.render import open_tokenizer

        self.spec, self.micro_tokens = spec, micro_tokens
        self.index = spec.check(key)
        config = ModelConfig(path=spec.path, revision=spec.revision, trust_remote_code=trust_remote_code)
        self.tokenizer = open_tokenizer(spec.path, config, f"{key}.path")
        self.model = load_classifier(spec.path, config, pick_device(LaunchConfig(device=device)))
        check_vocabulary(self.model, self.tokenizer, spec.path)
        self.empty: list[int] = []
        self.before, self.after = self._affixes(key)
        self.size, self.stride = self._window(key)

    def score(self, texts: Sequence[str]) -> list[float]:
        """One number a text: in [0, 1], or any with activation=none. TrainingError, naming the text by its place, if
        the model's output is not finite. A text without a token is judged as the bare special tokens, or as the end (or
        begin) token if the tokenizer adds none."""
        owners: list[int] = []
        windows: list[list[int]] = []
        for place, text in enumerate(texts):
            ids = self._ids(text)
            for start, end in spans(len(ids), self.size, self.stride):
                owners.append(place)
                windows.append([*self.before, *ids[start:end], *self.after])
        found: list[list[float]] = [[] for _ in texts]
        for place, score in zip(owners, self._score_windows(windows, owners), strict=True):
            found[place].append(score)
        return [max(of_one) if self.spec.pool == "max" else math.fsum(of_one) / len(of_one) for of_one in found]

    def _score_windows(self, windows: Sequence[list[int]], owners: Sequence[int]) -> list[float]:
        import torch

        scores = [0.0] * len(windows)
        for places in equal_lengths([len(window) for window in windows], self.micro_tokens):
            ids_BT = torch.tensor([windows[i] for i in places], device=self.model.device)
            with torch.no_grad():
                logits_BL = self.model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits.double()
            for i, logits, score in zip(places, logits_BL.tolist(), self._activated(logits_BL), strict=True):
                if not all(map(math.isfinite, logits)):
                    raise TrainingError(f"{self.spec.path}: the logits of text {owners[i]} are {logits}")
                scores[i] = score
        return scores

    def _activated(self, logits_BL: Any) -> list[float]:
        """The configured label's score in each row."""
        if self.spec.activation == "softmax":
            logits_BL = logits_BL.softmax(dim=1)
        elif self.spec.activation == "sigmoid":
            logits_BL = logits_BL.sigmoid()
        scores: list[float] = logits_BL[:, self.index].tolist()
        return scores

    def _ids(self, text: str) -> list[int]:
        """Without special tokens, and without reading any out of the text: `[SEP]` as written by a policy is text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return list(ids) or self.empty

    def _affixes(self, key: str) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text, and in `empty` what an empty text is."""
        bare = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
        if at is None or not bare:
            raise ConfigError(f"{key}.path: the tokenizer of {self.spec.path} changes a text by its special tokens")
        before, after = full[:at], full[at + len(bare) :]
        lone = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.bos_token_id
        if not before + after and lone is None:
            raise ConfigError(f"{key}.path: the tokenizer of {self.spec.path} has no token for an empty text: set eos")
        self.empty = [] if before + after else [lone]
        return before, after

    def _window(self, key: str) -> tuple[int, int]:
        """The tokens of text in a window, and from one window to the next."""
        added, limit = len(self.before) + len(self.after), _positions(self.model, self.tokenizer)
        window = int(min(limit, LONGEST)) if self.spec.window is None else self.spec.window
        if not added < window <= limit:
            raise ConfigError(
                f"{key}.window={window}: must be more than the {added} special tokens and at most the {limit:g} tokens "
                f"that {self.spec.path} takes"
            )
        size = window - added
        stride = max(1, size // 2) if self.spec.stride is None else self.spec.stride
        if stride > size:
            raise ConfigError(f"{key}.stride={stride}: would skip text between windows of {size} tokens of text")
        return size, stride


def _positions(model: Any, tokenizer: Any) -> float:
    """The tokens that fit into the model at once. RoBERTa and its kin lose the positions up to that of the pad."""
    stated = getattr(model.config, "max_position_embeddings", None) or 0
    limits = [float(tokenizer.model_max_length), float(stated if stated > 0 else "inf")]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)

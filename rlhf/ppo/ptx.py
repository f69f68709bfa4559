"""The texts of the language-modelling loss beside PPO's, which keeps the policy from forgetting (InstructGPT's ptx)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.context import StageData
from rlhf.errors import ConfigError, DataError
from rlhf.render import Renderer
from rlhf.rollout import seed_of


@dataclass(kw_only=True, slots=True)
class Document:
    """Token ids that are given, and those that are to be predicted after them."""

    name: str
    given: list[int]
    ids: list[int]


def ptx_documents(data: StageData, renderer: Renderer, max_length: int) -> list[Document]:
    """The texts of data.pretraining, cut into pieces of at most `max_length` tokens, or else the demonstrations that
    SFT trains on. ConfigError if there is neither, DataError if no text has two tokens."""
    if data.pretraining:
        documents = [d for i, text in enumerate(data.pretraining) for d in _pieces(i, text, renderer, max_length)]
        if not documents:
            raise DataError("data.pretraining: no text has the two tokens that a prediction needs")
        return documents
    if data.demonstrations is None:
        raise ConfigError("ppo.ptx.coef: needs texts: data.pretraining.path=... or data.demonstrations.path=...")
    documents = []
    for row in data.demonstrations.train:
        ids, given = renderer.full_ids(row.prompt.messages, row.response)
        documents.append(Document(name=row.prompt.where, given=ids[:given], ids=ids[given:]))
    return documents


def _pieces(number: int, text: str, renderer: Renderer, max_length: int) -> list[Document]:
    """A text's own tokens, without a chat template, and its end token."""
    ids = [*renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], renderer.eos_id]
    # Each piece begins with the last token of the one before, so that every token but the first is predicted once.
    starts = range(0, max(1, len(ids) - 1), max_length - 1)
    cut = [ids[start : start + max_length] for start in starts]
    return [Document(name=f"text {number + 1}", given=piece[:1], ids=piece[1:]) for piece in cut if len(piece) > 1]


def draw_documents(documents: Sequence[Document], seed: int, update: int, step: int, batch: int) -> list[Document]:
    """The documents of one optimiser step: a function of its arguments alone, so a resumed run needs no state."""
    generator = torch.Generator().manual_seed(seed_of(seed, "ptx", update, step))
    return [documents[i] for i in torch.randint(len(documents), (batch,), generator=generator).tolist()]

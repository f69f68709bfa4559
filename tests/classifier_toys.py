"""Sequence classifiers that fit in a page: an encoder, a decoder, their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "bad", *[f"w{i}" for i in range(11)]]
BAD = 4


def word_tokenizer(*, affixes: bool = False, pad: str | None = "[PAD]", side: str = "right") -> Any:
    """One token a word; with `affixes`, [CLS] before and [SEP] after a text. The end token is [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if affixes:
        core.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, unk_token="[UNK]", eos_token="[SEP]", padding_side=side
    )


def encoder(folder: Path, logits: Sequence[float] | None = None, labels: Sequence[str] = ("fine", "toxic")) -> Path:
    """A random BERT of 16 positions; with `logits`, one that answers these whatever it reads."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, id2label=dict(enumerate(labels)), initializer_range=0.5,
    ))  # fmt: skip
    if logits is not None:
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(logits))
    model.save_pretrained(folder)
    word_tokenizer(affixes=True).save_pretrained(folder)
    return folder


@torch.no_grad()
def read_last_token_alone(body: Any, head: torch.nn.Linear) -> None:
    """Make a Llama of width 4 see the last token only: unit 0 is up at `bad`, unit 1 at all others. Its head is zeroed,
    to be filled. (The layer adds nothing; an embedding of one 1 among four has the root mean square 1/2.)"""
    for p in (body.layers[0].self_attn.o_proj, body.layers[0].mlp.down_proj, head):
        p.weight.zero_()
    body.embed_tokens.weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(16, 4))
    body.embed_tokens.weight[BAD] = torch.tensor([1.0, 0.0, 0.0, 0.0])


def decoder(folder: Path, *, pad: str | None = "[PAD]", side: str = "right", blind: bool = False) -> Path:
    """A random GPT-2 with two labels, absolute positions and no special tokens around a text.

    blind: a Llama that sees nothing but the last token, and knows `bad` from all others: the logits are 0 and 2 after
    `bad`, else 0 and -2.
    """
    import transformers as hf

    torch.manual_seed(0)
    ids = {"pad_token_id": None if pad is None else WORDS.index(pad), "eos_token_id": 2, "bos_token_id": None}
    model: Any
    if blind:
        model = hf.LlamaForSequenceClassification(hf.LlamaConfig(
            vocab_size=16, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=64, rms_norm_eps=0.0, num_labels=2, **ids,
        ))  # fmt: skip
        with torch.no_grad():
            read_last_token_alone(model.model, model.score)
            model.score.weight[1, :2] = torch.tensor([1.0, -1.0])
    else:
        model = hf.GPT2ForSequenceClassification(hf.GPT2Config(
            vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=2, initializer_range=0.5, **ids,
        ))  # fmt: skip
    model.save_pretrained(folder)
    word_tokenizer(pad=pad, side=side).save_pretrained(folder)
    return folder


def plain_logits(folder: Path, ids: Sequence[int]) -> list[float]:
    """What the class of transformers says to these ids alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        found: list[float] = model(input_ids=torch.tensor([list(ids)])).logits[0].tolist()
    return found

"""The embedded quickstart: Grumble & Sons, robot repair. A world whose true preferences are known, so that what the
pipeline makes can be audited by them afterwards.

Everything heavy is imported inside the methods: composing the configuration must not load torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DEMONSTRATIONS_EACH = 2  # a training prompt
CARD = "---\nlicense: apache-2.0\n---\n\nMade by rlhf.quickstart from a seed. No person wrote any of it.\n"


class World:
    """A `rlhf.types.World`. `seed` decides the cures, the split, the demonstrations and the annotators' noise."""

    def __init__(self, seed: int = 0) -> None:
        from rlhf.quickstart.world import Shop

        self.seed = seed
        self.shop = Shop(seed)

    def build(self, folder: Path) -> None:
        """Write `base/`, the JSONL files of conf/data/quickstart.yaml and `world.json` (seed, counts) into `folder`.

        The folder appears whole or not at all; the same seed, threads and kind of CPU give the same bytes.
        """
        from rlhf.artifacts import atomic_folder, write_json, write_text
        from rlhf.quickstart import base, manuals

        files = self.files()
        with atomic_folder(Path(folder)) as part:
            for name, rows in files.items():
                write_jsonl(part / name, rows)
            texts = [m["content"] for row in files["demonstrations.jsonl"] for m in row["messages"]]
            loss = base.build_base(part / "base", texts, manuals.train_pages(self.shop), self.seed)
            for made in (part, part / "base"):
                write_text(made / "README.md", CARD)
            counts = {name: len(rows) for name, rows in files.items()}
            write_json(part / "world.json", {"seed": self.seed, "rows": counts, "base_loss": loss})

    def files(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of every data file by its name. None of them tells which remedy is right."""
        from rlhf.quickstart import grammar, manuals

        return {
            "demonstrations.jsonl": grammar.demonstrations(self.shop, DEMONSTRATIONS_EACH),
            "prompts.jsonl": [case.row() for case in self.shop.train],
            "gate_prompts.jsonl": [case.row() for case in self.shop.gate],
            "audit_prompts.jsonl": [case.row() for case in self.shop.audit],
            "reference_text.jsonl": [{"text": text} for text in manuals.heldout_pages(self.shop)],
        }

    def rank(self, samples: Path, out: Path) -> None:
        """Have the three annotators rank the responses of `samples`; DataError names a line that they cannot judge."""
        from rlhf.quickstart.annotators import rank_file

        rank_file(self.shop, Path(samples), Path(out))

    def audit(self, models: Mapping[str, Path]) -> str:
        """The closing table: base, SFT and PPO by gold on the 600 audit prompts."""
        from rlhf.quickstart.audit import audit_table

        return audit_table(self.shop, models)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    from rlhf.artifacts import write_text

    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

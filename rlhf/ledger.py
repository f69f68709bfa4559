"""ledger.jsonl: what happened in a run, append-only, each record chained to the one before by its hash.

The chain detects an edited or removed record. It cannot detect a file that was cut at its end or rewritten as a whole;
for that, keep the head hash (`Ledger.head`) somewhere else.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.artifacts import canonical, sha256_text
from rlhf.errors import LineageError

GENESIS = "sha256:" + "0" * 64


class Ledger:
    """The ledger at `path`; reading verifies the whole chain and raises LineageError at the first broken record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.head = GENESIS
        self._whole = 0  # bytes of whole records
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8").split("\n")
        # A kill in the middle of a write: that record was never finished, so it never happened.
        self._whole = len("".join(f"{line}\n" for line in lines[:-1]).encode())
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line)
                body = {key: value for key, value in record.items() if key != "hash"}
                whole = record["prev"] == self.head and record["hash"] == sha256_text(canonical(body))
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise LineageError(
                    f"{self.path}:{number}: the ledger's chain is broken here, so its history cannot be trusted. "
                    "Restore the file, or start again under another run.name"
                )
            self.head = record["hash"]
            self.records.append(record)

    def append(self, event: str, **fields: Any) -> None:
        """Write one record to disk before returning."""
        body = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), "prev": self.head, **fields}
        record = {**body, "hash": sha256_text(canonical(body))}
        line = json.dumps(record, sort_keys=True) + "\n"
        with self.path.open("a", encoding="utf-8") as stream:
            stream.truncate(self._whole)
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._whole += len(line.encode())
        self.head = record["hash"]
        self.records.append(record)

    def last(self, event: str, stage: str) -> dict[str, Any] | None:
        """The newest record of this event and stage."""
        return next((r for r in reversed(self.records) if r["event"] == event and r.get("stage") == stage), None)

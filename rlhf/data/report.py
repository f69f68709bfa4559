"""What happened to each row of each file: kept, dropped by kind with samples, cut, tied; and the files' digests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import DataConfig
from rlhf.errors import DataError

SAMPLES = 5  # places named for each kind of drop


@dataclass(kw_only=True, slots=True)
class FileReport:
    """Counts of one file. rows + extra = kept + merged + unused + all dropped."""

    file: str
    format: str
    digest: str  # sha256 of the bytes on disk; of the rows for a hub data set
    license: str | None = None  # as data.<source>.license says, or what is written beside the file; None: unknown
    rows: int = 0
    extra: int = 0  # rankings beyond the first of a row, where several raters share one
    kept: int = 0
    merged: int = 0  # prompts only: the same prompt again, which counts once
    unused: int = 0  # beyond `limit`
    tied: int = 0  # kept rankings whose ranked responses all tie
    repeated: int = 0  # kept rankings of the same responses to the same prompt by the same annotator as an earlier one
    intransitive: int = 0  # kept rankings of rows whose comparisons contradict each other (data.intransitive=keep)
    cut: int = 0  # prompts shortened under data.on_overlong=truncate_prompt
    dropped: Counter[str] = field(default_factory=Counter)  # dirty rows by kind
    overlong: int = 0  # rows dropped under data.on_overlong
    samples: dict[str, list[str]] = field(default_factory=dict)  # file:line by kind, at most SAMPLES each

    def note(self, kind: str, where: str) -> None:
        """Remember where a drop of this kind was, for the first few."""
        places = self.samples.setdefault(kind, [])
        if len(places) < SAMPLES:
            places.append(where)

    def drop(self, kind: str, where: str) -> None:
        self.dropped[kind] += 1
        self.note(kind, where)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {"dropped": dict(sorted(self.dropped.items()))}


@dataclass(kw_only=True, slots=True)
class DataReport:
    """The reports of all files of one source; `key` is the configuration key that names it."""

    key: str
    files: list[FileReport] = field(default_factory=list)
    train: int = 0
    heldout: int = 0

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every file, for fingerprints."""
        return {report.file: report.digest for report in self.files}

    @property
    def dropped(self) -> Counter[str]:
        """Dirty rows by kind over all files."""
        return sum((report.dropped for report in self.files), Counter[str]())

    def of(self, where: str) -> FileReport:
        """The report of the file that a `file:line` lies in."""
        name = where.rpartition(":")[0]
        return next(report for report in self.files if report.file == name)

    def total(self, count: str) -> int:
        """One of the plain counts ("rows", "kept", "cut", ...) over all files."""
        return sum(getattr(report, count) for report in self.files)

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.key,
            "train": self.train,
            "heldout": self.heldout,
            "dropped": dict(sorted(self.dropped.items())),
            "files": [report.to_json() for report in self.files],
        }

    def summary(self) -> str:
        """One line for people."""
        line = f"{self.key}: {self.total('kept')} of {self.total('rows') + self.total('extra')} rows"
        counts = [f"{n} {kind}" for kind, n in sorted(self.dropped.items())]
        names = {
            "extra": "beyond the first of their row",
            "overlong": "over-long",
            "cut": "cut",
            "tied": "all tied",
            "repeated": "rank the same again",
            "intransitive": "intransitive kept",
            "merged": "repeated",
            "unused": "unused",
        }
        counts += [f"{self.total(name)} {label}" for name, label in names.items() if self.total(name)]
        return f"{line} ({', '.join(counts)})" if counts else line


def check_dirty(report: DataReport, data: DataConfig) -> None:
    """Raise a DataError that names kinds, counts and places if more than data.max_dirty of the rows are dirty."""
    dirty, rows = report.dropped.total(), report.total("rows") + report.total("extra")
    if dirty <= data.max_dirty * rows:
        return
    places = [
        f"  {n} {kind}: {', '.join(p for f in report.files for p in f.samples.get(kind, []))}"
        for kind, n in sorted(report.dropped.items())
    ]
    raise DataError(
        f"{report.key}: {dirty} of {rows} rows are dirty ({dirty / rows:.2%}), more than "
        f"data.max_dirty={data.max_dirty:g}:\n" + "\n".join(places)
        + f"\nMend the rows, or drop them knowingly with data.max_dirty={_above(dirty / rows)}"
    )  # fmt: skip


def _above(share: float) -> str:
    """The share rounded up to two significant places, so that it lets the rows pass when typed."""
    digits = 2
    while float(f"{share:.{digits}f}") < share:
        share += 10.0**-digits / 2
    return f"{share:.{digits}f}"

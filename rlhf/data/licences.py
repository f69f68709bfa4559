"""The licence of data or of a model, as far as it is written beside the files: nothing is looked up elsewhere, and no
text is judged."""

from __future__ import annotations

from pathlib import Path

import yaml

CARD, NAMES = "README.md", ("LICENSE", "LICENCE", "COPYING")
LONGEST = 160  # characters


def licence_beside(path: Path, top: Path | None = None) -> str | None:
    """What the nearest folder from that of `path` up to `top` says: the `license` of its card, as the hub writes it,
    or how its licence file begins. None if no folder says anything; without `top` the own folder alone is read."""
    own = path if path.is_dir() else path.parent
    above = [folder for folder in own.parents if top is not None and folder.is_relative_to(top)]
    return next((found for folder in [own, *above] if (found := _of_folder(folder))), None)


def _of_folder(folder: Path) -> str | None:
    card = _of_card(folder / CARD)
    if card is not None:
        return f"{card} ({CARD})"
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file() and file.name.split(".")[0].upper() in NAMES:
            lines = (" ".join(line.split()) for line in _text(file).splitlines())
            first = [line for line in lines if any(c.isalnum() for c in line)][:2]
            return f"{'; '.join(first)[:LONGEST]} ({file.name})" if first else None
    return None


def _of_card(path: Path) -> str | None:
    """The header of a data set's or a model's card: YAML between two lines of dashes."""
    parts = _text(path).split("---", 2) if path.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    stated = (header.get("license_name") or header.get("license")) if isinstance(header, dict) else None
    names = stated if isinstance(stated, list) else [stated]
    return ", ".join(str(name) for name in names if name)[:LONGEST] or None


def _text(path: Path) -> str:
    """The beginning of a file; nothing if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(1 << 16)
    except OSError:
        return ""

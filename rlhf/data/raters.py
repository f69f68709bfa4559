"""Rows with one ranking from each of several raters: our own, and the JSON export of Label Studio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from rlhf.data.rows import (
    EMPTY_REPLY,
    NO_LABEL,
    Dirty,
    Kind,
    Malformed,
    Parsed,
    field_of,
    has,
    label_of,
    make_prompt,
    make_ranking,
    messages_of,
    ranks_of,
    shown,
    texts_of,
    weight_of,
)
from rlhf.types import Prompt, Ranking

Rated = tuple[str | None, list[int | None], float]  # the annotator, the rank of each response, the weight


class Raters:
    """K >= 2 responses and, in `rankings`, the ranks that each annotator gave them."""

    name = "raters"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "prompt")
    example: ClassVar[Any] = {
        "prompt": "Hello", "responses": ["Hi.", "What?"],
        "rankings": [{"annotator": "anna", "ranks": [1, 2]}, {"annotator": "ben", "ranks": [1, 1]}],
    }  # fmt: skip

    def matches(self, row: Any) -> bool:
        return has(row, "prompt", "responses", "rankings")

    def parse(self, row: Any, kind: Kind) -> Sequence[Parsed | Dirty]:
        used = ("prompt", "responses", "rankings", "subset")
        messages = messages_of(field_of(row, "prompt"), "prompt")
        if kind == "prompt":
            return [make_prompt(messages, row, used)]
        responses = texts_of(field_of(row, "responses"), "responses")
        rated, subset = list(self._rated(row, len(responses))), label_of(row, "subset")
        return each_rater(rated, responses, subset, lambda: make_prompt(messages, row, used))

    def _rated(self, row: Any, count: int) -> Iterator[Rated]:
        seen: set[str] = set()
        for place, item in _objects(field_of(row, "rankings"), "rankings"):
            annotator = _label(item.get("annotator"), f"{place}.annotator")
            if annotator is None:
                raise Malformed(f"{place}.annotator is missing")
            if annotator in seen:
                raise Malformed(f"{place}.annotator is {annotator!r} again: a rater ranks a row once")
            seen.add(annotator)
            if item.get("ranks") is None:
                raise Malformed(f"{place}.ranks is missing")
            ranks = ranks_of(item["ranks"], f"{place}.ranks")
            if len(ranks) != count:
                raise Malformed(f"`{place}.ranks` has {len(ranks)} entries for {count} responses")
            yield annotator, ranks, weight_of(item, f"{place}.weight")


class LabelStudio:
    """A task of Label Studio's JSON export whose annotations rank a `List` with a `Ranker`, best first."""

    name = "labelstudio"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "prompt")
    example: ClassVar[Any] = {
        "data": {"prompt": "Hello", "items": [{"id": "a", "body": "What?"}, {"id": "b", "body": "Hi."}]},
        "annotations": [{"completed_by": 1, "result": [{"type": "ranker", "value": {"ranker": {"rank": ["b", "a"]}}}]}],
    }

    def matches(self, row: Any) -> bool:
        return has(row, "data", "annotations")

    def parse(self, row: Any, kind: Kind) -> Sequence[Parsed | Dirty]:
        data = field_of(row, "data")
        if not isinstance(data, dict):
            raise Malformed(f"field `data` must be an object, not {shown(data)}")
        if data.get("prompt") is None:
            raise Malformed("data.prompt is missing")
        messages = messages_of(data["prompt"], "data.prompt")
        lists = [name for name, value in data.items() if name != "prompt" and _has_items(value)]
        named, used = data | {"id": row.get("id")}, ("prompt", "subset", *lists)
        if kind == "prompt":
            return [make_prompt(messages, named, used, "data.prompt")]
        if len(lists) != 1:
            found = ", ".join(lists) or "none"
            raise Malformed(f"field `data` must have one list of items with `id` and `body`, but it has {found}")
        bodies = self._bodies(data[lists[0]], f"data.{lists[0]}")
        rated = [
            (self._annotator(item, place), self._ranks(item, list(bodies), place), 1.0)
            for place, item in _objects(field_of(row, "annotations"), "annotations")
            if not self._cancelled(item, place)
        ]
        responses, subset = list(bodies.values()), label_of(data, "subset")
        return each_rater(rated, responses, subset, lambda: make_prompt(messages, named, used, "data.prompt"))

    def _bodies(self, value: list[Any], name: str) -> dict[str, str]:
        bodies: dict[str, str] = {}
        for place, item in _objects(value, name):
            key = _label(item.get("id"), f"{place}.id")
            if key is None:
                raise Malformed(f"{place}.id is missing")
            if key in bodies:
                raise Malformed(f"{place}.id is {key!r} again")
            if not isinstance(item.get("body"), str):
                raise Malformed(f"{place}.body must be text, not {shown(item.get('body'))}")
            bodies[key] = item["body"]
        return bodies

    def _cancelled(self, annotation: dict[str, Any], place: str) -> bool:
        value = annotation.get("was_cancelled", False)
        if not isinstance(value, bool):
            raise Malformed(f"{place}.was_cancelled must be true or false, not {shown(value)}")
        return value

    def _annotator(self, annotation: dict[str, Any], place: str) -> str | None:
        value = annotation.get("completed_by")
        if isinstance(value, dict):
            return _label(value.get("id"), f"{place}.completed_by.id")
        return _label(value, f"{place}.completed_by")

    def _ranks(self, annotation: dict[str, Any], ids: list[str], place: str) -> list[int | None]:
        found = _objects(annotation.get("result"), f"{place}.result")
        results = [(where, result) for where, result in found if result.get("type") == "ranker"]
        if not results:  # submitted without a ranking
            return [None] * len(ids)
        if len(results) > 1:
            raise Malformed(f"{place}.result has {len(results)} rankings, not one")
        where, result = results[0]
        ranks: dict[str, int | None] = dict.fromkeys(ids)
        for n, value in enumerate(self._order(result, f"{where}.value"), 1):
            key = _label(value, f"{where}.value.ranker: an id")
            if key not in ranks:
                raise Malformed(f"{where}.value.ranker names the item {key!r}, which is not in the data")
            if ranks[key] is not None:
                raise Malformed(f"{where}.value.ranker names the item {key!r} twice")
            ranks[key] = n
        return list(ranks.values())

    def _order(self, result: dict[str, Any], place: str) -> list[Any]:
        """The ids, best first: a list, or an object whose one key is the name of the `Ranker`."""
        value = result.get("value")
        order = value.get("ranker") if isinstance(value, dict) else None
        if isinstance(order, dict):
            if len(order) != 1:
                raise Malformed(f"{place}.ranker has the buckets {', '.join(order) or 'none'}: buckets have no order")
            (order,) = order.values()
        if not isinstance(order, list):
            raise Malformed(f"{place}.ranker must be a list of ids, not {shown(order)}")
        return order


def each_rater(
    rated: list[Rated], responses: list[str], subset: str | None, prompt: Callable[[], Prompt]
) -> list[Ranking | Dirty]:
    """One ranking, or its dirt, for each rater. If none is left, the row as a whole is dirty, once.

    prompt: makes the prompt anew each time, since each ranking's prompt is cut to length in place.
    """
    prompt()  # an empty prompt is the first kind of dirt
    if not all(response.strip() for response in responses):
        raise Dirty(EMPTY_REPLY)
    if not rated:
        raise Dirty(NO_LABEL)
    parts: list[Ranking | Dirty] = []
    for annotator, ranks, weight in rated:
        labels = {"annotator": annotator, "subset": subset, "weight": weight}
        try:
            parts.append(make_ranking(prompt(), responses, ranks, labels))
        except Dirty as dirt:
            parts.append(dirt)
    if all(isinstance(part, Dirty) for part in parts):
        raise Dirty(str(parts[0]))
    return parts


def _objects(value: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place."""
    if not isinstance(value, list):
        raise Malformed(f"field `{name}` must be a list of objects, not {shown(value)}")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise Malformed(f"{name}[{i}] must be an object, not {shown(item)}")
        yield f"{name}[{i}]", item


def _has_items(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and "id" in item for item in value)


def _label(value: Any, place: str) -> str | None:
    if value is not None and type(value) not in (str, int):
        raise Malformed(f"{place} must be text or a whole number, not {shown(value)}")
    return None if value is None else str(value)

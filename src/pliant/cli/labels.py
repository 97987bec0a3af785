"""Class labels as people type them: ids, names, or nothing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pliant.errors import ConfigError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def parse_class(text: str, model: Denoiser) -> int:
    """An id ("3"), a class name (any synonym in "tabby, tabby cat", any case), or "null" -> label.

    Ids out of range and unknown names raise ConfigError; the latter names the nearest class.
    """
    words = text.strip()
    try:
        label = int(words)
    except ValueError:
        return _named(words, model)
    last = model.num_classes - 1
    if not 0 <= label <= last:
        extra = "; --class null samples without a class" if model.config.class_dropout > 0 else ""
        raise ConfigError(f"class {label} does not exist: this model has classes 0 to {last}{extra}")
    return label


def _named(words: str, model: Denoiser) -> int:
    if words.lower() in ("null", "none"):
        return model.null_label
    names = model.metadata.get("class_names")
    if not names:
        raise ConfigError(
            f"this model has no class names, so {words!r} means nothing; use ids 0 to {model.num_classes - 1}"
        )
    known: dict[str, int] = {}
    for label, name in enumerate(names):
        for synonym in (name, *name.split(",")):
            known.setdefault(synonym.strip().lower(), label)
    if words.lower() in known:
        return known[words.lower()]
    near = difflib.get_close_matches(words.lower(), known, n=3, cutoff=0.5)
    if not near:  # parts of names: "retriever" is far from "golden retriever" letter by letter
        near = [name for name in known if words.lower() in name][:3]
    meant = " or ".join(f"{name!r} ({known[name]})" for name in near)
    hint = f"did you mean {meant}?" if near else f"known: {', '.join(map(repr, names[:8]))}, ..."
    raise ConfigError(f"no class is called {words!r}; {hint}")


def choose_classes(typed: Sequence[str] | None, count: int | None, model: Denoiser) -> tuple[list[int], list[int]]:
    """(labels of all images, the distinct classes asked for). Image k has class k modulo the classes.

    Without classes: all of the model in turn, ten of them if no number is given either. Raises ConfigError.
    """
    classes = [parse_class(t, model) for t in typed] if typed else list(range(model.num_classes))
    if not typed and count is None:
        classes = classes[:10]
    if typed and count is not None and count < len(classes):
        raise ConfigError(f"--num {count} is fewer than the {len(classes)} classes asked for")
    total = count if count is not None else len(classes)
    return [classes[k % len(classes)] for k in range(total)], classes[:total]


def class_name(label: int, model: Denoiser) -> str:
    """For people: the name, or the id."""
    return "null" if label == model.num_classes else model.class_names[label]

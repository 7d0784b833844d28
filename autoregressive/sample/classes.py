"""Classes by number or by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from dataset.imagenet_names import NUM_CLASSES, imagenet_names, imagenet_synonyms
from utils.files import read_json


class ClassNames:
    """Finds class ids by what a user types: an id, a name, or for ImageNet one of WordNet's synonyms.

    `names` are those of a JSON file (a list in the order of the ids), of ImageNet where there are 1000 classes and no
    file, else none. `own` are names that stand in no file.
    """

    def __init__(self, num_classes: int, path: str | None = None, own: Sequence[str] | None = None) -> None:
        self.num_classes, self._path = num_classes, path or ("this model" if own else None)
        self.names: Sequence[str] | None = own
        if own:
            return
        if path:
            self.names = _read_names(path, num_classes)
        elif num_classes == NUM_CLASSES:
            self.names = imagenet_names()

    def find(self, text: str) -> int:
        """The id of a class.

        Raises:
            ValueError: unknown (the message names the nearest), ambiguous, or an id the model has not.
        """
        if self.names and text in self.names:
            return self.names.index(text)
        if text.isdigit():
            if int(text) >= self.num_classes:
                raise ValueError(
                    f"class {text} is out of range: the model has classes 0 .. {self.num_classes - 1} (--num-classes)"
                )
            return int(text)
        if not self.names:
            raise ValueError(f"unknown class {text!r}; expected an id (for names give --class-names FILE)")
        ids = self._own().get(text.lower()) or self._known().get(text.lower(), [])
        if len(ids) > 1:
            meant = " or ".join(f"{i} ({self.names[i]})" for i in ids)
            raise ValueError(f"class {text!r} is ambiguous: is it {meant}?")
        if not ids:
            raise ValueError(f"unknown class {text!r}; {self._nearest(text.lower())}")
        return ids[0]

    def name(self, class_id: int) -> str | None:
        """The name of a class, where it has one."""
        return self.names[class_id] if self.names and class_id < len(self.names) else None

    def _own(self) -> dict[str, list[int]]:
        """From the lower-case names of the classes to their ids."""
        own: dict[str, list[int]] = {}
        for class_id, name in enumerate(self.names or ()):
            own.setdefault(name.lower(), []).append(class_id)
        return own

    def _known(self) -> dict[str, list[int]]:
        """The same with synonyms; a class's own name goes before synonyms of others."""
        known: dict[str, list[int]] = {}
        for class_id, synonyms in enumerate([] if self._path else imagenet_synonyms()):
            for synonym in synonyms:
                known.setdefault(synonym.lower(), []).append(class_id)
        return known | self._own()

    def _nearest(self, text: str) -> str:
        known = self._known()
        near = [name for name in known if text in name.split()][:3]
        near += [name for name in difflib.get_close_matches(text, known, n=3) if name not in near]
        if not near:
            return f"expected an id, 0 .. {self.num_classes - 1}, or a name of {self._path or 'ImageNet'}"
        return f"did you mean {', '.join(f'{name!r} ({known[name][0]})' for name in near)}?"


def _read_names(path: str, num_classes: int) -> list[str]:
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a JSON list of class names, in the order of their ids")
    if len(names) > num_classes:
        raise ValueError(f"{path} has {len(names)} class names, the model has --num-classes {num_classes}")
    return names

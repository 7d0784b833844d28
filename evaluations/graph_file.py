"""Reads a frozen TensorFlow graph (.pb) without TensorFlow: nodes, attributes and constant tensors.

The file is a GraphDef in protobuf's wire format, of which the few message types below are understood; fields that are
not needed are skipped. The file is memory-mapped and a tensor is read only when it is asked for. Nothing in the file is
trusted: lengths, shapes and numbers are checked against the bytes that are there.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_ELEMENTS = 2**28  # of one tensor: far above any weight here, far below what a hostile shape could ask for
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {1: np.dtype("<f4"), 3: np.dtype("<i4")}


class GraphFileError(ValueError):
    """The bytes are no graph, or the graph lacks what was asked of it."""


@dataclass
class Node:
    """One operation: its inputs by name, and its attributes, decoded when they are asked for."""

    name: str = ""
    op: str = ""
    inputs: list[str] = field(default_factory=list)
    attributes: dict[str, memoryview] = field(default_factory=dict)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, such as "strides"."""
        values: list[int] = []
        for number, wire, value in _fields(self._value(name, 1)):
            if number == 3:
                values += [_signed(v) for v in ([value] if wire == _VARINT else _varints(value))]
        return tuple(values)

    def text(self, name: str, default: str | None = None) -> str:
        """A string, such as "padding"."""
        if default is not None and name not in self.attributes:
            return default
        return _text(self._value(name, 2), f"attribute {name} of {self.name}")

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean; `default` where it is not written."""
        return bool(self._value(name, 5, 0)) if name in self.attributes else default

    def number(self, name: str) -> float:
        """A float, such as "variance_epsilon"."""
        return struct.unpack("<f", self._value(name, 4, b"\0\0\0\0"))[0]

    def tensor(self) -> np.ndarray:
        """The value of a constant: float32 or int32, read-only, in the file's shape."""
        if self.op != "Const":
            raise GraphFileError(f"node {self.name} is a {self.op or 'node without operation'}, expected a constant")
        return _tensor(self._value("value", 8), self.name)

    def _value(self, name: str, number: int, default: int | bytes | None = None) -> memoryview | int | bytes:
        """Field `number` of the attribute; protobuf leaves out a zero, which is what `default` is for."""
        if name not in self.attributes:
            raise GraphFileError(f"node {self.name} ({self.op}) has no attribute {name}")
        wanted = {3: _VARINT, 5: _VARINT, 4: _FIXED32}.get(number, _BYTES)
        for found, wire, value in _fields(self.attributes[name]):
            if found == number and wire == wanted:
                return value
        if default is None:
            raise GraphFileError(f"attribute {name} of node {self.name} ({self.op}) is of another type than expected")
        return default


def read_graph(path: str | Path) -> dict[str, Node]:
    """All nodes of a frozen graph by name, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        GraphFileError: it is no graph, is cut short, or names a node twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a frozen graph (.pb)")
    try:
        nodes: dict[str, Node] = {}
        for number, wire, value in _fields(_map(path)):
            if number == 1 and wire == _BYTES:
                node = _node(value)
                if node.name in nodes:
                    raise GraphFileError(f"it has two nodes named {node.name}")
                nodes[node.name] = node
        if not nodes:
            raise GraphFileError("it has no nodes")
    except GraphFileError as error:
        raise GraphFileError(
            f"{path} is not a frozen TensorFlow graph, or is damaged: {error}; download it again"
        ) from error
    return nodes


def _map(path: Path) -> memoryview:
    if path.stat().st_size == 0:
        raise GraphFileError("it is empty")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _node(data: memoryview) -> Node:
    node = Node()
    for number, wire, value in _fields(data):
        if wire != _BYTES:
            continue
        if number == 1:
            node.name = _text(value, "a node's name")
        elif number == 2:
            node.op = _text(value, f"the operation of {node.name}")
        elif number == 3:
            node.inputs.append(_text(value, f"an input of {node.name}"))
        elif number == 5:
            entry = {number: part for number, wire, part in _fields(value) if wire == _BYTES}
            node.attributes[_text(entry.get(1, b""), f"an attribute of {node.name}")] = entry.get(2, memoryview(b""))
    return node


def _tensor(data: memoryview, name: str) -> np.ndarray:
    kind, shape, content, values = 0, (), None, []
    for number, wire, value in _fields(data):
        if number == 1 and wire == _VARINT:
            kind = value
        elif number == 2 and wire == _BYTES:
            shape = _shape(value)
        elif number == 4 and wire == _BYTES:
            content = value
        elif number in (5, 7) and wire in (_BYTES, _FIXED32, _VARINT):
            values.append(_listed(value, wire, number))
    if kind not in _DTYPES:
        raise GraphFileError(f"constant {name} has the data type number {kind}; float32 (1) and int32 (3) are known")
    dtype, count = _DTYPES[kind], math.prod(shape)
    if any(size < 0 for size in shape) or count > MAX_ELEMENTS:
        raise GraphFileError(f"constant {name} has the impossible shape {list(shape)}")
    if content is not None and len(content):
        if len(content) != count * dtype.itemsize:
            raise GraphFileError(f"constant {name} of shape {list(shape)} holds {len(content)} bytes")
        return np.frombuffer(content, dtype).reshape(shape)
    listed = np.concatenate(values).astype(dtype) if values else np.zeros(min(count, 1), dtype)
    if len(listed) > count or (count and not len(listed)):
        raise GraphFileError(f"constant {name} of shape {list(shape)} lists {len(listed)} values")
    return np.concatenate([listed, np.full(count - len(listed), listed[-1:], dtype)]).reshape(shape)


def _listed(value: memoryview | int, wire: int, number: int) -> np.ndarray:
    """Values of float_val (5) or int_val (7), packed or one by one."""
    if number == 7:
        found = [value] if wire == _VARINT else list(_varints(value))
        return np.array([_signed(v) for v in found], dtype=np.int64)
    if wire == _VARINT or len(value) % 4:
        raise GraphFileError("a list of floats has a broken length")
    return np.frombuffer(value, _DTYPES[1])


def _shape(data: memoryview) -> tuple[int, ...]:
    sizes = []
    for number, wire, dimension in _fields(data):
        if number == 2 and wire == _BYTES:
            found = [value for n, w, value in _fields(dimension) if n == 1 and w == _VARINT]
            sizes.append(_signed(found[-1]) if found else 0)
    return tuple(sizes)


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """The fields of a message: number, wire type, and an integer or the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise GraphFileError(f"byte {at - 1} is no field of a protobuf message")
        if length > len(data) - at:
            raise GraphFileError(f"a field of {length} bytes has only {len(data) - at} left")
        yield number, wire, data[at : at + length]
        at += length


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that starts at byte `at` (7 bits a byte, lowest first), and where it ends."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise GraphFileError("a number is cut short")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    """Negative numbers are stored as 64-bit two's complement."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _text(data: memoryview | bytes, what: str) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError:
        raise GraphFileError(f"{what} is not text") from None

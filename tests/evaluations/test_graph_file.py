"""The graph reader against protobuf's own parser, and against hostile files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from evaluations.graph_file import MAX_ELEMENTS, GraphFileError, read_graph

FIXTURE = Path(__file__).parents[1] / "goldens/evaluator/inception_2048.pb"
FLOAT, INT32, STRING = 1, 3, 7


def write(folder: Path, graph: GraphDef) -> Path:
    path = folder / "graph.pb"
    path.write_bytes(graph.SerializeToString())
    return path


def constant(folder: Path, **fields) -> np.ndarray:
    """What the reader makes of a constant tensor with these fields."""
    shape = fields.pop("shape", [])
    tensor = TensorProto(**fields)
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    graph = GraphDef()
    graph.node.add(name="c", op="Const").attr["value"].tensor.CopyFrom(tensor)
    return read_graph(write(folder, graph))["c"].tensor().copy()  # the file is written again


def oracle(tensor: TensorProto) -> np.ndarray:
    dtype = {FLOAT: np.float32, INT32: np.int32}[tensor.dtype]
    values = np.frombuffer(tensor.tensor_content, dtype) if tensor.tensor_content else None
    if values is None:
        values = np.array(tensor.float_val or tensor.int_val, dtype)
    return values.reshape([dim.size for dim in tensor.tensor_shape.dim])


def test_the_fixture_graph_is_read_as_protobuf_reads_it():
    want = GraphDef.FromString(FIXTURE.read_bytes())
    got = read_graph(FIXTURE)
    assert list(got) == [node.name for node in want.node]
    compared = 0
    for node in want.node:
        mine = got[node.name]
        assert (mine.op, mine.inputs, set(mine.attributes)) == (node.op, list(node.input), set(node.attr))
        if "padding" in node.attr:
            assert mine.text("padding") == node.attr["padding"].s.decode()
            assert mine.integers("strides") == tuple(node.attr["strides"].list.i)
        if "variance_epsilon" in node.attr:
            assert mine.number("variance_epsilon") == node.attr["variance_epsilon"].f
            assert mine.flag("scale_after_normalization") == node.attr["scale_after_normalization"].b
        if node.op == "Const" and node.attr["dtype"].type != STRING:
            np.testing.assert_array_equal(mine.tensor(), oracle(node.attr["value"].tensor))
            compared += 1
    assert compared == 488


def test_every_way_to_write_a_constant(tmp_path):
    raw = np.arange(6, dtype=np.float32)
    cases = [
        (constant(tmp_path, dtype=FLOAT, shape=[2, 3], tensor_content=raw.tobytes()), raw.reshape(2, 3)),
        (constant(tmp_path, dtype=FLOAT, shape=[3], float_val=[1, 2, 3]), [1, 2, 3]),
        (constant(tmp_path, dtype=FLOAT, shape=[2, 2], float_val=[7, 8]), [[7, 8], [8, 8]]),  # the last one repeats
        (constant(tmp_path, dtype=FLOAT, float_val=[0.5]), 0.5),
        (constant(tmp_path, dtype=FLOAT, shape=[2]), [0, 0]),  # protobuf leaves zeros out
        (constant(tmp_path, dtype=FLOAT, shape=[0, 4]), np.zeros((0, 4))),
        (constant(tmp_path, dtype=INT32, shape=[2], int_val=[-1, 2**31 - 1]), [-1, 2**31 - 1]),
    ]
    for got, want in cases:
        np.testing.assert_array_equal(got, want)
        assert got.shape == np.shape(want)


def test_lists_may_be_packed_or_not(tmp_path):
    graph = GraphDef()
    graph.node.add(name="n", op="Conv2D").attr["strides"].list.i.extend([1, 2, -3, 1])  # protobuf packs them
    assert read_graph(write(tmp_path, graph))["n"].integers("strides") == (1, 2, -3, 1)
    attribute = field(1, b"strides") + field(2, field(1, b"\x18\x01\x18\x02"))  # key, value.list.i one by one
    path = tmp_path / "unpacked.pb"
    path.write_bytes(field(1, field(1, b"n") + field(5, attribute)))
    assert read_graph(path)["n"].integers("strides") == (1, 2)


def field(number: int, content: bytes) -> bytes:
    """A field of bytes in wire format."""
    return bytes([number << 3 | 2, len(content)]) + content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "is not a frozen TensorFlow graph"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "has only 0 left"),
        (b"\x0a" + b"\xff" * 20, "a number is cut short"),
        (b"\x22\x00", "it has no nodes"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "a node's name is not text"),
    ],
)
def test_files_that_are_no_graph(tmp_path, content, reason):
    path = tmp_path / "bad.pb"
    path.write_bytes(content)
    with pytest.raises(GraphFileError, match=reason) as caught:
        read_graph(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pb"):
        read_graph(tmp_path / "none.pb")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999999])
def test_a_download_that_was_cut_short(tmp_path, share):
    data = FIXTURE.read_bytes()
    path = tmp_path / "short.pb"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(GraphFileError, match="damaged"):
        read_graph(path)


def test_two_nodes_of_one_name(tmp_path):
    graph = GraphDef()
    graph.node.add(name="a", op="Relu")
    graph.node.add(name="a", op="Const")
    with pytest.raises(GraphFileError, match="two nodes named a"):
        read_graph(write(tmp_path, graph))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": FLOAT, "shape": [2**40, 2**40], "float_val": [1]}, "impossible shape"),  # would fill the memory
        ({"dtype": FLOAT, "shape": [MAX_ELEMENTS + 1], "float_val": [1]}, "impossible shape"),
        ({"dtype": FLOAT, "shape": [-1], "float_val": [1]}, "impossible shape"),
        ({"dtype": FLOAT, "shape": [3], "tensor_content": b"1234"}, "holds 4 bytes"),
        ({"dtype": FLOAT, "shape": [1], "float_val": [1, 2]}, "lists 2 values"),
        ({"dtype": STRING, "string_val": [b"x"]}, "data type number 7"),
        ({"dtype": 2, "shape": [1]}, "data type number 2"),
    ],
)
def test_constants_that_cannot_be(tmp_path, fields, reason):
    with pytest.raises(GraphFileError, match=reason):
        constant(tmp_path, **fields)


def test_asking_for_what_is_not_there():
    nodes = read_graph(FIXTURE)
    with pytest.raises(GraphFileError, match="conv is a Relu, expected a constant"):
        nodes["conv"].tensor()
    with pytest.raises(GraphFileError, match=r"conv/Conv2D \(Conv2D\) has no attribute ksize"):
        nodes["conv/Conv2D"].integers("ksize")
    with pytest.raises(GraphFileError, match="of another type"):
        nodes["conv/Conv2D"].integers("padding")
    assert nodes["conv/Conv2D"].text("data_format", "NHWC") == "NHWC"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_damage_is_an_error_or_another_graph(tmp_path_factory, data):
    """Whatever the bytes are, the reader ends, and never with anything but its own error."""
    graph = GraphDef()
    node = graph.node.add(name="c", op="Const")
    node.attr["value"].tensor.CopyFrom(TensorProto(dtype=FLOAT, float_val=[1, 2]))
    content = bytearray(graph.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pb"
    path.write_bytes(content)
    try:
        for found in read_graph(path).values():
            if found.op == "Const":
                found.tensor()
    except GraphFileError:
        pass

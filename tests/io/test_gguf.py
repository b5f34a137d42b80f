"""GGUF: what is written is read, byte for byte, and damaged or hostile files are rejected without large allocations."""

import random
import struct
import tracemalloc

import numpy as np
import pytest

from mowa.errors import DataError
from mowa.io.gguf import TENSOR_TYPES, TensorInfo, open_writer, read_gguf

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "negative": -5,
    "large": 2**40,
    "smallest": -(2**40),
    "epsilon": 1e-5,
    "flag": True,
    "text": "zażółć gęślą jaźń \n",
    "integers": [1, -2, 3],
    "long integers": [2**40, 1],
    "floats": [1.0, 2.5],
    "texts": ["a", "", "ß"],
    "flags": [True, False],
    "nested": [[1, 2], [3]],
    "bytes": np.arange(5, dtype=np.uint8),
    "short": np.uint16(7),
    "double": np.float64(0.1),
    "empty": [],
}
TYPES = {
    **{"llama.block_count": "uint32", "negative": "int32", "large": "uint64", "smallest": "int64"},
    **{"epsilon": "float32", "flag": "bool", "text": "string", "integers": "array[int32]"},
    **{"long integers": "array[int64]", "floats": "array[float32]", "texts": "array[string]", "flags": "array[bool]"},
    **{"nested": "array[array[int32]]", "bytes": "array[uint8]", "short": "uint16", "double": "float64"},
    **{"empty": "array[string]", "general.architecture": "string"},
}
TENSORS = {
    "matrix": TensorInfo((3, 64), "f32"),
    "blocks": TensorInfo((2, 64), "q8_0"),
    "vector": TensorInfo((5,), "f16"),
    "experts": TensorInfo((2, 3, 256), "q4_k"),
}


def write(path, metadata=METADATA, tensors=TENSORS, **options):
    """Write random bytes as tensors, in pieces and in reverse order, and return them."""
    chosen = random.Random(1)
    content = {name: np.frombuffer(chosen.randbytes(info.nbytes), np.uint8) for name, info in tensors.items()}
    with open_writer(path, metadata, tensors, **options) as writer:
        for name in reversed(tensors):
            for piece in np.array_split(content[name], 3):
                writer.write(name, piece)
    return content


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_reads_what_was_written(path):
    content = write(path)
    file = read_gguf(path)
    assert (file.version, file.alignment) == (3, 32)
    assert file.value_types == TYPES
    for key, value in METADATA.items():
        found = file.metadata[key]
        expected = np.float32(value) if file.value_types[key] == "float32" else value
        assert list(map(list, found)) == value if key == "nested" else np.array_equal(found, expected), key
    for name, info in TENSORS.items():
        assert (file.tensors[name].shape, file.tensors[name].type_name) == (info.shape, info.type_name)
        assert file.tensors[name].offset % 32 == 0
        assert file.blocks(name).shape == (*info.shape[:-1], info.row_bytes)
        assert file.blocks(name).tobytes() == content[name].tobytes()
        assert not file.blocks(name).flags.writeable


def test_a_copy_has_the_same_bytes(path, tmp_path):
    write(path, METADATA | {"general.alignment": 64})
    file = read_gguf(path)
    with open_writer(tmp_path / "copy.gguf", file.metadata, file.tensors, value_types=file.value_types) as writer:
        for name in file.tensors:
            writer.write(name, file.blocks(name))
    assert (tmp_path / "copy.gguf").read_bytes() == path.read_bytes()
    assert all(info.offset % 64 == 0 for info in file.tensors.values())


def test_version_2_is_the_same_format(path):
    content = write(path)
    path.write_bytes(b"GGUF\2" + path.read_bytes()[5:])
    assert read_gguf(path).version == 2
    assert read_gguf(path).blocks("matrix").tobytes() == content["matrix"].tobytes()


def test_a_file_without_tensors_is_read(path):
    write(path, {"general.architecture": "llama"}, {})
    assert read_gguf(path).tensors == {}


def test_the_gguf_package_reads_it_alike_and_knows_the_same_types(path):
    gguf = pytest.importorskip("gguf")
    written = {key: value for key, value in METADATA.items() if key not in ("nested", "empty")}
    content = write(path, written)
    reader = gguf.GGUFReader(path)
    ours = read_gguf(path)
    for key in written:
        assert np.array_equal(reader.fields[key].contents(), ours.metadata[key])
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == content[tensor.name].tobytes()
        assert tuple(reversed(tensor.shape.tolist())) == ours.tensors[tensor.name].shape
    sizes = {
        member.name.lower(): (member.value, *gguf.GGML_QUANT_SIZES[member]) for member in gguf.GGMLQuantizationType
    }
    assert sizes == {name: (one.id, one.block_weights, one.block_bytes) for name, one in TENSOR_TYPES.items()}


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"a": 2**64}, {}, "'a' cannot be stored: Python int too large"),
        ({"a": 1e60}, {}, "float32 does not hold 1e"),
        ({"a": [1, "b"]}, {}, "different types"),
        ({"a": None}, {}, "NoneType"),
        ({"a": "\udcf1"}, {}, "surrogates"),
        ({"": 1}, {}, "0 bytes"),
        ({"general.alignment": 24}, {}, "power of two"),
        ({}, {"x": TensorInfo((2, 33), "q8_0")}, "rows of 33 weights, and q8_0 stores blocks of 32"),
        ({}, {"x": TensorInfo((2, 33), "q9")}, "unknown type 'q9'"),
        ({}, {"x" * 64: TensorInfo((2,), "f32")}, "64 bytes"),
        ({}, {"x": TensorInfo((1, 1, 1, 1, 1), "f32")}, "5 dimensions"),
        ({}, {"x": TensorInfo((0, 1), "f32")}, "an empty dimension"),
    ],
)
def test_rejects_what_cannot_be_stored(path, metadata, tensors, message):
    with pytest.raises(DataError, match=message), open_writer(path, metadata, tensors):
        pass
    assert not list(path.parent.iterdir())


def test_a_file_is_complete_or_not_there(path):
    path.write_text("old")
    with pytest.raises(DataError, match="has 4 bytes, and its header says 20"):  # noqa: SIM117
        with open_writer(path, {}, {"x": TensorInfo((5,), "f32")}) as writer:
            writer.write("x", np.zeros(1, np.float32))
    with pytest.raises(DataError, match="has 24 bytes, and its header says 20"):  # noqa: SIM117
        with open_writer(path, {}, {"x": TensorInfo((5,), "f32")}) as writer:
            writer.write("x", np.zeros(6, np.float32))
    with pytest.raises(DataError, match="'y' is not in the header"):  # noqa: SIM117
        with open_writer(path, {}, {"x": TensorInfo((5,), "f32")}) as writer:
            writer.write("y", np.zeros(6, np.float32))
    assert [file.read_text() for file in path.parent.iterdir()] == ["old"]


def header(num_tensors=0, num_keys=0, version=3, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def string(text):
    encoded = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def pair(key, type_id, value):
    return string(key) + struct.pack("<I", type_id) + value


def tensor(name, shape, type_id=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], type_id, offset)


ARRAY = 9
DEEP = b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(9))
HOSTILE = {
    "is not a GGUF file": b"GGML" + bytes(20),
    "needs 4 bytes at byte 0, and the file ends at 0": b"",
    "needs 8 bytes at byte 8, and the file ends at 12": header()[:12],
    "big-endian": b"GGUF" + struct.pack(">I", 3) + bytes(16),
    "is GGUF version 4, and mowa reads up to version 3": header(version=4),
    "is GGUF version 1, which is obsolete": header(version=1),
    "18446744073709551615 metadata keys at byte 24": header(num_keys=2**64 - 1),
    "1152921504606846976 tensors at byte 24": header(num_tensors=2**60),
    "metadata key 0 has 0 bytes": header(num_keys=1, rest=pair("", 4, bytes(20))),
    "metadata key 0 has 70000 bytes": header(num_keys=1, rest=pair("a" * 70_000, 4, bytes(20))),
    "metadata key 0 is not UTF-8 at byte 33": header(num_keys=1, rest=pair(b"a\xff", 4, bytes(20))),
    "metadata key 0 needs 99999999999 bytes": header(num_keys=1, rest=struct.pack("<Q", 99_999_999_999) + bytes(20)),
    "the metadata key 'a' is there twice": header(num_keys=2, rest=2 * pair("a", 4, bytes(4))),
    "'a' has the unknown value type 13": header(num_keys=1, rest=pair("a", 13, bytes(20))),
    "the value of 'a' is not UTF-8 at byte 45": header(num_keys=1, rest=pair("a", 8, string(b"\xff"))),
    "bool that is neither 0 nor 1": header(num_keys=1, rest=pair("a", 7, b"\2")),
    "2305843009213693952 elements": header(num_keys=1, rest=pair("a", ARRAY, struct.pack("<IQ", 8, 2**61))),
    "needs 4611686018427387904 bytes": header(num_keys=1, rest=pair("a", ARRAY, struct.pack("<IQ", 10, 2**59))),
    "arrays in arrays, more than 4 deep": header(num_keys=1, rest=pair("a", ARRAY, DEEP)),
    "arrays of different types": header(
        num_keys=1, rest=pair("a", ARRAY, struct.pack("<IQIQII", ARRAY, 2, 4, 1, 7, 5) + struct.pack("<QI", 1, 1))
    ),
    "cut off at string 2 of 3": header(
        num_keys=1, rest=pair("a", ARRAY, struct.pack("<IQ", 8, 3) + string("12345678") + string("1"))
    ),
    r"general.alignment is 24 \(uint32\)": header(num_keys=1, rest=pair("general.alignment", 4, b"\x18\0\0\0")),
    r"general.alignment is 0 \(uint32\)": header(num_keys=1, rest=pair("general.alignment", 4, bytes(4))),
    r"general.alignment is 32 \(int32\)": header(num_keys=1, rest=pair("general.alignment", 5, b"\x20\0\0\0")),
    "the tensor 'a' is there twice": header(2, rest=2 * tensor("a", (1,)) + bytes(64)),
    "the name of tensor 0 has 64 bytes": header(1, rest=tensor("a" * 64, (1,)) + bytes(64)),
    "5 dimensions": header(1, rest=tensor("a", (1,) * 5) + bytes(64)),
    r"an empty dimension: \[1, 0\]": header(1, rest=tensor("a", (1, 0)) + bytes(64)),
    "unknown tensor type 4": header(1, rest=tensor("a", (1,), 4) + bytes(64)),
    "rows of 33 weights, and q4_0": header(1, rest=tensor("a", (33,), 2) + bytes(64)),
    "offset 8, which is not a multiple of the alignment 32": header(1, rest=tensor("a", (1,), 0, 8) + bytes(128)),
    "'a' needs 400 bytes at offset 0, and 63 bytes": header(1, rest=tensor("a", (100,)) + bytes(70)),
    "'a' needs 340282366920938463463374607431768211456 bytes": header(1, rest=tensor("a", (2**63, 2**63)) + bytes(99)),
    "'b' at offset 0 overlaps 'a', which ends at 4": header(2, rest=tensor("a", (1,)) + tensor("b", (2,)) + bytes(64)),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_rejects_hostile_files(path, message):
    path.write_bytes(HOSTILE[message])
    with pytest.raises(DataError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_tensors(path):
    with pytest.raises(DataError, match="No such file"):
        read_gguf(path)
    write(path)
    with pytest.raises(DataError, match="has no tensor 'x': it has 4 others"):
        read_gguf(path).blocks("x")


def mutate(original: bytes, chosen: random.Random) -> bytes:
    """Flip bytes, cut the file, insert bytes, or put a large number somewhere in the header."""
    content = bytearray(original)
    kind = chosen.choice(["flip", "cut", "insert", "number", "number"])
    header_bytes = 1200
    if kind == "cut":
        return bytes(content[: chosen.randrange(len(content))])
    for _ in range(chosen.randint(1, 4)):
        at = chosen.randrange(header_bytes)
        if kind == "flip":
            content[at] ^= 1 << chosen.randrange(8)
        elif kind == "insert":
            content[at:at] = chosen.randbytes(chosen.randint(1, 9))
        else:
            number = chosen.choice([2**64 - 1, 2**63, 2**32, 2**31 - 1, 10**7, chosen.getrandbits(64)])
            content[at : at + 8] = struct.pack("<Q", number)
    return bytes(content)


def test_2000_mutated_files_are_read_or_rejected_in_little_memory(path):
    write(path)
    original, chosen = path.read_bytes(), random.Random(20)
    messages = []
    tracemalloc.start()
    try:
        for _ in range(2000):
            path.write_bytes(mutate(original, chosen))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                file = read_gguf(path)
                for name in file.tensors:
                    assert file.blocks(name).nbytes == file.tensors[name].nbytes <= len(original) + 64
            except DataError as error:
                messages.append(str(error))
            assert tracemalloc.get_traced_memory()[1] - before < 1e6
    finally:
        tracemalloc.stop()
    assert 1000 < len(messages) < 2000
    assert all("\n" not in message and len(message) < 600 for message in messages)

"""Importance matrices are written and read without a change, as other readers read them, and hostile files rejected."""

import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from mowa.errors import DataError
from mowa.io.gguf import TensorInfo, open_writer, read_gguf
from mowa.io.gguf.imatrix import ImportanceMatrix, importance_for, mean_squares, missing, read_imatrix, write_imatrix
from tests.io.test_gguf import mutate

KEYS = {"imatrix.datasets": ["a.txt"], "imatrix.chunk_count": np.uint32(3), "imatrix.chunk_size": np.uint32(512)}
QUERY, EXPERTS, HEAD = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight", "output.weight"


def make_matrix(seed=0):
    """Return a matrix as it is collected: of a linear layer, of three experts, one without tokens, and of the head."""
    chosen = torch.Generator().manual_seed(seed)
    counts = {QUERY: torch.tensor(1537), EXPERTS: torch.tensor([1000, 0, 3]), HEAD: torch.tensor(1)}
    shapes = {QUERY: (257,), EXPERTS: (3, 63), HEAD: (1,)}
    sums = {name: torch.rand(shape, generator=chosen, dtype=torch.float64) * 1e6 for name, shape in shapes.items()}
    values = {name: mean_squares(sums[name], counts[name]) for name in sums}
    return ImportanceMatrix(values, counts, ("a.txt", "zażółć.jsonl"), 3, 512)


def write_dat(path, matrix):
    """Write the older format, as llama-imatrix does with `--output-format dat`."""
    parts = [struct.pack("<i", len(matrix.values))]
    for name, values in sorted(matrix.values.items()):
        chunks = -(-int(matrix.counts[name].max()) // matrix.chunk_size)
        stored = values.numpy().ravel() * np.float32(chunks)
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", chunks, stored.size)]
        parts.append(stored.tobytes())
    dataset = matrix.datasets[-1].encode()
    parts += [struct.pack("<ii", matrix.chunks, len(dataset)), dataset]
    path.write_bytes(b"".join(parts))


def assert_same(found, expected):
    assert set(found.values) == set(expected.values)
    for name, values in expected.values.items():
        assert torch.equal(found.values[name], values)
        assert torch.equal(found.counts[name], expected.counts[name])
        assert (found.values[name].dtype, found.counts[name].dtype) == (torch.float32, torch.int64)
    assert found.datasets == expected.datasets
    assert (found.chunks, found.chunk_size) == (expected.chunks, expected.chunk_size)


@pytest.mark.parametrize("seed", range(20))
def test_values_are_the_same_after_writing(seed, tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, make_matrix(seed))
    assert_same(read_imatrix(path), make_matrix(seed))


def test_any_values_are_close_after_writing(tmp_path):
    values = torch.tensor([0.0, 1e-40, 1e-8, 1.0, 3.3, 1e30])
    write_imatrix(tmp_path / "imatrix.gguf", ImportanceMatrix({"a": values}, {"a": torch.tensor(7)}, (), 0, 0))
    torch.testing.assert_close(read_imatrix(tmp_path / "imatrix.gguf").values["a"], values, rtol=2e-7, atol=1e-44)


def test_the_file_is_as_llama_imatrix_writes_it(tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, make_matrix())
    file = read_gguf(path)
    assert file.metadata["general.type"] == "imatrix"
    assert [file.value_types[key] for key in KEYS] == ["array[string]", "uint32", "uint32"]
    shapes = {name: info.shape for name, info in file.tensors.items()}
    assert shapes == {
        **{f"{QUERY}.in_sum2": (257,), f"{QUERY}.counts": (1,), f"{EXPERTS}.in_sum2": (3, 63)},
        **{f"{EXPERTS}.counts": (3, 1), f"{HEAD}.in_sum2": (1,), f"{HEAD}.counts": (1,)},
    }
    assert {info.type_name for info in file.tensors.values()} == {"f32"}


def test_experts_without_tokens_count_1_and_are_never_nan(tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, make_matrix())
    assert (read_gguf(path).blocks(f"{EXPERTS}.in_sum2")[1] == 0).all()
    assert torch.equal(read_imatrix(path).values[EXPERTS][1], torch.ones(63))


def test_the_older_format(tmp_path):
    path, matrix = tmp_path / "imatrix.dat", make_matrix()
    write_dat(path, matrix)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("zażółć.jsonl",), 3, 0)
    assert {name: int(count) for name, count in found.counts.items()} == {QUERY: 4, EXPERTS: 2, HEAD: 1}
    for name, values in matrix.values.items():
        torch.testing.assert_close(found.values[name], values.ravel(), rtol=2e-7, atol=0)
        shape = (2, *values.shape) if name == QUERY else (*values.shape[:-1], 2, values.shape[-1])
        assert importance_for(found, name, shape).shape == values.shape
    write_imatrix(tmp_path / "imatrix.gguf", found)
    assert_same(read_imatrix(tmp_path / "imatrix.gguf"), found)


def test_the_older_format_without_its_end(tmp_path):
    path = tmp_path / "imatrix.dat"
    write_dat(path, make_matrix())
    path.write_bytes(path.read_bytes()[: -8 - len("zażółć.jsonl".encode())])
    assert (read_imatrix(path).datasets, read_imatrix(path).chunks) == ((), 0)


@pytest.mark.parametrize("write", [write_imatrix, write_dat])
def test_libgguf_reads_the_same(write, tmp_path):
    libgguf = pytest.importorskip("libgguf")
    path = tmp_path / "imatrix"
    write(path, make_matrix())
    expected, found = libgguf.load_imatrix(path), read_imatrix(path)
    assert set(expected) == set(found.values)
    for name, values in found.values.items():
        rows = torch.from_numpy(np.asarray(expected[name])).view(values.shape)
        seen = found.counts[name] > 0  # it has 0 / 0 or something else for others
        assert torch.equal(values[seen], rows[seen])


def test_the_gguf_package_reads_the_same(tmp_path):
    gguf = pytest.importorskip("gguf")
    path, matrix = tmp_path / "imatrix.gguf", make_matrix()
    write_imatrix(path, matrix)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == list(matrix.datasets)
    for name, values in matrix.values.items():
        counts = tensors[f"{name}.counts"].view(matrix.counts[name].shape)
        assert torch.equal(mean_squares(tensors[f"{name}.in_sum2"], counts.long()), values)


def test_importance_for_a_tensor():
    matrix = make_matrix()
    assert importance_for(matrix, "blk.1.attn_q.weight", (4, 257)) is None
    assert torch.equal(importance_for(matrix, QUERY, (4, 257)), matrix.values[QUERY])
    assert torch.equal(importance_for(matrix, EXPERTS, (3, 8, 63)), matrix.values[EXPERTS])
    with pytest.raises(DataError, match=r"has 257 values for blk.0.attn_q.weight, whose weights \[4, 256\] have 256"):
        importance_for(matrix, QUERY, (4, 256))
    with pytest.raises(DataError, match=r"has 189 values for blk.0.ffn_up_exps.weight, .*\[4, 8, 63\] have 252"):
        importance_for(matrix, EXPERTS, (4, 8, 63))


def test_missing_names():
    assert missing(make_matrix(), [QUERY, "b", HEAD, "a"]) == ["b", "a"]


def write_gguf(path, tensors, metadata=KEYS):
    arrays = {name: np.asarray(values, np.float32) for name, values in tensors.items()}
    infos = {name: TensorInfo(array.shape, "f32") for name, array in arrays.items()}
    with open_writer(path, metadata, infos) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


DAMAGED = {
    "no tensors called NAME.in_sum2": ({"a.counts": [1]}, KEYS),
    "of type 'model', and must be": ({"a.in_sum2": [1], "a.counts": [1]}, KEYS | {"general.type": "model"}),
    "it needs a float32 tensor a.counts": ({"a.in_sum2": [1]}, KEYS),
    "a has 3 sums for 2 counts": ({"a.in_sum2": [1, 2, 3], "a.counts": [1, 2]}, KEYS),
    "a.in_sum2 has a value that is negative or not": ({"a.in_sum2": [1, np.nan], "a.counts": [1]}, KEYS),
    "a.counts has a value that is negative or not": ({"a.in_sum2": [1, 2], "a.counts": [-1]}, KEYS),
    "a has a count of 1e\\+30": ({"a.in_sum2": [1, 2], "a.counts": [1e30]}, KEYS),
    "needs imatrix.datasets, an array of strings": ({"a.in_sum2": [1], "a.counts": [1]}, {}),
    "imatrix.chunk_size, both uint32": ({"a.in_sum2": [1], "a.counts": [1]}, KEYS | {"imatrix.chunk_size": "x"}),
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_gguf_files_that_are_no_importance_matrix(problem, tmp_path):
    write_gguf(tmp_path / "imatrix.gguf", *DAMAGED[problem])
    with pytest.raises(DataError, match=problem):
        read_imatrix(tmp_path / "imatrix.gguf")


def entry(name=b"a", chunks=1, size=1, values=(1.0,)):
    return struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", chunks, size, *values)


DAMAGED_DAT = {
    "the number of tensors needs 4 bytes at byte 0, and 0 are left": b"",
    "neither begins with GGUF nor has room for 1819043176": b"hello, I am a text and no importance matrix at all",
    "nor has room for -1 tensors": struct.pack("<i", -1) + bytes(100),
    "nor has room for 0 tensors": struct.pack("<i", 0) + bytes(100),
    "the name of tensor 0 needs -5 bytes": struct.pack("<ii", 1, -5) + bytes(100),
    "the name of tensor 0 needs 2000000000 bytes at byte 8": struct.pack("<ii", 1, 2_000_000_000) + bytes(100),
    "the values of 'a' needs 4000000000 bytes": struct.pack("<i", 1) + entry(size=1_000_000_000),
    "tensor 0 is called 'a' and has -3 values from 1 chunks": struct.pack("<i", 1) + entry(size=-3),
    "tensor 0 is called 'a' and has 1 values from -1 chunks": struct.pack("<i", 1) + entry(chunks=-1),
    "tensor 1 is called 'a' and has 1 values": struct.pack("<i", 2) + entry() + entry(),
    "a has a value that is negative or not finite": struct.pack("<i", 1) + entry(values=(float("nan"),)),
}


@pytest.mark.parametrize("problem", DAMAGED_DAT)
def test_older_files_that_are_damaged(problem, tmp_path):
    (tmp_path / "imatrix.dat").write_bytes(DAMAGED_DAT[problem])
    with pytest.raises(DataError, match=problem) as error:
        read_imatrix(tmp_path / "imatrix.dat")
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_imatrix(tmp_path / "imatrix.gguf")


@pytest.mark.parametrize("write", [write_imatrix, write_dat])
def test_truncated_files(write, tmp_path):
    path = tmp_path / "imatrix"
    write(path, make_matrix())
    content = path.read_bytes()
    padding = 28 if write is write_imatrix else 0
    optional = len(content) - struct.calcsize("<ii") - len("zażółć.jsonl".encode()) if write is write_dat else -1
    for size in range(len(content) - padding):
        path.write_bytes(content[:size])
        if size != optional and size != optional + 4:  # between a field and the next
            with pytest.raises(DataError):
                read_imatrix(path)


@pytest.mark.parametrize("write", [write_imatrix, write_dat])
def test_1000_mutated_files_are_read_or_rejected_in_little_memory(write, tmp_path):
    path, chosen = tmp_path / "imatrix", random.Random(0)
    write(path, make_matrix())
    original, rejected = path.read_bytes(), 0
    tracemalloc.start()
    for _ in range(1000):
        path.write_bytes(mutate(original, chosen))
        try:
            found = read_imatrix(path)
        except DataError:
            rejected += 1
            continue
        assert all(values.isfinite().all() and (values >= 0).all() for values in found.values.values())
    assert 100 < rejected < 1000
    assert tracemalloc.get_traced_memory()[1] < 50 * len(original) + 2**20
    tracemalloc.stop()

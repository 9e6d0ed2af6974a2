from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import load as load_torch
from safetensors.torch import save as save_torch

from expo_ray.checkpoint.header import MAX_HEADER_BYTES, read_header, write_header
from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.errors import CheckpointError, InputChanged
from expo_ray.storage.protocol import FileInfo
from tests.support.stored_files import info_of, stored

KEY = "model.safetensors"


def read(data: bytes) -> dict[str, Tensor]:
    store = stored({KEY: data})
    return read_header(store, info_of(store, KEY))


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def agrees_with_library(data: bytes) -> bool:
    """Reads `data` as the safetensors library does, or refuses it; True if it was read."""
    try:
        tensors = read(data)
    except CheckpointError:
        return False
    expected = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert (tensor.dtype, list(tensor.shape)) == (expected[name]["dtype"], list(expected[name]["shape"]))
        assert data[tensor.start : tensor.start + tensor.nbytes] == bytes(expected[name]["data"])
    starts = [tensor.start for tensor in tensors.values()]
    assert starts == sorted(starts)
    return True


def test_reads_what_the_library_wrote() -> None:
    tensors = {
        "wide.é": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.zeros(0, 7),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(3),
    }
    data = save_torch(tensors, metadata={"format": "pt"})
    stored_tensors = read(data)
    assert {name: tensor.shape for name, tensor in stored_tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert agrees_with_library(data)
    assert all(tensor.file == KEY for tensor in stored_tensors.values())


def test_one_request_for_a_usual_file_and_two_for_a_long_header() -> None:
    for count, reads in ((10, 1), (4000, 2)):
        store = stored({KEY: save({f"layer.{i}": np.zeros(1000, np.float32) for i in range(count)})})
        assert len(read_header(store, info_of(store, KEY))) == count
        assert store.reads == reads
        assert store.bytes_read < 2**20


def test_a_replaced_file_is_not_read() -> None:
    store = stored({KEY: save({"w": np.zeros(2, np.float32)})})
    info = info_of(store, KEY)
    store.put(KEY, save({"w": np.ones(2, np.float32)}))
    with pytest.raises(InputChanged):
        read_header(store, info)


REFUSALS: list[tuple[bytes, str]] = [
    (b"", "truncated: 0 bytes, a safetensors file has at least 8; download it again"),
    (b"\0\0\0", "truncated: 3 bytes"),
    (file_of({}, length=MAX_HEADER_BYTES + 1), "announce a header of 100000001 bytes, the format allows 100000000"),
    (file_of({}, length=500), "truncated: the header alone needs 508 bytes, the file has 10; download it again"),
    (file_of(b""), "the header begins with b'' instead of '{'"),
    (file_of(b"\v{}"), "the header begins with"),
    (file_of(b'{"a'), "header: not valid JSON (Unterminated string"),
    (file_of(b"{\xff}"), "header: not valid JSON ('utf-8' codec"),
    (file_of(b'{"a":1} x'), "header: not valid JSON (Extra data"),
    (file_of(b'{"\\ud800":1}'), "header: not valid JSON ('utf-8' codec can't encode"),
    (file_of(b'{"a":NaN}'), "header: not valid JSON (NaN is no JSON number)"),
    (file_of(b'{"a":' + b"9" * 5000 + b"}"), "header: not valid JSON (a number of 5000 digits)"),
    (file_of(b'{"a":' * 100_000), "header: JSON nested too deeply"),
    (file_of(b'{"a":' + b"[" * 100_000), "header: JSON nested too deeply"),
    (file_of(b'{"w":{},"w":{}}'), "header: not valid JSON (the key 'w' stands twice)"),
    (file_of(b'{"w":{"shape":[1],"shape":[2]}}'), "the key 'shape' stands twice"),
    (file_of({"__metadata__": ["x"]}), "`__metadata__` is ['x'], not an object"),
    (file_of({"__metadata__": {"format": 1}}), "`__metadata__` has 'format': 1, where the format has strings"),
    (file_of({"w": 3}), "tensor w is described by 3 instead of dtype, shape and data_offsets"),
    (file_of({"w": {"dtype": "F32", "shape": []}}), "instead of dtype, shape and data_offsets"),
    (file_of({"w": {**entry()["w"], "more": [10**400]}}, b"x" * 8), "header: not valid JSON (a number of 401 digits)"),
    (file_of(entry(dtype="F31")), "tensor w: unknown dtype F31; save the checkpoint again with one of BOOL, U8"),
    (file_of(entry(dtype=["F32"])), "unknown dtype ['F32']"),
    (file_of(entry(dtype="F4")), "F4 is a quantised dtype; pass the checkpoint it was made from, in bf16"),
    (file_of(entry(dtype="F6_E2M3")), "F6_E2M3 is a quantised dtype"),
    (file_of(entry(dtype="F6_E3M2")), "F6_E3M2 is a quantised dtype"),
    (file_of(entry(shape=[-2])), "shape [-2] is not a list of whole numbers from 0"),
    (file_of(b'{"w":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "shape [-0.0] is not a list of whole numbers"),
    (file_of(entry(shape=[2.0])), "shape [2.0] is not a list of whole numbers"),
    (file_of(entry(shape=[True, 2])), "shape [True, 2] is not a list of whole numbers"),
    (file_of(entry(shape="2")), "shape 2 is not a list of whole numbers"),
    (file_of(entry(shape=[2**63])), f"shape [{2**63}] is not a list of whole numbers from 0 to 2^63-1"),
    (file_of(entry(shape=[2**40, 2**40])), f"shape [{2**40}, {2**40}] is larger than any memory"),
    (file_of(entry(shape=[0, 2**60, 2**60], offsets=[0, 0])), "is larger than any memory"),
    (file_of(entry(shape=[1] * 65, offsets=[0, 4]), b"x" * 4), "65 dimensions, at most 64 make sense"),
    (file_of(entry(offsets=[0])), "data_offsets [0] are not two whole numbers from 0"),
    (file_of(entry(offsets=[-8, 0])), "data_offsets [-8, 0] are not two whole numbers"),
    (file_of(entry(offsets=[0, "8"])), "data_offsets [0, '8'] are not two whole numbers"),
    (file_of(entry(offsets=[8, 0])), "data_offsets [8, 0] end before they begin"),
    (file_of(entry(shape=[3]), b"x" * 8), "F32 of shape [3] takes 12 bytes, data_offsets [0, 8] are 8"),
    (file_of(entry(offsets=[4, 12]), b"x" * 12), "begins at byte 4 of the data, the header ends at 0: bytes 0 to 4 belong to no tensor"),
    (
        file_of({**entry(), "v": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]}}, b"x" * 10),
        "tensor v begins at byte 6 of the data, w ends at 8: v overlaps it; save or download the file again",
    ),
    (file_of(entry(), b"x" * 7), "truncated: the header promises 77 bytes, the file has 76; download it again"),
    (file_of(entry(), b"x" * 9), "the header promises 77 bytes, the file has 78: 1 bytes past the last tensor"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer of 63 bytes, not the weights; run `git lfs pull`"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals_name_file_and_fault(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(data)
    assert message in str(caught.value)
    assert str(caught.value).startswith("memory://checkpoints/")
    assert "/model.safetensors: " in str(caught.value)


def test_every_refusal_ends_with_a_remedy() -> None:
    for data, _ in REFUSALS:
        with pytest.raises(CheckpointError, match=r"download|save|pass|git lfs pull"):
            read(data)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(CheckpointError) as caught:
        read(file_of(entry(shape=list(range(-1, 100_000)))))
    assert len(str(caught.value)) < 400


def test_a_header_of_the_largest_length_needs_no_more_than_the_file_has() -> None:
    """The length alone must not make us allocate 100 MB."""
    store = stored({KEY: file_of({}, length=MAX_HEADER_BYTES)})
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(store, info_of(store, KEY))
    assert store.bytes_read == 10


# The machine may be busy: only what is read counts, not how long it takes.
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=4)
LAYOUTS = st.lists(
    st.tuples(
        NAMES.filter(lambda name: name != "__metadata__"), st.sampled_from(sorted(DTYPE_BYTES)), SHAPES
    ),
    unique_by=lambda item: item[0],
    max_size=6,
)


def data_of(layout: list[tuple[str, str, list[int]]]) -> bytes:
    size = sum(int(np.prod(shape)) * DTYPE_BYTES[dtype] for _, dtype, shape in layout)
    return bytes(index % 251 for index in range(size))


@given(LAYOUTS)
@FUZZ
def test_written_headers_are_read_by_the_library(layout: list[tuple[str, str, list[int]]]) -> None:
    header = write_header(layout)
    assert len(header) % 8 == 0
    assert header == write_header([(name, dtype, tuple(shape)) for name, dtype, shape in layout])
    data = header + data_of(layout)
    tensors = read(data)
    kept = [(name, dtype, shape) for name, dtype, shape in layout if 0 not in shape]
    assert [(t.name, t.dtype, list(t.shape)) for t in tensors.values() if t.nbytes] == kept
    assert agrees_with_library(data)


def test_written_headers_are_loaded_by_torch_and_carry_the_format(tmp_path: Any) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5).bfloat16(),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b.weight": torch.randn(2, 2),
    }
    names = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float32: "F32"}
    header = write_header([(name, names[tensor.dtype], tensor.shape) for name, tensor in tensors.items()])
    body = b"".join(bytes(tensor.flatten().view(torch.uint8).tolist()) for tensor in tensors.values())
    loaded = load_torch(header + body)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    (tmp_path / KEY).write_bytes(header + body)
    with safetensors.safe_open(tmp_path / KEY, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_bytes_lie_where_the_header_says() -> None:
    values: dict[str, npt.NDArray[Any]] = {
        "x": np.arange(4, dtype=np.float16),
        "y": np.arange(3, dtype=np.float64),
    }
    data = save(values)
    for name, tensor in read(data).items():
        assert data[tensor.start : tensor.start + tensor.nbytes] == values[name].tobytes()


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.just(10**400)
)
JSONS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)
SMALL = st.integers(-1, 12)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BYTES, "F4", "F8_E4M3FNUZ", "f32", ""]) | JSONS,
        "shape": st.lists(SMALL | st.sampled_from([2**32, 2**63, 2**64, -0.0, 1.0]), max_size=3) | JSONS,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2) | st.lists(SMALL, max_size=3) | JSONS,
    },
    optional={"extra": JSONS},
)
HEADERS = st.dictionaries(NAMES | st.just("__metadata__"), ENTRIES | JSONS, max_size=4)


@given(HEADERS, st.binary(max_size=24), st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 200))
@FUZZ
def test_hostile_headers(header: dict[str, Any], data: bytes, length: int | None) -> None:
    agrees_with_library(file_of(header, data, length))


@given(st.binary(max_size=200), st.booleans())
@FUZZ
def test_random_bytes(noise: bytes, framed: bool) -> None:
    agrees_with_library(file_of(b"{" + noise) if framed else noise)


@given(LAYOUTS, st.data())
@FUZZ
def test_mutated_valid_files(layout: list[tuple[str, str, list[int]]], draw: st.DataObject) -> None:
    data = bytearray(write_header(layout) + data_of(layout))
    for _ in range(draw.draw(st.integers(0, 3))):
        place = draw.draw(st.integers(0, len(data) - 1))
        match draw.draw(st.sampled_from(["flip", "digit", "drop", "insert", "cut"])):
            case "flip":
                data[place] ^= 1 << draw.draw(st.integers(0, 7))
            case "digit":
                data[place] = draw.draw(st.sampled_from(b'0123456789-,:[]{}"e. '))
            case "drop" if len(data) > 1:
                del data[place]
            case "insert":
                data.insert(place, draw.draw(st.integers(0, 255)))
            case _:
                del data[max(place, 1) :]
    agrees_with_library(bytes(data))


@given(LAYOUTS)
@FUZZ
def test_valid_files_are_never_refused(layout: list[tuple[str, str, list[int]]]) -> None:
    assert agrees_with_library(write_header(layout) + data_of(layout))


TEXTS = st.text(max_size=4)
EXTRAS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)
BLANKS = st.text(" \t\r\n", max_size=9)


@given(
    LAYOUTS,
    st.sampled_from([None, {}]) | st.dictionaries(TEXTS, TEXTS, max_size=3),
    st.dictionaries(
        TEXTS.filter(lambda key: key not in {"dtype", "shape", "data_offsets"}), EXTRAS, max_size=2
    ),
    BLANKS,
    BLANKS,
)
@FUZZ
def test_what_the_library_reads_is_read(
    layout: list[tuple[str, str, list[int]]], metadata: Any, extras: dict[str, Any], before: str, after: str
) -> None:
    written = write_header(layout)
    header = json.loads(written[8:])
    header = {"__metadata__": metadata} | {
        name: entry | extras for name, entry in header.items() if name != "__metadata__"
    }
    data = file_of((before + json.dumps(header) + after).encode(), data_of(layout))
    safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    assert [(t.name, t.dtype, list(t.shape)) for t in read(data).values() if t.nbytes] == [
        (name, dtype, shape) for name, dtype, shape in layout if 0 not in shape
    ]


def test_tensors_of_equal_offset_are_ordered_by_name() -> None:
    header = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in "cab"}
    assert list(read(file_of(header | entry(offsets=[0, 8]), b"x" * 8))) == ["a", "b", "c", "w"]


def test_a_file_info_of_another_size_is_believed() -> None:
    """Size comes from the listing: a file that shrank since is met as such, not read past its end."""
    store = stored({KEY: save({"w": np.zeros(2, np.float32)})})
    real = info_of(store, KEY)
    with pytest.raises(CheckpointError, match="the header promises"):
        read_header(store, FileInfo(KEY, real.size - 1, real.etag))

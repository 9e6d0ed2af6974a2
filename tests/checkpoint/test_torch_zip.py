from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.checkpoint.tensors import Tensor
from expo_ray.checkpoint.torch_zip import RangedFile, read_torch_zip
from expo_ray.errors import CheckpointError, TransientStorageError
from tests.support.stored_files import CountingStore, stored

KEY = "pytorch_model.bin"
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "C64": torch.complex64,
}  # fmt: skip


def saved(state: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def read(data: bytes) -> tuple[dict[str, Tensor], CountingStore]:
    store = stored({KEY: data})
    return read_torch_zip(store, store.stat(KEY)), store


def refusal(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(data)
    assert str(caught.value).startswith("memory://checkpoints/")
    assert "/pytorch_model.bin: " in str(caught.value)
    return str(caught.value)


def assert_ranges(state: dict[str, torch.Tensor], data: bytes) -> dict[str, Tensor]:
    """The ranges of the file hold exactly the bytes of what was saved."""
    tensors, _ = read(data)
    assert set(tensors) == set(state)
    for name, tensor in tensors.items():
        expected = state[name].detach()
        assert tensor.shape == tuple(expected.shape)
        assert DTYPES[tensor.dtype] == expected.dtype
        raw = data[tensor.start : tensor.start + tensor.nbytes]
        assert raw == bytes(
            expected.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.nbytes else []
        )
    return tensors


def test_byte_ranges_of_every_dtype() -> None:
    state = {name: torch.arange(24).reshape(2, 3, 4).to(dtype) for name, dtype in DTYPES.items()}
    assert_ranges(state, saved(state))


def test_views_parameters_scalars_and_shared_storage() -> None:
    base = torch.arange(1000, dtype=torch.float32)
    state: dict[str, torch.Tensor] = OrderedDict(
        whole=base,
        view=base[10:30].view(4, 5),
        tail=base[-7:],
        same=base,
        parameter=torch.nn.Parameter(torch.randn(3, 3)),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 4),
        last=torch.ones(5, dtype=torch.bfloat16),
    )
    tensors = assert_ranges(state, saved(state))
    assert tensors["whole"].start == tensors["same"].start
    assert tensors["view"].start == tensors["whole"].start + 40
    starts = [tensor.start for tensor in tensors.values()]
    assert starts == sorted(starts)


def test_a_module_s_state_dict_with_tied_weights() -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False), torch.nn.BatchNorm1d(3)
    )
    model[1].weight = model[0].weight
    tensors = assert_ranges(model.state_dict(), saved(model.state_dict()))
    assert tensors["0.weight"].start == tensors["1.weight"].start


def test_files_of_older_torch_without_stored_alignment() -> None:
    """Before 2.7 the offsets were not computed but read from each record's header."""
    state = {f"w{i}": torch.full((i * 7 + 1,), i, dtype=torch.bfloat16) for i in range(40)}
    data = bytearray(saved(state))
    data = data.replace(b".format_version", b".format_versioX")
    assert_ranges(state, bytes(data))


def test_files_saved_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        data = saved(state)
    assert b"cuda:0" in data
    assert_ranges(state, data)


def test_only_the_directory_and_the_pickle_are_read() -> None:
    state = {f"layer.{i}.weight": torch.zeros(4096, 16) for i in range(300)}
    data = saved(state)
    tensors, store = read(data)
    assert len(tensors) == 300
    assert store.reads <= 8
    assert store.bytes_read < len(data) / 100


def test_a_folder_with_the_flag(tmp_path: Path) -> None:
    first, second = {"a": torch.randn(3), "b": torch.randn(2, 2)}, {"c": torch.randn(4)}
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00001-of-00002.bin",
                            "c": "pytorch_model-00002-of-00002.bin"}}  # fmt: skip
    store = stored({
        "config.json": {}, "pytorch_model.bin.index.json": index, "training_args.bin": b"",
        "pytorch_model-00001-of-00002.bin": saved(first), "pytorch_model-00002-of-00002.bin": saved(second),
    })  # fmt: skip
    checkpoint = read_checkpoint(store, allow_pickle=True)
    for name, expected in {**first, **second}.items():
        tensor = checkpoint.tensors[name]
        raw = store.read(tensor.file)[tensor.start : tensor.start + tensor.nbytes]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).view(tensor.shape), expected)
    assert set(checkpoint.files) == {
        "config.json", "pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)),
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="`allow_pickle: true`"):
        read_checkpoint(store)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_without_running(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = saved({"w": torch.zeros(2), "x": Evil(marker)})
    message = refusal(data)
    assert "refused by PyTorch's restricted unpickler, which runs no code (UnpicklingError" in message
    assert "convert it to safetensors if you trust where it comes from" in message
    assert "posix.system" in message
    assert "Weights only load failed" not in message
    assert not marker.exists()
    # The file is malicious indeed: the unrestricted unpickler runs it.
    torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


def test_legacy_files_are_refused() -> None:
    data = saved({"w": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    assert (
        "not a zip file as PyTorch writes it, perhaps a file from before PyTorch 1.6; convert it"
        in refusal(data)
    )
    assert "a Git LFS pointer; run `git lfs pull`" in refusal(b"version https://git-lfs.github.com/spec/v1\n")
    assert "not a zip file" in refusal(b"")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state_dict": {"w": torch.zeros(2)}}, "'state_dict' is a dict, not a tensor; save `model.state_dict()` alone"),
        ({"w": torch.zeros(2), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({3: torch.zeros(2)}, "3 is a "),
        ([torch.zeros(2)], "holds a list, not a state dict"),
        (torch.zeros(2), "not a state dict; save `model.state_dict()` alone"),
        ({"w": torch.zeros(3, 4).T}, "tensor w: shape [4, 3] with strides [1, 4] is not contiguous; save `tensor.contig"),
        ({"w": torch.zeros(3).expand(2, 3)}, "tensor w: shape [2, 3] with strides [0, 1] is not contiguous"),
        ({"w": torch.zeros(8)[::2]}, "is not contiguous"),
        ({"w": torch.eye(3).to_sparse()}, "tensor w: torch.sparse_coo, torch.float32 is not a plain dense tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "torch.complex128 is not a plain dense tensor; convert it"),
        ({"w": torch.zeros(2, dtype=torch.complex64).conj()}, "is not contiguous"),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused_by_name(state: Any, message: str) -> None:
    assert message in refusal(saved(state))


def rewritten(
    data: bytes, change: Callable[[str, bytes], bytes] = lambda _, content: content, packed: int = 0
) -> bytes:
    """The same archive written by another zip writer."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", packed) as target:
        for record in source.infolist():
            target.writestr(
                zipfile.ZipInfo(record.filename), change(record.filename, source.read(record)), packed
            )
    return out.getvalue()


def test_archives_of_other_writers_are_refused_or_right() -> None:
    state = {"a": torch.arange(7.0), "b": torch.arange(9.0)}
    data = saved(state)
    assert "is compressed); convert it to safetensors" in refusal(
        rewritten(data, packed=zipfile.ZIP_DEFLATED)
    )
    big = rewritten(data, lambda name, content: b"big" if name.endswith("byteorder") else content)
    assert "saved on a big-endian machine; convert it to safetensors" in refusal(big)
    # Without alignment the offsets that PyTorch computes are wrong, and must not be believed.
    assert "are not where PyTorch would have written them" in refusal(rewritten(data))


def test_a_small_record_that_unpacks_to_gigabytes_is_never_unpacked() -> None:
    data = saved({"w": torch.zeros(2)})
    bomb = rewritten(
        data,
        lambda name, content: b"\0" * 2**24 if name.endswith("byteorder") else content,
        zipfile.ZIP_DEFLATED,
    )
    place = bomb.rindex(b"archive/byteorder") - 22  # unpacked size in the directory
    lying = bomb[:place] + struct.pack("<I", 6) + bomb[place + 4 :]
    assert "is compressed" in refusal(lying)


def test_a_directory_is_bounded() -> None:
    out = io.BytesIO(saved({"w": torch.zeros(2)}))
    with zipfile.ZipFile(out, "a") as archive:
        for number in range(300):
            archive.writestr(f"archive/{number:05}{'x' * 60_000}", b"")
    assert "asks to read" in refusal(out.getvalue())


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800"])
def test_names_that_no_safetensors_file_can_hold_are_refused(name: str) -> None:
    assert "which no safetensors file can hold; rename it" in refusal(saved({name: torch.zeros(2)}))


def test_a_record_that_stands_twice_is_refused() -> None:
    out = io.BytesIO(saved({"a": torch.arange(7.0)}))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(out, "a") as archive:
        archive.writestr("archive/data/0", b"x" * 28)
    assert "a record stands in it twice" in refusal(out.getvalue())


def test_a_storage_larger_than_its_record_is_refused() -> None:
    """The pickle claims more elements than the record holds; the next tensor's bytes must not be taken for them."""
    data = saved({"a": torch.zeros(8, dtype=torch.uint8), "b": torch.zeros(200)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        program = archive.read("archive/data.pkl")
    eight, more = pickle.BININT1 + b"\x08", pickle.BININT1 + b"\x7f"
    claimed = program.replace(eight, more)
    assert claimed.count(more) == 2  # the storage's length and the tensor's shape
    old, new = (struct.pack("<I", zlib.crc32(content)) for content in (program, claimed))
    forged = data.replace(program, claimed).replace(old, new)
    assert torch.load(io.BytesIO(forged), weights_only=True, map_location="meta")["a"].shape == (127,)
    assert (
        "tensor a: bytes 0 to 127 of its storage are not where PyTorch would have written them (8 bytes"
        in refusal(forged)
    )


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_files_are_refused_or_in_bounds(draw: st.DataObject) -> None:
    data = bytearray(VALID)
    for _ in range(draw.draw(st.integers(1, 3))):
        place = draw.draw(
            st.integers(0, len(data) - 1) | st.integers(0, 900) | st.integers(len(VALID) - 900, len(VALID))
        )
        place = min(place, len(data) - 1)
        if draw.draw(st.booleans()):
            data[place] = draw.draw(st.integers(0, 255))
        elif place > 4:
            del data[place:]
    try:
        tensors, _ = read(bytes(data))
    except CheckpointError:
        return
    for tensor in tensors.values():
        assert 0 <= tensor.start <= tensor.start + tensor.nbytes <= len(data)


VALID = saved(
    {"a": torch.arange(7.0), "b": torch.arange(9).view(3, 3), "c": torch.ones(2, dtype=torch.bfloat16)}
)


def test_ranged_file_is_a_file() -> None:
    content = bytes(range(256)) * 1024
    store = stored({KEY: content})
    file, real = RangedFile(store, store.stat(KEY)), io.BytesIO(content)
    for offset, whence, size in [
        (0, 0, 4),
        (-22, 2, 22),
        (65530, 0, 20),
        (5, 1, 131072),
        (-1, 2, 9),
        (300000, 0, 3),
    ]:
        assert file.seek(offset, whence) == real.seek(offset, whence)
        assert file.read(size) == real.read(size)
        assert file.tell() == real.tell()
    file.seek(0)
    buffer = bytearray(70000)
    assert file.readinto(buffer) == 70000
    assert buffer == content[:70000]
    with pytest.raises(OSError, match="before the start"):
        file.seek(-1)


def test_a_store_that_fails_is_not_taken_for_a_damaged_file() -> None:
    class Failing(CountingStore):
        """Fails at each read in turn."""

        fails_at = 0

        def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
            super().read_into(key, start, out, etag=etag)
            if self.reads == self.fails_at:
                raise TransientStorageError("no answer")

    data = saved({f"w{i}": torch.zeros(4096, 16) for i in range(20)})
    source = stored(
        {KEY: data.replace(b".format_version", b".format_versioX")}
    )  # every record's header is read
    for fails_at in (1, 2, 3, 10):
        store = Failing(source.uri)
        store.fails_at = fails_at
        with pytest.raises(TransientStorageError, match="no answer"):
            read_torch_zip(store, store.stat(KEY))


def test_a_huge_read_is_refused_before_it_allocates() -> None:
    class Huge(CountingStore):
        def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
            raise AssertionError("nothing may be read")

    store = Huge(stored({KEY: b""}).uri)
    info = store.stat(KEY)
    file = RangedFile(store, type(info)(KEY, 2**40, info.etag))
    with pytest.raises(CheckpointError, match="asks to read 1099511627776 bytes of header"):
        file.read()

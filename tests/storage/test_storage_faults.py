"""S3 through a network that breaks: the same bytes or a named error, and nothing half-written left behind."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.local_s3 import SeaweedFS
from expo_ray.errors import AlreadyExists, InputChanged, NotFound, StorageError, TransientStorageError
from expo_ray.storage import FileInfo, Store, connection, forget_stores, object_writer, open_store, retry
from expo_ray.storage.retry import ATTEMPTS, read_agreed, retry_transient
from tests.support.fault_proxy import Action, Fault, FaultProxy

pytestmark = pytest.mark.s3

MIB = 1 << 20
BIG = random.Random(5).randbytes(11 * MIB + 5)  # three parts of the least size that S3 allows
ALWAYS = 1_000_000
LOST = [
    Action.SLOW_DOWN,
    Action.RESET,
    Action.RESET_BODY,
    Action.TRUNCATE,
    Action.STALL,
    Action.STALL_BODY,
    Action.LOSE_ACK,
]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(connection, "SILENCE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 3.0)
    monkeypatch.setattr(object_writer, "LARGEST_PART_BYTES", 5 * MIB)


@pytest.fixture
def proxy(s3_server: SeaweedFS, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forget_stores()
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, s3_uri: str) -> Store:
    """A store behind the proxy."""
    return open_store(s3_uri)


@pytest.fixture
def sane(store: Store, proxy: FaultProxy, s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same folder, reached directly."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    forget_stores()
    return open_store(store.uri)


def _write(store: Store, key: str, data: bytes) -> FileInfo:
    with store.writer(key, len(data)) as writer:
        for start in range(0, len(data), MIB):
            writer.write(memoryview(data)[start : start + MIB])
        return writer.commit()


# --- reading


@pytest.mark.parametrize("action", [*LOST, Action.FLIP_READ])
def test_a_read_survives(store: Store, proxy: FaultProxy, action: Action) -> None:
    etag = store.put("model", BIG).etag
    proxy.inject(Fault(action, "GET", "model"))
    out = bytearray(4 * MIB)
    store.read_into("model", 3 * MIB, memoryview(out), etag=etag)
    assert out == BIG[3 * MIB : 7 * MIB]
    assert [entry[0] for entry in proxy.log] == [action]
    proxy.inject(Fault(action, "GET", "model", skip=1))
    assert store.read("model") == BIG
    assert [entry[0] for entry in proxy.log] == [action]


@pytest.mark.parametrize("action", [Action.SLOW_DOWN, Action.RESET, Action.TRUNCATE, Action.LOSE_ACK])
def test_stat_and_list_survive(store: Store, proxy: FaultProxy, action: Action) -> None:
    info = store.put("model", b"data")
    proxy.inject(Fault(action, "HEAD"), Fault(action, "GET", "list-type"))
    assert store.stat("model") == info
    assert store.list() == [info]
    assert len(proxy.log) >= 1


@pytest.mark.parametrize("action", LOST)
def test_a_read_that_never_succeeds_is_given_up(store: Store, proxy: FaultProxy, action: Action) -> None:
    etag = store.put("model", BIG).etag
    proxy.inject(Fault(action, "GET", "model", times=ALWAYS))
    with pytest.raises(TransientStorageError, match=f"{store.uri}/model: .*asked {ATTEMPTS} times"):
        store.read_into("model", 0, memoryview(bytearray(MIB)), etag=etag)
    assert len(proxy.log) == ATTEMPTS


def test_an_input_replaced_while_it_is_read_stops_the_job(
    store: Store, sane: Store, proxy: FaultProxy
) -> None:
    etag = sane.put("model", BIG).etag
    store.read_into("model", 0, memoryview(bytearray(MIB)), etag=etag)
    sane.put("model", bytes(len(BIG)))
    with pytest.raises(InputChanged, match=f"{store.uri}/model was replaced"):
        store.read_into("model", MIB, memoryview(bytearray(MIB)), etag=etag)


def test_bytes_count_once_two_reads_in_a_row_agree() -> None:
    def agreed(*contents: bytes) -> bytes:
        waiting = iter(contents)
        return read_agreed(lambda: next(waiting), lambda data: next(waiting) == data, "x")

    assert agreed(b"right", b"right") == b"right"
    assert agreed(b"wrong", b"right", b"right", b"right") == b"right"
    assert agreed(b"right", b"wrong", b"right", b"right") == b"right"
    with pytest.raises(TransientStorageError, match="x: reads of the same bytes differ"):
        agreed(*(b"%d" % number for number in range(20)))


def test_only_transient_errors_are_asked_again() -> None:
    asked = []

    def ask() -> None:
        asked.append(1)
        raise NotFound("gone")

    with pytest.raises(NotFound):
        retry_transient(ask)
    assert len(asked) == 1


# --- small objects


@pytest.mark.parametrize("action", [*LOST, Action.FLIP_WRITE])
def test_a_put_survives(store: Store, sane: Store, proxy: FaultProxy, action: Action) -> None:
    proxy.inject(Fault(action, "PUT"))
    info = store.put("receipt.json", b"receipt" * 100)
    assert len(proxy.log) == 1
    assert sane.stat("receipt.json") == info
    assert sane.read("receipt.json") == b"receipt" * 100


@pytest.mark.parametrize("action", [*LOST, Action.FLIP_WRITE, Action.CONFLICT])
def test_a_put_if_absent_survives(store: Store, sane: Store, proxy: FaultProxy, action: Action) -> None:
    proxy.inject(Fault(action, "PUT"))
    info = store.put_if_absent("claim.json", b"mine")
    assert len(proxy.log) == 1
    assert sane.stat("claim.json") == info
    assert sane.read("claim.json") == b"mine"


@pytest.mark.parametrize("action", [*LOST, Action.CONFLICT])
def test_a_put_if_absent_never_takes_a_taken_key(
    store: Store, sane: Store, proxy: FaultProxy, action: Action
) -> None:
    sane.put("claim.json", b"theirs")
    proxy.inject(Fault(action, "PUT"))
    with pytest.raises(AlreadyExists, match=r"claim\.json"):
        store.put_if_absent("claim.json", b"mine")
    assert sane.read("claim.json") == b"theirs"


def test_a_delete_survives(store: Store, sane: Store, proxy: FaultProxy) -> None:
    sane.put("a", b"a")
    proxy.inject(Fault(Action.LOSE_ACK, "DELETE"))
    store.delete("a")
    assert sane.list() == []


# --- uploads

# An upload whose beginning was never acknowledged has an id that nobody knows.
BEGUN_UNHEARD = {
    ("begin", action) for action in (Action.LOSE_ACK, Action.RESET_BODY, Action.TRUNCATE, Action.STALL_BODY)
}
REQUESTS = {
    "begin": ("POST", r"\?uploads"),
    "part": ("PUT", "partNumber=2"),
    "complete": ("POST", "uploadId="),
}


@pytest.mark.parametrize("harm", [*itertools.product(REQUESTS, [*LOST, Action.FLIP_WRITE])], ids="-".join)
def test_an_upload_survives_or_leaves_nothing(
    store: Store,
    sane: Store,
    proxy: FaultProxy,
    pending_uploads: Callable[[str], list[str]],
    harm: tuple[str, Action],
) -> None:
    step, action = harm
    proxy.inject(Fault(action, *REQUESTS[step]))
    failure = ""
    try:
        _write(store, "model", BIG)
    except TransientStorageError as error:
        failure = str(error)
    if failure:
        assert f"{store.uri}/model" in failure
        assert sane.list() == []
    else:
        assert sane.read("model") == BIG
    assert proxy.log
    if harm not in BEGUN_UNHEARD:
        assert pending_uploads(store.uri) == []
    proxy.inject()
    assert _write(store, "model", BIG) == sane.stat("model")


@pytest.mark.parametrize("action", [Action.SLOW_DOWN, Action.RESET, Action.FLIP_WRITE])
def test_an_upload_that_never_succeeds_is_given_up(
    store: Store, sane: Store, proxy: FaultProxy, pending_uploads: Callable[[str], list[str]], action: Action
) -> None:
    before = sane.put("model", b"before")
    proxy.inject(Fault(action, "PUT", "partNumber", times=ALWAYS))
    with pytest.raises(TransientStorageError, match=f"{store.uri}/model"):
        _write(store, "model", BIG)
    assert pending_uploads(store.uri) == []
    assert sane.list() == [before]


def test_an_upload_completed_unheard_is_found(store: Store, sane: Store, proxy: FaultProxy) -> None:
    # Asked to complete an upload for the second time, some stores know it no longer.
    complete = REQUESTS["complete"]
    proxy.inject(Fault(Action.LOSE_ACK, *complete), Fault(Action.NO_SUCH_UPLOAD, *complete, times=ALWAYS))
    assert _write(store, "model", BIG) == sane.stat("model")
    assert {entry[0] for entry in proxy.log} == {Action.LOSE_ACK, Action.NO_SUCH_UPLOAD}
    assert sane.read("model") == BIG


def test_an_upload_that_vanished_is_not_taken_for_what_was_there(
    store: Store, sane: Store, proxy: FaultProxy
) -> None:
    before = sane.put("model", bytes(len(BIG)))
    proxy.inject(Fault(Action.NO_SUCH_UPLOAD, *REQUESTS["complete"], times=ALWAYS))
    with pytest.raises(TransientStorageError, match="NoSuchUpload"):
        _write(store, "model", BIG)
    assert sane.list() == [before]


def test_an_error_in_the_pipeline_aborts_the_upload(
    store: Store, sane: Store, pending_uploads: Callable[[str], list[str]]
) -> None:
    writer = store.writer("model", len(BIG))
    writer.write(BIG[: 10 * MIB])
    deadline = time.monotonic() + 30  # the upload begins in the background
    while not pending_uploads(store.uri) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pending_uploads(store.uri)) == 1
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert pending_uploads(store.uri) == []
    assert sane.list() == []


def test_parts_grow_so_that_no_upload_needs_more_than_the_store_allows(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_writer, "MAX_PARTS", 2)
    proxy.inject()
    _write(store, "model", BIG)
    assert len({target for method, target in proxy.requests if method == "PUT"}) == 2
    assert store.read("model") == BIG


def test_a_killed_server_costs_time_and_no_bytes(
    s3_server: SeaweedFS, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 30)  # a server that many tests have filled takes a while
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.5)
    monkeypatch.setattr(retry, "LONGEST_DELAY_S", 1.0)
    store = open_store(s3_uri)
    etag = _write(store, "model", BIG).etag
    restart = threading.Timer(0.3, s3_server.start)
    s3_server.kill()
    restart.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda start: _check_range(store, start, etag), range(0, 8 * MIB, MIB)))
    finally:
        restart.join()
    assert store.read("model") == BIG


def _check_range(store: Store, start: int, etag: str) -> None:
    out = bytearray(MIB)
    store.read_into("model", start, memoryview(out), etag=etag)
    assert out == BIG[start : start + MIB]


# --- what only the user can fix


def _everything(store: Store) -> Iterator[Callable[[], object]]:
    yield store.list
    yield lambda: store.stat("model")
    yield lambda: store.read("model")
    yield lambda: store.read_into("model", 0, memoryview(bytearray(4)), etag='"x"')
    yield lambda: store.put("model", b"data")
    yield lambda: store.put_if_absent("model", b"data")
    yield lambda: _write(store, "model", b"data")
    yield lambda: _write(store, "model", BIG)
    yield lambda: store.delete("model")


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "stranger")]
)
def test_refused_credentials_name_bucket_and_remedy(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    forget_stores()
    for use in _everything(open_store(s3_uri)):
        with pytest.raises(
            StorageError, match=rf"{s3_uri}.*'expo-ray' at http://127.*(AWS_|credentials)"
        ) as caught:
            use()
        assert not isinstance(caught.value, TransientStorageError)
        assert "Debug source" not in str(caught.value)


def test_missing_credentials_name_the_remedy(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_stores()
    with pytest.raises(StorageError, match=r"s3://expo-ray: no AWS credentials found; set AWS_ACCESS_KEY_ID"):
        open_store(s3_uri)


def test_a_missing_bucket_is_named(aws_environment: dict[str, str]) -> None:
    store = open_store("s3://no-such-bucket/folder")
    uses = list(_everything(store))[:-1]  # deleting what is not there is no error
    for use in uses:
        with pytest.raises(
            NotFound, match=r"s3://no-such-bucket/folder.* bucket 'no-such-bucket' at http://127"
        ):
            use()


def test_an_endpoint_that_does_not_answer_is_named(
    s3_uri: str, aws_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    forget_stores()
    with pytest.raises(
        TransientStorageError, match=r"no complete answer from http://127.0.0.1:1 \(Connection refused\)"
    ):
        open_store(s3_uri).stat("model")

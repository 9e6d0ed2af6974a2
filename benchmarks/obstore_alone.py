"""Move the bytes of an extrapolation with obstore alone, in a separate process: the lower bound for `s3.py`.

Reads every byte of both parents in ranges and writes dpo's into one object, with the range size, part size and requests in
flight that expo-ray uses.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import TYPE_CHECKING

from expo_ray.storage.object_writer import LARGEST_PART_BYTES, PARTS_IN_FLIGHT
from expo_ray.storage.s3_store import S3Store

if TYPE_CHECKING:
    from obstore import Bytes, WritableFile
    from obstore.store import S3Store as Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bucket", "sft", "dpo", "output"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    client = _client(arguments.bucket)
    started, cpu = time.monotonic(), time.process_time()
    _move(client, arguments.sft, arguments.dpo, arguments.output)
    print(json.dumps({"seconds": time.monotonic() - started, "cpu_s": time.process_time() - cpu}))


def _client(bucket: str) -> Client:
    from obstore.store import S3Store as Client

    return Client(
        bucket,
        region=os.environ["AWS_REGION"],
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        checksum_algorithm="SHA256",
        client_options={"allow_http": True},
    )


def _move(client: Client, sft: str, dpo: str, output: str) -> None:
    import obstore

    def read(path: str, start: int, length: int) -> Bytes:
        return obstore.get_range(client, path, start=start, length=length)

    written = obstore.open_writer(
        client, output, buffer_size=LARGEST_PART_BYTES, max_concurrency=PARTS_IN_FLIGHT
    )
    with ThreadPoolExecutor(S3Store.concurrency) as pool, written as file:
        reading: deque[tuple[bool, Future[Bytes]]] = deque()
        # In turns, as an extrapolation needs them.
        sides = (_ranges(client, folder) for folder in (dpo, sft))
        for of_dpo, of_sft in zip_longest(*sides):
            reading += [
                (part is of_dpo, pool.submit(read, *part)) for part in (of_dpo, of_sft) if part is not None
            ]
            while len(reading) > S3Store.concurrency:
                _write_next(reading, file)
        while reading:
            _write_next(reading, file)


def _ranges(client: Client, folder: str) -> Iterator[tuple[str, int, int]]:
    """Path, start and length of every range of a folder's weights."""
    import obstore

    for meta in obstore.list(client, folder).collect():
        if meta["path"].endswith(".safetensors"):
            for start in range(0, meta["size"], S3Store.chunk_bytes):
                yield meta["path"], start, min(S3Store.chunk_bytes, meta["size"] - start)


def _write_next(reading: deque[tuple[bool, Future[Bytes]]], file: WritableFile) -> None:
    wanted, future = reading.popleft()
    data = future.result()
    if wanted:
        file.write(data)


if __name__ == "__main__":
    main()

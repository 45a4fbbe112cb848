"""What `scripts/bench` compares the harness with, each as one process: bench_peers.py NAME FILE...

read        read the bytes into memory that stays in the cache, and touch them, on all cores
touch       touch the bytes that come by standard input
blake3      BLAKE3 of each 4 MiB, read by `pread` into one buffer a thread, on all cores
blake3-map  the blake3 package's own way: one digest of the mapped file, on all its threads
allclose    torch.load of two files, torch.allclose of all tensors; allclose-1 on one thread
close       the same by torch.testing.assert_close
signing     model_signing's hashing of a file as it is by default (SHA-256); signing-shards in
            parallel shards by BLAKE3
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

PIECE_NBYTES = 4 << 20


def on_all_cores(paths: list[str], use: Callable[[memoryview], object]) -> None:
    """Read all files in pieces, each used on the thread that reads it; raises what one raises."""
    import numpy as np  # whose large arrays lie in large pages, as the harness's buffers do

    pieces = []
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        pieces += [(descriptor, start) for start in range(0, size, PIECE_NBYTES)]
    queue, lock = iter(pieces), threading.Lock()
    failures: list[Exception] = []

    def run() -> None:
        buffer = np.empty(PIECE_NBYTES, "u1").data
        try:
            while not failures:
                with lock:
                    piece = next(queue, None)
                if piece is None:
                    return
                use(buffer[: os.preadv(piece[0], [buffer], piece[1])])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:  # else what was not done would be timed
        raise failures[0]


def touch(data: memoryview) -> None:
    import numpy as np

    np.frombuffer(data, "u1").max()


def read(*paths: str) -> None:
    on_all_cores(list(paths), touch)


def touch_input() -> None:
    buffer = memoryview(bytearray(1 << 20))
    while count := sys.stdin.buffer.raw.readinto(buffer):  # type: ignore[attr-defined]
        touch(buffer[:count])


def blake3_pieces(path: str) -> None:
    from blake3 import blake3

    on_all_cores([path], lambda data: blake3(data).digest())


def blake3_map(path: str) -> None:
    from blake3 import blake3

    blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


def torch_allclose(expected: str, actual: str, num_threads: int | None = None) -> None:
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    one, other = (torch.load(path, map_location="cpu") for path in (expected, actual))
    assert all(torch.allclose(other[k], v, rtol=1e-5, atol=1e-5) for k, v in one.items())


def torch_assert_close(expected: str, actual: str) -> None:
    import torch

    one, other = (torch.load(path, map_location="cpu") for path in (expected, actual))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def signing(path: str) -> None:
    import model_signing

    model_signing.hashing.Config().hash(path)


def signing_shards(path: str) -> None:
    import model_signing

    config = model_signing.hashing.Config()
    config.use_shard_serialization(hashing_algorithm="blake3").hash(path)


PEERS: dict[str, Callable[..., None]] = {
    "read": read,
    "touch": touch_input,
    "blake3": blake3_pieces,
    "blake3-map": blake3_map,
    "allclose": torch_allclose,
    "allclose-1": lambda *paths: torch_allclose(*paths, num_threads=1),
    "close": torch_assert_close,
    "signing": signing,
    "signing-shards": signing_shards,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](*sys.argv[2:])

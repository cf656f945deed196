"""The pool of shared memory lends each slot to one tensor at a time; workers outlive signals but not their parent."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from ca2cl.data.loading.workers import Pixels, TilePool, TileWorkers
from ca2cl.errors import InputError
from tests.support.forked import CODE, Forked
from tests.support.jobs import ROOT


class Numbered:
    """Fills every pixel with the request's number; its answer is the process that did it."""

    def __init__(self, fails_at: int = -1, dies_at: int = -1) -> None:
        self.fails_at, self.dies_at = fails_at, dies_at

    def rows(self, request: int) -> int:
        return 1 + request % 3

    def __call__(self, request: int, tiles_RHWC: Pixels) -> int:
        if request == self.fails_at:
            raise InputError("one line")
        if request == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        assert tiles_RHWC.shape == (1 + request % 3, 4, 4, 3)
        tiles_RHWC[...] = request % 251
        return os.getpid()


def answers(workers: int, count: int = 60, work: Numbered | None = None) -> Generator[tuple[int, Tensor], None, None]:
    return TileWorkers(work or Numbered(), 3, (4, 4), workers).answers(range(count))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_answers_come_in_order_whether_kept_or_dropped(workers: int) -> None:
    kept = [tiles for _, tiles in answers(workers)]
    for number, tiles in enumerate(kept):
        assert tiles.shape == (1 + number % 3, 4, 4, 3) and (tiles == number).all()
    for number, (pid, tiles) in enumerate(answers(workers, 400)):
        assert (tiles == number % 251).all()
        assert (pid == os.getpid()) == (workers == 0)


def test_memory_is_not_reused_while_any_view_of_it_lives() -> None:
    views = []
    for number, (_, tiles) in enumerate(answers(1)):
        if number in (0, 7, 20):
            views.append((number, tiles[:1].flatten()[3:9], tiles[0].numpy()))
    assert len(views) == 3
    for number, view, array in views:
        assert (view == number).all() and (array == number).all()


def of_three_requests(workers: int) -> TileWorkers[int, int]:
    """Batches of 1, 2 and 3 rows after one another."""
    return TileWorkers(Numbered(), 6, (4, 4), workers, requests=3)


def requests(batches: int) -> Iterator[range]:
    return (range(3 * number, 3 * number + 3) for number in range(batches))


def pixels(batch: int) -> Tensor:
    numbers = torch.arange(3 * batch, 3 * batch + 3) % 251
    return torch.repeat_interleave(numbers, torch.tensor([1, 2, 3])).byte()[:, None, None, None].expand(6, 4, 4, 3)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_batch_is_never_written_to_while_it_is_in_use(workers: int) -> None:
    """One of thirty is held, as a copy to a GPU holds it, while twenty others come and go in the same memory."""
    running = of_three_requests(workers)
    pool = running._pool
    in_pool, held = 0, torch.empty(0)
    for number, (pids, tiles) in enumerate(running.batches(requests(300))):
        assert torch.equal(tiles, pixels(number))
        assert len(pids) == 3 and (set(pids) == {os.getpid()}) == (workers == 0)
        in_pool += np.shares_memory(tiles.numpy(), pool._slots)
        if number % 30 == 1:
            held = tiles[1:5]
        elif number % 30 == 21:
            assert torch.equal(held, pixels(number - 20)[1:5])
            held = torch.empty(0)
    assert in_pool > 100


def test_more_batches_than_slots_may_be_held() -> None:
    for number, (_, tiles) in enumerate(list(of_three_requests(2).batches(requests(30)))):
        assert torch.equal(tiles, pixels(number))


class Driver:
    """CUDA's calls, where there is no CUDA: notes what is page-locked."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.locked, self.calls = error, dict[int, int](), 0

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls += 1
        if not self.error:
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802 - CUDA's name
        assert Path("/proc/self/maps").read_text().count(f"{address:x}-")  # still mapped
        del self.locked[address]


def test_a_pool_is_page_locked_once_and_until_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    pool = TilePool(2, 3, (64, 64), pin=True)
    assert not driver.locked
    tensors = [pool.lend(pool.take(), 2) for _ in range(2)]
    assert driver.calls == 1 and list(driver.locked.values()) == [2 * 3 * 64 * 64 * 3]
    (address,) = driver.locked
    assert sorted(x.data_ptr() - address for x in tensors) == [0, 3 * 64 * 64 * 3]
    del pool
    tensors.pop()
    gc.collect()
    assert driver.locked
    tensors.pop()
    gc.collect()
    assert not driver.locked


def test_memory_that_cannot_be_page_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(error=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    running = TileWorkers(Numbered(), 3, (4, 4), 0, pin=True)
    assert [int(tiles[0, 0, 0, 0]) for _, tiles in running.answers(range(9))] == list(range(9))
    assert driver.calls == 1 and "cannot be page-locked (CUDA error 2)" in caplog.text


def test_a_slot_is_free_again_when_its_tensor_is_gone() -> None:
    pool = TilePool(2, 3, (4, 4))
    first, second = pool.take(), pool.take()
    assert {first, second} == {0, 1} and pool.take() == -1
    pool.rows(second, 3)[...] = 9
    tensor = pool.lend(second, 2)
    view = tensor[1:]
    del tensor
    gc.collect()
    assert pool.take() == -1 and (view == 9).all()
    del view
    gc.collect()
    assert pool.take() == second


def test_slots_come_back_from_an_iteration_that_was_broken_off() -> None:
    running = TileWorkers(Numbered(), 3, (4, 4), 2)
    pool = running._pool
    assert pool is not None
    for _ in range(3):
        with closing(running.answers(range(1000))) as found:
            next(found)
            next(found)
    gc.collect()
    assert sorted(pool._free) == list(range(6))
    assert [int(tiles[0, 0, 0, 0]) for _, tiles in running.answers(range(20))] == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_input_error_keeps_its_one_line(workers: int) -> None:
    found = answers(workers, work=Numbered(fails_at=5))
    assert [int(next(found)[1][0, 0, 0, 0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=r"\Aone line\Z"):
        next(found)


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.loky")}  # joblib's


def leaked(before: set[str]) -> set[str]:
    """New files of shared memory that no process has mapped: other programs of this machine make some, too."""
    new, maps = shared_files() - before, ""
    for process in Path("/proc").glob("[0-9]*") if new else ():
        with suppress(OSError):
            maps += (process / "maps").read_text()
    return {name for name in new & shared_files() if f"/dev/shm/{name}" not in maps}


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    before = shared_files()
    # torch tells it by a RuntimeError, unless it was just fetching a tensor from that worker
    with pytest.raises((RuntimeError, EOFError, ConnectionError)):
        list(answers(1, work=Numbered(dies_at=5)))
    assert not leaked(before)


def test_workers_outlive_the_first_sigterm_and_ctrl_c() -> None:
    with closing(answers(2, 400)) as found:
        workers = {next(found)[0] for _ in range(4)}
        for pid in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(pid, number)
        assert sum(1 for _ in found) == 396
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_pool_is_not_under_dev_shm() -> None:
    """A container's /dev/shm is 64 MB by default; running out of it is a bus error in a worker."""
    before = shared_files()
    pool = TilePool(4, 16, (64, 64))
    pool.rows(0, 16)[...] = 1
    mapped = Path("/proc/self/maps").read_text()
    assert not any(f"/dev/shm/{name}" in mapped for name in shared_files() - before)
    assert torch.equal(pool.lend(0, 16), torch.ones(16, 64, 64, 3, dtype=torch.uint8))
    assert np.shares_memory(pool.rows(1, 2), pool.rows(1, 16))


STUCK = """
import os, sys, time
from ca2cl.data.loading.workers import TileWorkers

class Long:
    def rows(self, request): return 1
    def __call__(self, request, tiles): return bytes(1 << 20), os.getpid()  # more than a pipe takes

answers = TileWorkers(Long(), 1, (4, 4), 4).answers(range(1000))
sys.stdout.write(" ".join({str(next(answers)[0][1]) for _ in range(40)}) + "\\n")
sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_and_their_memory_end_with_a_parent_that_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    """Also those that wait to write what nobody reads: the pipe's other end is held open by their siblings."""
    before = shared_files()
    parent = Forked(tmp_path, STUCK, module=CODE)
    workers = [psutil.Process(int(pid)) for pid in parent.first_line().split()]
    assert len(workers) == 4
    parent.send_signal(number)
    _, left = psutil.wait_procs(workers, timeout=60)
    for process in left:
        process.kill()
    assert not left and not leaked(before)


def test_without_dev_shm_tiles_are_decoded_in_one_process(tmp_path: Path) -> None:
    namespace = next((one for one in (["unshare", "-m"], ["unshare", "-rm"]) if _runs([*one, "true"])), None)
    if namespace is None:
        pytest.skip("no mount namespaces here")
    code = (
        "import logging, os\n"
        "from tests.jobs.data.test_workers import answers\n"
        "assert {pid for pid, _ in answers(2)} == {os.getpid()}\n"
        "assert {pid for pid, _ in answers(2)} == {os.getpid()}\n"
    )
    mounted = 'mount -t tmpfs -o ro,size=16k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        [*namespace, "sh", "-c", mounted, "sh", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("/dev/shm cannot be used") and "--shm-size" in line


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0

"""Sample system metrics into the journal under MLflow's names.

MLflow's own monitor sends straight to the server, so it would lose samples while the server is away; here they take
the way of every other number.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import psutil
import torch

from ca2cl.errors import InputError
from ca2cl.tracking.journal import Journal, last_tick

_MEGABYTE = 1e6
_log = logging.getLogger(__name__)


class SystemSampler:
    """A thread that writes one ``system`` line every ``interval`` seconds.

    ``tick`` (MLflow's step) is the number of seconds since ``created``, the run's first start in Unix seconds. It grows
    over resumes and whatever happens to the machine's clock: the clock is read once, and ``tick`` then goes on from the
    journal's last one where that is later.
    """

    def __init__(self, journal: Journal, folder: Path, created: float, interval: float = 10.0) -> None:
        self._journal, self._folder, self._created, self._interval = journal, folder, created, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ca2cl-system", daemon=True)

    def start(self) -> SystemSampler:
        """Begin to sample."""
        psutil.cpu_percent()  # the first call only sets the mark from which the next one measures
        self._thread.start()
        return self

    def stop(self) -> None:
        """Write a last sample and end."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        last = False
        began, before = time.monotonic(), max(int(time.time() - self._created), last_tick(self._journal.path) + 1)
        while not last:
            last = self._stop.wait(self._interval)
            try:
                sample = measure(self._folder)
                tick = before + int(time.monotonic() - began)
                self._journal.append({"event": "system", "tick": tick, **sample})
            except (OSError, RuntimeError, psutil.Error, InputError) as error:
                _log.warning("no more system metrics: %s", error)
                return


def measure(folder: Path) -> dict[str, float]:
    """One sample: CPU, memory, disk of ``folder`` and network, and memory and load of each GPU in use."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(folder)), psutil.net_io_counters()
    sample = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_usage_megabytes": psutil.Process().memory_info().rss / _MEGABYTE,
        "system/disk_usage_percentage": disk.percent,
        "system/disk_available_megabytes": disk.free / _MEGABYTE,
    }
    if network is not None:
        sample["system/network_receive_megabytes"] = network.bytes_recv / _MEGABYTE
        sample["system/network_transmit_megabytes"] = network.bytes_sent / _MEGABYTE
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for number in range(torch.cuda.device_count()):
            sample |= _measure_gpu(number)
    return sample


def _measure_gpu(number: int) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(number)
    name = f"system/gpu_{number}"
    sample = {
        f"{name}_memory_usage_megabytes": (total - free) / _MEGABYTE,
        f"{name}_memory_usage_percentage": 100 * (total - free) / total,
    }
    try:
        sample[f"{name}_utilization_percentage"] = float(torch.cuda.utilization(number))
        sample[f"{name}_power_usage_watts"] = torch.cuda.power_draw(number) / 1000
    except (ModuleNotFoundError, RuntimeError):  # both need the optional nvidia-ml-py
        pass
    return sample

"""Background thread that mirrors the journal to a tracker.

The journal file itself is the queue, so it is bounded by the disk and nothing in it is ever lost: a store that is away
costs one warning and a pause, and what it missed is sent when it is back, by the next start, or by ``ca2cl sync``.
"""

from __future__ import annotations

import logging
import threading
import time

from ca2cl.errors import InputError
from ca2cl.store.open import StoreAway, reason
from ca2cl.tracking.replay import Replayer
from ca2cl.tracking.sink import SinkReplayer

_SILENT_S = 3.0  # an end that takes longer says what it waits for
_AWAY_S = 30.0  # for one more try at the end with a store that was away before, and does not answer
_log = logging.getLogger(__name__)


class Mirror:
    """A thread that keeps an MLflow run in step with the journal and never holds up the one who writes it.

    Args:
        replayer: what to send and where.
        interval: seconds between looks at the journal.
        longest_pause: seconds that the pause between tries grows to while the store is away.

    Attributes:
        place: the tracker's name in messages.
        refusal: why there can be no run, once the store refuses it.
    """

    def __init__(
        self, replayer: Replayer | SinkReplayer, *, interval: float = 2.0, longest_pause: float = 60.0
    ) -> None:
        self._replayer, self._interval, self._longest_pause = replayer, interval, longest_pause
        self.place = replayer.place
        self.refusal: InputError | None = None
        self._met = threading.Event()
        self._closing = threading.Event()
        self._giving_up = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._run, name="ca2cl-mirror", daemon=True)

    def start(self) -> Mirror:
        """Begin to follow the journal."""
        self._thread.start()
        return self

    def wait_for_run(self, timeout: float | None) -> None:
        """Return when the store has the run or is known to be away, after at most ``timeout`` seconds.

        Raises:
            InputError: the store refuses the run.
        """
        if not self._met.wait(timeout):
            _log.warning("%s has not answered within %g s: training starts without waiting for it", self.place, timeout)
        if self.refusal is not None:
            raise self.refusal

    def close(self, timeout: float = 60.0) -> bool:
        """Send what is left, for at most ``timeout`` seconds, fewer where the store was away before and still is.

        Returns:
            Whether MLflow now has everything.
        """
        began, before, announced = time.monotonic(), self._progress(), False
        self._closing.set()
        while self._thread.is_alive() and (waited := time.monotonic() - began) < timeout:
            if waited > _AWAY_S and self._away and self._progress() == before:
                break
            if waited > _SILENT_S and not announced:
                announced = True
                _log.info("waiting for %s to take the rest of this run, %g s at most", self.place, timeout)
            self._thread.join(min(0.25, timeout))
        if self._thread.is_alive():
            self._giving_up.set()
            self._thread.join(1.0)
        return not self._thread.is_alive() and not self._replayer.pending

    def _progress(self) -> tuple[str, int]:
        return self._replayer.run_id, self._replayer.offset

    def _run(self) -> None:
        pause, last_look = self._interval, False
        try:
            while not (last_look or self._giving_up.is_set()):
                last_look = self._closing.is_set()  # one try at the end: `ca2cl sync` has the rest
                pause = self._interval if self._try_once() else min(2 * pause, self._longest_pause)
                self._closing.wait(pause)
        finally:
            self._met.set()  # nobody waits for a thread that has ended, whatever ended it

    def _try_once(self) -> bool:
        try:
            self._replayer.meet()
            self._met.set()
            self._replayer.send(self._giving_up)
        except self._replayer.failures as error:
            if isinstance(error, InputError) and not isinstance(error, StoreAway) and not self._met.is_set():
                self.refusal = error
                self._giving_up.set()
                self._met.set()
                return False
            if not self._away:
                _log.warning(
                    "%s is away (%s): training goes on, the journal keeps everything and is sent later",
                    self.place,
                    reason(error),
                )
            self._away = True
            self._met.set()
            return False
        if self._away:
            _log.warning("%s is back and up to date", self.place)
        self._away = False
        return True

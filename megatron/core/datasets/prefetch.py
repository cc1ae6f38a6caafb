"""Prepares the batches of the next steps in a thread, so that a step finds its own ready.

The C++ that makes samples releases the GIL, so the thread works while the step computes. It holds no state of the run:
a batch is asked for by its first sample, and whatever was prepared for another one, because steps were skipped or the
run continues elsewhere, is thrown away. Batches that no step took were never consumed.

Batches for a GPU are copied there ahead too, on a stream of their own: the copy runs beside the steps before.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from typing import NamedTuple

import torch

from megatron.core.datasets.loader import T5Loader, TensorBatch

BATCHES_AHEAD = 2
SECONDS_TO_END = 5.0  # that the end of a run waits for a batch under way; the file system may hang


class _Prepared(NamedTuple):
    """A batch, or what went wrong when it was made."""

    first_sample: int
    outcome: _Copy | BaseException


class _Copy(NamedTuple):
    """A batch where it is wanted, or on its way to there."""

    batch: TensorBatch
    arrived: torch.cuda.Event | None

    def take(self) -> TensorBatch:
        """The batch, for the work that is queued from now on; does not wait for it."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.batch.labels.device)
            stream.wait_event(self.arrived)
            for tensor in self.batch.inputs().values():
                tensor.record_stream(stream)  # whose work must be done before the memory is used again
        return self.batch


class Prefetcher:
    """The batches of a loader, prepared ahead of the steps that take them.

    Attributes:
        loader: Where batches come from; bit for bit the same ones.
    """

    def __init__(self, loader: T5Loader, device: torch.device, ahead: int = BATCHES_AHEAD) -> None:
        """A prefetcher whose thread starts with the first batch that is asked for.

        Args:
            loader: Of the training data. Its dataset is used by the thread alone from then on.
            device: Where the batches go; a GPU has its number.
            ahead: Batches that are ready at most; 0 makes each when it is asked for, without a thread.
        """
        self.loader, self.ahead, self._device = loader, ahead, device
        self._changed = threading.Condition()
        # Guarded by the condition; those that are ready follow each other, and `_next` follows them.
        self._ready: deque[_Prepared] = deque()
        self._next: int | None = None  # first sample of the batch that is made now or as soon as there is room
        self._closed = False
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None  # of copies to a GPU

    def step_batch(self, first_sample: int) -> TensorBatch:
        """The batch of the step that starts at `first_sample`, on the device.

        A copy to a GPU may not be done yet, but what is queued there from now on comes after it.

        Raises:
            Exception: whatever the loader raised when it made this batch.
        """
        if self.ahead == 0:
            return self._make(first_sample).take()
        with self._changed:
            assert not self._closed, "the prefetcher is closed"
            while self._ready and self._ready[0].first_sample != first_sample:
                self._ready.popleft()
            if not self._ready:
                self._next = first_sample
            if self._thread is None:
                self._start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
            outcome = self._ready.popleft().outcome
            self._changed.notify_all()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome.take()

    def close(self) -> None:
        """End the thread. Nothing can be asked for afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(SECONDS_TO_END)
            atexit.unregister(self.close)
        self._ready.clear()

    def _start(self) -> None:
        # A daemon: a batch that hangs must not keep the process alive. But an interpreter that ends under a thread that
        # is in C++ aborts the process, so that even a program that forgets `close` ends the thread first.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._next is not None and self._has_room()))
                if self._closed:
                    return
                first_sample = self._next
                assert first_sample is not None
            following: int | None = None
            outcome: _Copy | BaseException
            try:
                outcome = self._make(first_sample)
                following = self.loader.next_sample(first_sample)
            except BaseException as error:  # it belongs to the step; after it the thread waits to be asked again
                outcome = error
            with self._changed:
                if self._next == first_sample:  # else another one is wanted by now
                    self._ready.append(_Prepared(first_sample, outcome))
                    self._next = following
                    self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._ready) < self.ahead

    def _make(self, first_sample: int) -> _Copy:
        batch = self.loader.step_batch(first_sample)
        if self._device.type != "cuda":
            return _Copy(batch.to(self._device), None)
        torch.cuda.set_device(self._device)  # of this thread, or it would take the first GPU, of another process
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            copy = _pinned(batch).to(self._device)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Copy(copy, arrived)


def _pinned(batch: TensorBatch) -> TensorBatch:
    """The batch in pinned memory, from where it reaches the GPU without the host.

    The copies are numpy's: torch's would start threads of their own for this thread.
    """
    copies = {}
    for name, rows in batch.inputs().items():
        copies[name] = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        copies[name].numpy()[...] = rows.numpy()
    return TensorBatch(**copies)

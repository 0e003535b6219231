"""Share the measured energy of steps among the answers that ran in them.

    a step: tokens of each sequence  ->  now and then: joules since the last reading, by those tokens  ->  Sequence

A step's energy is what all processor packages and their memory used while it ran, including their idle power and other
programs. It is divided by tokens: in a step with a prompt of 30 tokens and two answers of one token each, the prompt
pays 30/32. Steps within 50 ms share one reading. Energy used between steps is charged to no sequence.

Elsewhere: `machine/energy.py` reads the counters; the ledger holds the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from time import monotonic
from typing import Protocol

from argosy.machine.energy import EnergyMeter

# A reading takes some microseconds per counter; the counters are updated once a millisecond.
_READ_EVERY_S = 0.05
_JOULES_PER_KWH = 3.6e6

# The drive's energy is not measured, so we assume a range: from an NVMe drive that reads 7 GB/s at 2 W to a SATA
# drive that reads 0.5 GB/s at 4 W.
_DRIVE_JOULES_PER_BYTE = (0.3e-9, 8e-9)


def drive_joules(num_bytes: float) -> tuple[float, float]:
    """Estimate the least and the most energy that a drive takes to read `nbytes` bytes."""
    low, high = _DRIVE_JOULES_PER_BYTE
    return num_bytes * low, num_bytes * high


def co2_grams(joules: tuple[float, float], grams_per_kwh: float) -> tuple[float, float]:
    """Return the least and the most CO2 for an amount of energy, with the electricity supplier's factor."""
    low, high = joules
    return low / _JOULES_PER_KWH * grams_per_kwh, high / _JOULES_PER_KWH * grams_per_kwh


class Metered:
    """The energy of one answer or of all answers: measured joules, and bytes read from the drive."""

    __slots__ = ("drive_bytes", "joules")

    def __init__(self) -> None:
        self.joules = self.drive_bytes = 0.0

    def add(self, joules: float, drive_bytes: float) -> None:
        self.joules += joules
        self.drive_bytes += drive_bytes

    @property
    def drive_j(self) -> tuple[float, float]:
        """Estimate the least and the most energy that the drive took for these bytes."""
        return drive_joules(self.drive_bytes)


class Running(Hashable, Protocol):
    """A sequence with its part of the energy; None: nothing measures it."""

    metered: Metered | None


class Ran(Protocol):
    """A step that has run, such as a `Scheduled`."""

    @property
    def sequences(self) -> Sequence[Running]: ...

    @property
    def counts(self) -> Sequence[int] | None: ...


class EnergyShares:
    """Meters the steps of one engine. Without a meter it does nothing, and `total` is None.

    Args:
        bytes_read: returns the bytes read from the drive so far.
    """

    def __init__(
        self,
        meter: EnergyMeter | None,
        bytes_read: Callable[[], int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._meter, self._bytes_read, self._clock = meter, bytes_read, clock
        self.total = None if meter is None else Metered()
        self._tokens: dict[Running, int] = {}  # in steps since the last reading
        self._joules, self._bytes, self._read_at = 0.0, 0, 0.0

    def begin(self) -> None:
        """Note that a step begins. Energy used in a pause before it is charged to no sequence."""
        if self._meter is not None and not self._tokens:
            self._look()

    def note(self, scheduled: Ran) -> None:
        """Note a step that has run."""
        if self._meter is None:
            return
        counts = scheduled.counts or [1] * len(scheduled.sequences)
        for sequence, count in zip(scheduled.sequences, counts, strict=True):
            self._tokens[sequence] = self._tokens.get(sequence, 0) + count
        if self._clock() - self._read_at >= _READ_EVERY_S:
            self.settle()

    def settle(self) -> None:
        """Divide the energy used since the last reading among the sequences that ran."""
        if self._meter is None or not self._tokens:
            return
        joules, num_bytes = self._look()
        num_tokens = sum(self._tokens.values())
        if joules is None or self.total is None:
            # A sum without this part would look like the whole.
            self._meter = self.total = None
            for sequence in self._tokens:
                sequence.metered = None
        else:
            self.total.add(joules, num_bytes)
            for sequence, count in self._tokens.items():
                if sequence.metered is not None:
                    share = count / num_tokens
                    sequence.metered.add(joules * share, num_bytes * share)
        self._tokens = {}

    def start(self, sequence: Running) -> None:
        """Meter a new sequence."""
        if self._meter is not None:
            sequence.metered = Metered()

    def _look(self) -> tuple[float | None, int]:
        """Return the joules and the bytes from the drive since the last call."""
        assert self._meter is not None
        self._read_at = self._clock()
        read, num_bytes = self._meter.read(), self._bytes_read()
        joules = None if read is None else read - self._joules
        passed = num_bytes - self._bytes
        self._joules, self._bytes = self._joules if read is None else read, num_bytes
        return joules, passed

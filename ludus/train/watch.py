"""The alarms of a run while it trains: what begins, what ends, and when to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from ludus.config import AlarmsConfig
from ludus.errors import UserError
from ludus.records import Record, is_evaluation
from ludus.truth.alarms import Alarm, after_evaluation, after_step


class StoppedByAlarm(UserError):
    """An alarm of `alarms.stop` sounded: what was done is saved, and the run has ended."""


class Watch:
    """Which alarms sound after each record of a run.

    A function of the records alone, so that a resumed run sounds as an undisturbed one does. It keeps the
    first and the newest few of them. The alarms of an evaluation sound until the next one.
    """

    def __init__(self, limits: AlarmsConfig, records: Iterable[Record] = ()) -> None:
        """Take up a run whose `records` are written already."""
        self._limits = limits
        self._first: list[Record] = []
        self._last: deque[Record] = deque(maxlen=limits.window + 1)
        self._measured: Record | None = None  # the newest evaluation
        self._step = 0
        for record in records:
            self._take(record)
        self._of_steps = after_step(self._first, list(self._last), limits)
        self._of_evaluation: list[Alarm] = []
        if self._measured is not None:
            self._of_evaluation = after_evaluation(self._measured, limits)

    @property
    def sounding(self) -> list[Alarm]:
        """All alarms that sound now."""
        return [*self._of_steps, *self._of_evaluation]

    def see(self, record: Record) -> list[str]:
        """Add `alarms`, those that sound because of it, to a new record before it is written.

        Returns one line for each alarm that begins and for each that ends with it.
        """
        self._take(record)
        if is_evaluation(record):
            before, now = self._of_evaluation, after_evaluation(record, self._limits)
            self._of_evaluation = now
        else:
            before, now = self._of_steps, after_step(self._first, list(self._last), self._limits)
            self._of_steps = now
        record["alarms"] = [alarm.to_json() for alarm in now]
        return _told(before, now)

    def stopping(self) -> StoppedByAlarm | None:
        """What is to be raised, once a checkpoint is written, where an alarm sounds that ends the run.

        A measurement before the first step ends nothing: nothing has been trained yet.
        """
        trained = self._measured is not None and self._measured["step"] > 0
        stop = self._limits.stop
        for alarm in [*self._of_steps, *(self._of_evaluation if trained else ())]:
            if alarm.name in stop or "any" in stop:
                way = "higher" if alarm.value > alarm.limit else "lower"
                return StoppedByAlarm(
                    f"stopped after step {self._step}, with a checkpoint, by the alarm {alarm}; to go on, "
                    f"set alarms.{alarm.name} {way}, or leave it out of alarms.stop (now {', '.join(stop)}), "
                    "and use --resume"
                )
        return None

    def _take(self, record: Record) -> None:
        self._step = record["step"]
        if is_evaluation(record):
            self._measured = record
            return
        if len(self._first) < self._limits.window:
            self._first.append(record)
        self._last.append(record)


def _told(before: Sequence[Alarm], now: Sequence[Alarm]) -> list[str]:
    old, new = ({(alarm.name, alarm.where) for alarm in alarms} for alarms in (before, now))
    began = [f"alarm: {alarm}" for alarm in now if (alarm.name, alarm.where) not in old]
    ended = [f"no more: {a.name} ({a.where})" for a in before if (a.name, a.where) not in new]
    return began + ended

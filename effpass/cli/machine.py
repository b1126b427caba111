"""What else runs on this machine while something is timed."""

from __future__ import annotations

import time

__all__ = ["OtherPrograms"]

# Share of the cores below which nobody has to be told: every system does something in the background.
_NOTICEABLE = 0.1


class OtherPrograms:
    """Counts the processor time that other programs take from its creation on."""

    def __init__(self) -> None:
        self._started, self._others = time.perf_counter(), _seconds_of_others()

    def remark(self) -> str | None:
        """One sentence for below a table of times; None where other programs left the cores alone."""
        import psutil

        cores = psutil.cpu_count() or 1
        busy = (_seconds_of_others() - self._others) / (time.perf_counter() - self._started)
        if busy < _NOTICEABLE * cores:
            return None
        return (
            f"While this was timed, other programs kept {min(busy, cores):.1f} of {cores} cores busy: on a free"
            " machine these times are shorter."
        )


def _seconds_of_others() -> float:
    """Processor time since the system started that is not this process's own."""
    import psutil

    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    waiting = times.idle + getattr(times, "iowait", 0.0)
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # Linux counts it in user and nice too
    return sum(times) - waiting - twice - own.user - own.system

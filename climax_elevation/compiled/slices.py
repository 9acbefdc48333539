"""Cutting a range into parts."""

from collections.abc import Iterator


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """`start` to `stop` in parts of `step`; the last may be shorter."""
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))

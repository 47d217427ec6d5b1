"""Schedules over training."""
import math


def ramp(progress: float, start: float, end: float, kind: str) -> float:
    """Value at ``progress`` (clamped to [0, 1]) on the way from ``start`` to ``end``.

    ``constant`` is ``end`` throughout, ``linear`` a straight line, ``cosine`` half a cosine wave.
    """
    if kind not in ('constant', 'linear', 'cosine'):
        raise ValueError(f"unknown schedule '{kind}': choose constant, linear or cosine.")
    progress = min(max(progress, 0.0), 1.0)
    if kind == 'constant':
        return end
    if kind == 'cosine':
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress

"""One lock for what belongs to the whole process: what torch's modules hold, its settings, the
global random generators.
"""

from __future__ import annotations

import threading

__all__ = ["TURN"]

TURN = threading.RLock()
"""Held by the one thread that exchanges such things for a while, so that no other puts the wrong
one back.
"""

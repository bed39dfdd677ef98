"""One lock for state of the whole process.

This state includes attributes of torch's modules, torch's settings and the global random
generators.
"""

from __future__ import annotations

import threading

__all__ = ["PROCESS_LOCK"]

PROCESS_LOCK = threading.RLock()
"""Held by a thread while it changes such state and until it has restored it.

Without the lock, two threads could restore each other's temporary values.
"""

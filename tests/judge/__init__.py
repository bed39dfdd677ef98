"""A second judge: random networks as source text, each compared with its masked original.

The networks are written with the habits that people have. ``python -m tests.judge --count 200``
draws and judges networks and prints the spec of each one that fails.
``python -m tests.judge --spec '...'`` shows the source for a spec and judges it again.
"""

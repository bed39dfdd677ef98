"""A second judge: networks drawn as source text, with the habits that people have, each held
against its masked original.

``python -m tests.judge --count 200`` draws and judges; what fails is printed as a spec, and
``python -m tests.judge --spec '...'`` shows its source and judges it again.
"""

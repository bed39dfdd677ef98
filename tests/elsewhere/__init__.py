"""Checks on the device of tests/support/elsewhere.py.

They run in their own process, which tests/test_devices.py starts.
"""

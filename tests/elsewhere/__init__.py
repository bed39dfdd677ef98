"""Checks for a process of their own, on a device that tests/support/elsewhere.py makes;
tests/test_devices.py starts them.
"""

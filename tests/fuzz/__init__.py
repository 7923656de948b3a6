"""Damaged and hostile files against every door of the package, each in a child process.

`python -m tests.fuzz --minutes 10` tries mutants of small valid files until the time is over;
`test_doors.py` tries thirty of each door, always the same ones.
"""

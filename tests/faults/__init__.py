"""What a run must survive, tried many times: `python -m tests.faults` prints a line per fault (see harness.py)."""

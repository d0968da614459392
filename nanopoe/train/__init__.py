"""Training: build (Experiment -> Run), step (one update), loop (the run), evaluate, watch."""

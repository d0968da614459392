"""Pictures of runs as PNG files (matplotlib, no display needed): curves.py, trajectory.py, modes.py, comparison.py."""

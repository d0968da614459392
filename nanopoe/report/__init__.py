"""What a run or several look like afterwards: tables (tables.py) and plots (plots.py) of what runs.py reads."""

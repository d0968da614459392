"""What a run or several look like afterwards: runs.py reads, document.py says in which order, write.py writes it."""

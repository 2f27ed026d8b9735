"""What a run measures of its experts: their load, and the time of each tier."""

"""Numbers that say how good a result is, and the thresholds behind the verdict."""

"""The page of pictures and numbers that a run leaves."""

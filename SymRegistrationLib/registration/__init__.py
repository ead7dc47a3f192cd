"""Methods on a working grid: alignment, networks at use, the optimiser, refinement."""

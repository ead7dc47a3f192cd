"""The doors of the command line and of the worker."""

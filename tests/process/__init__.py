"""Whole processes: command line, signals, workers, files, memory."""

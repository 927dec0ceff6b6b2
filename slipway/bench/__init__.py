"""Measurements as ratios within one run; imported by the command line alone."""

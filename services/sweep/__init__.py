"""Sweeps: many runs that together say which settings the data want. Owns Ray Tune and Optuna."""

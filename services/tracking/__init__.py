"""Tracking: one MLflow run per logical flam run, reopened on resume, with no step logged twice."""

"""Training: the driver's side of a run on Ray Train, and what each worker does.

Nothing is imported here: Ray starts several processes for a run, and each would import all of it to have a piece.
"""

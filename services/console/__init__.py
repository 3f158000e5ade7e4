"""The terminal: command lines in, one clear line out, and the documented exit code."""

from services.console.program import Progress, run_program, table

__all__ = ["Progress", "run_program", "table"]

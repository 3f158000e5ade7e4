"""The terminal: command lines in, one clear line out, and the documented exit code."""

from services.console.program import Progress, live_line, run_program, table

__all__ = ["Progress", "live_line", "run_program", "table"]

"""The policy protocol as Ray tasks: expert data, FLAM, labels, policies and what they earn, each done once and kept."""

from services.policy.evidence import evidence, with_model
from services.policy.plan import Cell, PolicySettings, policy_cells, show_plan
from services.policy.run import run_policies
from services.policy.table import rows_of, summary, write_results

__all__ = [
    "Cell",
    "PolicySettings",
    "evidence",
    "policy_cells",
    "rows_of",
    "run_policies",
    "show_plan",
    "summary",
    "with_model",
    "write_results",
]

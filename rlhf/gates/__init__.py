"""Gates between the stages: a model goes on only with evidence. Importing this loads no torch."""

from rlhf.gates.judge import GateRequest, judge
from rlhf.gates.policy import policy_digest, validate
from rlhf.gates.verdict import Verdict, message, raise_for, verdict_table

__all__ = ["GateRequest", "Verdict", "judge", "message", "policy_digest", "raise_for", "validate", "verdict_table"]

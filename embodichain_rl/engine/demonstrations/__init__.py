"""Demonstrations that an environment plans itself, executed by EmbodiChain's contract.

Imports ``environments``. Begin with ``rollout.py``, which describes the contract; ``episode.py`` executes one
demonstration, and ``planner_env.py`` is the environment as a demonstration sees it.
"""

from embodichain_rl.engine.demonstrations.rollout import (
    DemonstrationRollout,
    Segment,
    find_planner,
    offers_demonstrations,
    segment_texts,
    takes_env,
    with_target,
)

__all__ = [
    "DemonstrationRollout",
    "Segment",
    "find_planner",
    "offers_demonstrations",
    "segment_texts",
    "takes_env",
    "with_target",
]

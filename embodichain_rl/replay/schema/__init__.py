"""What a step consists of: its fields, which of them are stored once, its segments, text and trajectory values.

Pure descriptions and functions of arrays, except for the two tables that processes share: the schema itself and texts.
Imports ``shared``. Begin with ``schema.py``.
"""

from embodichain_rl.replay.schema.arrays import as_array, as_tensor
from embodichain_rl.replay.schema.schema import MASK, Key, Leaf, Nest, Schema, StepField, leaves_of
from embodichain_rl.replay.schema.segments import SEGMENT_KEY, segment_field, steps_left
from embodichain_rl.replay.schema.shared_schema import SharedSchema
from embodichain_rl.replay.schema.shifted import Shifted, refuse_unshifted, shifted_fields
from embodichain_rl.replay.schema.texts import TextTable, as_non_tensor, resolve_texts, text_array
from embodichain_rl.replay.schema.trajectory_values import first_difference, same_values

__all__ = [
    "MASK",
    "SEGMENT_KEY",
    "Key",
    "Leaf",
    "Nest",
    "Schema",
    "SharedSchema",
    "Shifted",
    "StepField",
    "TextTable",
    "as_array",
    "as_non_tensor",
    "as_tensor",
    "first_difference",
    "leaves_of",
    "refuse_unshifted",
    "resolve_texts",
    "same_values",
    "segment_field",
    "shifted_fields",
    "steps_left",
    "text_array",
]

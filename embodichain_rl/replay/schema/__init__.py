"""What a step consists of: its fields and their nesting, segments, text and trajectory values.

These are descriptions and pure functions of arrays, except for two tables that processes share: the schema itself and
the texts. This room imports ``shared``. Begin with ``schema.py``; ``leaves.py`` reads the entries of a TensorDict, and
``nest.py`` builds TensorDicts from them.
"""

from embodichain_rl.replay.schema.arrays import as_array, as_tensor, numpy_dtype
from embodichain_rl.replay.schema.blobs import Blobs, lengths_key, padded_values
from embodichain_rl.replay.schema.codecs import Codec, JpegCodec, PngCodec, RawCodec, identity_of
from embodichain_rl.replay.schema.formats import Formats
from embodichain_rl.replay.schema.frames import decoded, encoded, resolved
from embodichain_rl.replay.schema.leaves import Leaf, Leaves, leaves_of
from embodichain_rl.replay.schema.nest import Key, Nest, Node, is_nested, key_name, node_of
from embodichain_rl.replay.schema.optional_keys import OptionalKeys, presence_key_of
from embodichain_rl.replay.schema.origin_entries import INDEX, MASK, ORIGIN_KEYS, TRAJECTORY
from embodichain_rl.replay.schema.ragged import RaggedLeaf, items_of, ragged_leaf
from embodichain_rl.replay.schema.schema import BlobSizes, Schema, StepField
from embodichain_rl.replay.schema.segments import SEGMENT_KEY, segment_field, steps_left
from embodichain_rl.replay.schema.shared_schema import SharedSchema
from embodichain_rl.replay.schema.shifted import Shifted, refuse_unshifted, shifted_fields, unshifted_error
from embodichain_rl.replay.schema.text_entries import as_non_tensor, resolve_texts, text_array
from embodichain_rl.replay.schema.texts import TextTable
from embodichain_rl.replay.schema.trajectory_values import first_difference, same_values

__all__ = [
    "INDEX",
    "MASK",
    "ORIGIN_KEYS",
    "SEGMENT_KEY",
    "TRAJECTORY",
    "BlobSizes",
    "Blobs",
    "Codec",
    "Formats",
    "JpegCodec",
    "Key",
    "Leaf",
    "Leaves",
    "Nest",
    "Node",
    "OptionalKeys",
    "PngCodec",
    "RaggedLeaf",
    "RawCodec",
    "Schema",
    "SharedSchema",
    "Shifted",
    "StepField",
    "TextTable",
    "as_array",
    "as_non_tensor",
    "as_tensor",
    "decoded",
    "encoded",
    "first_difference",
    "identity_of",
    "is_nested",
    "items_of",
    "key_name",
    "leaves_of",
    "lengths_key",
    "node_of",
    "numpy_dtype",
    "padded_values",
    "presence_key_of",
    "ragged_leaf",
    "refuse_unshifted",
    "resolve_texts",
    "resolved",
    "same_values",
    "segment_field",
    "shifted_fields",
    "steps_left",
    "text_array",
    "unshifted_error",
]

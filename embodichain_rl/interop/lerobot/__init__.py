"""LeRobot: datasets over live buffers, a recorder, prefill and export.

Begin with ``dataset.py``.
"""

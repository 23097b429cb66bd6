"""LeRobot: datasets over live buffers, a recorder, prefill and export.

Begin with ``dataset.py``: a live buffer in place of a ``LeRobotDataset``. ``features.py`` maps keys to LeRobot's names.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

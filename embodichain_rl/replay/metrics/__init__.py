"""What a buffer reports about itself: counts of its batches, metrics of all its processes, statistics of its steps.

Imports ``sampling``, ``storage`` and the rooms below them; knows nothing of writing. Begin with ``aggregation.py``: it
sums up what ``metering.py`` counts. ``statistics.py`` has the means and quantiles that normalization needs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

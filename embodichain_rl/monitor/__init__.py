"""See what an engine or a buffer does: figures, a terminal view, a web page, Prometheus, traces, Rerun, pictures.

Everything attaches to a run that was started without thinking of it, only reads, and leaves no trace. This room is
above ``engine``; no other room imports it. What each part needs is imported when it is used. Begin with ``source.py``,
which finds and reads what is watched, and ``metrics.py``, the list of all figures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

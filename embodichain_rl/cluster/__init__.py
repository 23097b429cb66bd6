"""The same engine on several machines: its workers run as actors of a Ray cluster, its buffer stays on this machine.

A trajectory crosses the network once; samples never do. Ray (the extra ``ray``) is imported only by the processes that
talk to the cluster: the gateway, a child process of the learner, and the actors. This room is above ``engine`` and
beside ``interop``; no other room imports it. Read ``config.py`` first, then ``gateway.py``. ``link.py`` is the end of
the learner, ``producer.py`` is the actor.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

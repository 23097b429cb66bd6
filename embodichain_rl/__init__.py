"""Live trajectory streaming for robot learning, as a TorchRL replay buffer.

Every public name can be imported from here. Each is loaded when it is first used, so importing the package is fast.
"""

import lazy_loader

import embodichain_rl._orphans
import embodichain_rl._standard_streams
import embodichain_rl._start_method  # noqa: F401  # all for their effect on this process

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

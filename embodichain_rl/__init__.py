"""Live trajectory streaming for robot learning, as a TorchRL replay buffer.

Every public name can be imported from here. Each is loaded when it is first used, so importing the package is fast.
"""

import lazy_loader

import embodichain_rl._orphans
import embodichain_rl._standard_streams
import embodichain_rl._start_method  # noqa: F401  # all for their effect on this process

_lazy_getattr, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Return a public name, or the version of the installed package."""
    if name != "__version__":
        return _lazy_getattr(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("embodichain-rl")
    except PackageNotFoundError:  # files that are used without an installation
        return "0+unknown"

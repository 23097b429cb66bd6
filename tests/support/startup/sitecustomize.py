"""What each interpreter that the tests start does before anything else, as its ``PYTHONPATH`` has this folder.

Importing torch and TorchRL creates a million objects that live as long as the process. By default, Python looks for
garbage after every 700 new ones and finds none: a third of the import's processor time.
"""

import gc

gc.set_threshold(50_000)

from __future__ import annotations

import multiprocessing

# Workers of the engines under test are forked from a process that has imported what they need: they start in a moment.
multiprocessing.set_forkserver_preload(["embodichain_rl.engine.worker", "gymnasium"])

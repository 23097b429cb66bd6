"""Zero-copy transfer of batches from a ``DataLoader`` worker to the training process.

By default, torch copies every tensor of a batch into a new shared-memory file when it is sent, and passes one file
descriptor for each. Mapping the new pages of these files takes several times longer than the copy, and where
``/dev/shm`` is too small for them the main process waits forever. Here, a batch is gathered into one block of shared
memory from the start, and blocks are reused:

* In a worker, :func:`outgoing_memory` provides the memory. A block, a ``memfd`` like all shared memory of this
  library, is *lent* when a tensor in it is sent.
* The receiver (``incoming.py``) opens the block through ``/proc/<process>/fd/<descriptor>``, maps it and builds
  ordinary tensors over it. From then on the block needs no descriptor in either process. When the last of these tensors
  is released, the receiver marks the block as free in its header, and the worker reuses it.

No process waits for another: a worker that finds no free block makes a new one. Blocks are never leaked: the kernel
frees a block when the worker has ended and the receiver holds no tensor in it.

The transfer works on what is pickled (``sending.py``): TensorDicts, tensors and NumPy arrays. So transforms and collate
functions need not know of it, whatever objects they return. What is outside of the blocks is copied into one when it is
sent, if possible into the block of the same batch. A received tensor has a storage of its own, so that it can be saved
and pickled without the others.

Two kinds of tensors are sent in torch's usual way: those on another device, and those that the user placed in torch's
shared memory. All tensors are sent in that way if a process has no permission to read ``/proc`` of its worker, and with
``torch.multiprocessing.set_sharing_strategy("file_system")``.

Imports nothing else of ``datasets``, and no TorchRL. Begin with ``outgoing.py``, then ``sending.py`` and
``incoming.py``.
"""

from embodichain_rl.datasets.transport.loader_worker import enter_worker, outgoing_memory
from embodichain_rl.datasets.transport.outgoing import OutgoingMemory
from embodichain_rl.datasets.transport.sending import Sender
from embodichain_rl.datasets.transport.structure import Structure, columns_of, structure_of

__all__ = [
    "OutgoingMemory",
    "Sender",
    "Structure",
    "columns_of",
    "enter_worker",
    "outgoing_memory",
    "structure_of",
]

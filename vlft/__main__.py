"""`accelerate launch -m vlft`, `torchrun -m vlft`, `deepspeed --module vlft`, `python -m vlft`."""

import sys

from vlft.cli import main

# The guard matters: data workers that are spawned import this module again.
if __name__ == "__main__":
    sys.exit(main())

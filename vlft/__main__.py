"""`accelerate launch -m vlft`, `torchrun -m vlft`, `deepspeed --module vlft`, `python -m vlft`."""

from vlft.cli import run

# The guard matters: data workers that are spawned import this module again.
if __name__ == "__main__":
    run()

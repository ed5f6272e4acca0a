"""`vlft plan`: memory and time of a training before it runs, from the options, the config and the data alone.

* `imports.py`: the libraries that this needs, without what they load for others.
* `skeleton.py`: the model that a strategy would train, without its weights.
* `load.py`: what steps and rows of this data hold.
* `memory.py`, `time.py`: the two estimates; `gpus.py`: what a GPU has.
* `advice.py`: what to change when it does not fit, and the search for a goal.
* `command.py`: all of it in order, and what is printed.
"""

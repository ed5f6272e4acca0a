#!/usr/bin/env bash
# First lines of every command on the lent GPU: install the carried wheels beside the image's own packages. `.whl` needs
# vlft's own too (`pip wheel --no-deps -w .whl .`): its metadata names the strategies; `.whl_peer` is for the peers.
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $(ls -d .whl/*.whl .whl_peer/*.whl 2>/dev/null)
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -c 'from importlib.metadata import entry_points as e; raise SystemExit(0 if e(group="vlft.strategies") else "no strategy is installed: carry a wheel of vlft in .whl")' || exit 1

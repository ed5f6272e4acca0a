#!/usr/bin/env bash
# First lines of every command on the lent GPU: install the carried wheels (.whl; .whl_peer for the peers) beside the image's own packages.
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $(ls -d .whl/*.whl .whl_peer/*.whl 2>/dev/null)
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

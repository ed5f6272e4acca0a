#!/usr/bin/env bash
# Lists of benches, one list to a card, all cards of a lent machine at once: four cards measure four times as much in the
# same time. To be sourced, with OUT set, for example by a script that is carried there:
#
#     END=380; . bench/cards.sh          # seconds in which everything ends
#     prep 3B 7B                         # models and data, once, for all cards
#     list a 0 "bench/train.py --rows 3B-full-bf16 --who vlft,trl" "bench/kernel_times.py"
#     list b 1 "bench/train.py --rows 7B-qlora"
#     finish
#
# What there is so far is brought to OUT every 15 seconds, in four files: of a command that is cut off, too. Try such a
# script on a CPU first (--size tiny --device cpu): on the GPU a mistake costs the session's time.
. bench/device.sh
export OMP_NUM_THREADS=6
SHARED=${SHARED:-/dev/shm/vlft_bench}
MADE=$(mktemp -d)
BEGAN=$(date +%s)
LISTS=()
mkdir -p "$SHARED"

left() { echo $((${END:-540} - $(date +%s) + BEGAN)); }

prep() { # sizes
  local n=0 waits=()
  python3 bench/workload.py --root "$SHARED" --documents 256 --short 512 >"$MADE/prep-data.txt" 2>&1 & waits+=($!)
  for size in "$@"; do
    CUDA_VISIBLE_DEVICES=$n python3 bench/workload.py "$size" --root "$SHARED" >"$MADE/prep-$size.txt" 2>&1 & waits+=($!)
    n=$((n + 1))
  done
  wait "${waits[@]}"
}

list() { # name, card, commands of Python without --root and --out, which each list has for itself
  local name=$1 card=$2 root
  shift 2
  root=$SHARED-$name # where a later call on a machine that is still warm finds what this one did
  mkdir -p "$root"
  for made in "$SHARED"/model-* "$SHARED"/documents-* "$SHARED"/short-*; do
    [ -e "$made" ] && ln -sfn "$made" "$root"
  done
  (for words in "$@"; do
    [ "$(left)" -lt 25 ] && { echo "## no time for $words"; continue; }
    echo "## at $(($(date +%s) - BEGAN)) s: $words"
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES=$card timeout -k 5 "$(left)" python3 $words --root "$root" --out "$MADE/$name" || echo "## rc $?: $words"
  done >>"$MADE/$name.txt" 2>&1) &
  LISTS+=($!)
}

bring() {
  find "$MADE" -name '*.jsonl' | sort | xargs -r tail -n +1 >"$OUT/lines.txt"
  find "$MADE" -name '*log*.txt' | sort | xargs -r tail -n +1 | tail -c 4000000 >"$OUT/logs.txt"
  find "$MADE" -name 'profile*.txt' | sort | xargs -r tail -n +1 >"$OUT/profiles.txt"
  tail -n +1 "$MADE"/*.txt | tail -c 4000000 >"$OUT/lists.txt"
}

finish() {
  (while sleep 15; do bring; done) & local always=$!
  wait "${LISTS[@]}"
  kill $always
  bring
  grep -h '^## ' "$MADE"/*.txt
}

#!/usr/bin/env bash
# Kills trainers and whole nodes of supervised runs with keepers at random instants, in every phase
# of a snapshot and of a recovery, and judges what becomes of each (tests/fault/run/chaos.py):
#   scripts/chaos.sh [--trials N] [--seed S] [--nodes N] [--parity M] [--node-share F] [--json FILE]
#   --trials N      kills (default 200)
#   --seed S        of the random instants and victims (default: the time)
#   --nodes N       keepers, each with as many trainers as the others (default 3)
#   --ranks N       trainers (default: one for each node)
#   --parity M      nodes of the one group that may be lost together (default 1)
#   --node-share F  of the kills that take a whole node: its trainers, its keeper and its memory
#                   (default 0.2)
#   --batch N       kills of one run at most (default 25)
#   --json FILE     where all trials go
#                   (programs come from build/release, or from the directory in STRETTO_BUILD)
# Exits with 1 when a trial has failed, or, of 100 trials or more, when a phase has less than 10 %,
# and with 2 when it was called wrongly.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,17s/^# \{0,1\}//p' "$0"
  exit 0
fi
build=${STRETTO_BUILD:-$root/build/release}
programs=("$build/tools/stretto-run" "$build/examples/gpt/stretto-gpt"
          "$build/tools/stretto-tokenize" "$build/tools/stretto-keeper")
for program in "${programs[@]}"; do
  [ -x "$program" ] || fail "'$program' is not there; build first (README.md)"
done
run python3 "$root/tests/fault/run/chaos.py" "$@" "${programs[@]}"

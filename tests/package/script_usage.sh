#!/usr/bin/env bash
# What a script was called with wrongly is told in one sentence, and ends it with code 2:
#   script_usage.sh SCRIPTS
set -euo pipefail
scripts=$1
wrong() {
  local said status=0
  said=$("$scripts/$1" "${@:2}" 2>&1) || status=$?
  if [ "$status" != 2 ] || [ "$(wc -l <<< "$said")" != 1 ] || [[ $said != "$1: "* ]]; then
    echo "$*: code $status: $said"
    exit 1
  fi
}
for script in chaos.sh recovery.sh varlen.sh varlen_bench.sh quickstart.sh test.sh; do
  wrong $script --unknown 1
done
for option in "--trials 0" "--trials x" "--nodes 0" "--nodes 3 --ranks 2" "--parity 0" \
  "--nodes 3 --parity 3" "--node-share 1.5" "--node-share nan" "--batch 0" "--json /absent/file" \
  "--json /"; do
  # shellcheck disable=SC2086  # an option and its value
  wrong chaos.sh $option
done
wrong recovery.sh --ranks 0
wrong recovery.sh --set
wrong recovery.sh --launcher srun
# What the program refuses is told in its words.
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
if said=$("$scripts/recovery.sh" --set foo=1 --output "$output/run" 2>&1) ||
  [[ $said != *"--set foo: is not a known name"* ]]; then
  echo "recovery.sh --set foo=1: $said"
  exit 1
fi
# All take their programs from one place.
for script in chaos.sh recovery.sh varlen.sh varlen_bench.sh ../examples/resilience/run.sh; do
  if said=$(STRETTO_BUILD=/absent timeout 20 "$scripts/$script" 2>&1) ||
    [[ $said != "${script##*/}: '/absent/"*"' is not there; build first (README.md)" ]]; then
    echo "STRETTO_BUILD=/absent $script: $said"
    exit 1
  fi
done
wrong varlen_bench.sh --ranks 0
wrong varlen_bench.sh --ranks
wrong varlen_bench.sh --repetitions x
wrong varlen_bench.sh --rate 5
wrong varlen_bench.sh --rate 5mbit --ranks 3
wrong varlen.sh --steps 0
wrong quickstart.sh --steps 0
wrong test.sh --jobs x
wrong fuzz.sh x

# A script that is stopped ends behind what its functions have started.
cat > "$output/slow.sh" << EOF
source "$scripts/common.sh"
slow() { bash -c 'trap "sleep 1; exit" TERM; echo \$\$ > "$output/ready"; while true; do sleep 0.05; done'; true; }
run slow
EOF
bash "$output/slow.sh" 2> /dev/null &
stopped=$!
until [ -s "$output/ready" ]; do sleep 0.05; done
kill "$stopped"
wait "$stopped" || true
if kill -0 "$(cat "$output/ready")" 2> /dev/null; then
  echo "a process of a script that was stopped is left"
  exit 1
fi

#!/usr/bin/env bash
# Runs a program on N ranks of this machine, also as root and with more ranks than cores:
#   scripts/mpirun.sh N PROGRAM [ARGUMENTS...]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: scripts/mpirun.sh RANKS PROGRAM [ARGUMENTS...]" >&2
  exit 2
fi
ranks=$1
shift
[[ $ranks =~ ^[1-9][0-9]*$ ]] || { echo "mpirun.sh: '$ranks' is no number of ranks" >&2; exit 2; }
options=(--oversubscribe --bind-to none --mca btl_vader_single_copy_mechanism none)
[ "$(id -u)" = 0 ] && options+=(--allow-run-as-root)
[ "$ranks" -gt "$(nproc)" ] && options+=(--mca mpi_yield_when_idle 1)
# mpirun gives every rank a terminal, whatever its own output is: say when it is none.
[ -t 1 ] || export TERM=dumb NO_COLOR=1
exec mpirun -np "$ranks" "${options[@]}" "$@"

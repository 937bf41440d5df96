#!/usr/bin/env bash
# Runs a program on N ranks of this machine without MPI, through torchrun's variables:
#   run_env.sh N PROGRAM [ARGUMENTS...]
# Exits with the first failure's status; the other ranks end by themselves.
set -uo pipefail
ranks=$1
shift
export WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 LOCAL_WORLD_SIZE=$ranks
MASTER_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_PORT
pids=()
for ((r = 0; r < ranks; ++r)); do
  RANK=$r LOCAL_RANK=$r "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit $status

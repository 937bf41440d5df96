#!/bin/sh
# Runs read_with_torch.py with the interpreter that STRETTO_PYTHON names: run.sh <checkpoint_parity>
exec "${STRETTO_PYTHON:-python3}" "$(dirname "$0")/read_with_torch.py" "$@"

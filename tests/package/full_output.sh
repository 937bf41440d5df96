#!/usr/bin/env bash
# What a program prints and cannot write is an error, told in one sentence:
#   full_output.sh PROGRAMS...
set -euo pipefail
[ -e /dev/full ] || { echo "SKIP: no /dev/full"; exit 0; }
lost() {
  local said status=0
  said=$("$@" 2>&1 > /dev/full) || status=$?
  if [ "$status" != 1 ] || [[ $said != "standard output could not be written: No space left"* ]] ||
    [ "$(wc -l <<< "$said")" != 1 ]; then
    echo "$*: code $status: $said"
    exit 1
  fi
}
for program in "$@"; do
  case $(basename "$program") in
    stretto-kernel-bench) lost "$program" 1 1 f32 1 ;;
    stretto-erasure-bench) lost "$program" 1 0.0001 ;;
    stretto-plan-bench) ;; # its main is Google Benchmark's
    stretto-config) lost "$program" ;;
    stretto-schedule) lost "$program" --list && lost "$program" --help ;;
    stretto-doctor) lost "$program" --quick && lost "$program" --help ;;
    stretto-keeper)
      STRETTO_JOB_TOKEN=1 lost "$program" --job "full-$$" --socket "$(mktemp -u)" && lost "$program" --help ;;
    *) lost "$program" --help ;;
  esac
done

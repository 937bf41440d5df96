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
# A whole run, which has log lines before that.
lost_run() {
  local work said status=0
  work=$(mktemp -d)
  for i in {1..99}; do echo "line $i"; done > "$work/text"
  "$2" --validation-fraction 0 --output "$work/d" "$work/text" > /dev/null
  cat > "$work/run.json" << END
{"steps": 1, "output": "$work/run", "batch": {"global": 1},
 "model": {"vocabulary": 257, "layers": 1, "hidden": 16, "heads": 2, "max_positions": 16},
 "data": {"train": "$work/d.train.bin", "tokenizer": "bytes", "sequence_length": 16}}
END
  said=$("$1" "$work/run.json" 2>&1 > /dev/full) || status=$?
  rm -r "$work"
  if [ "$status" != 1 ] ||
    [[ $(tail -n 1 <<< "$said") != "standard output could not be written: No space left"* ]]; then
    echo "$1: code $status: $said"
    exit 1
  fi
}
tokenize=
for program in "$@"; do
  [ "$(basename "$program")" != stretto-tokenize ] || tokenize=$program
done
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
    stretto-gpt)
      lost "$program" --help
      [ -z "$tokenize" ] || lost_run "$program" "$tokenize" ;;
    *) lost "$program" --help ;;
  esac
done

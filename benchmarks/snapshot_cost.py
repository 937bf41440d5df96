#!/usr/bin/env python3
"""What a snapshot costs a step: in one run with keepers, the steps under which one was copied and
encoded beside those that were left alone.

usage: snapshot_cost.py [--ranks N] [--steps N] [--every N] [--hidden N] [BUILD_DIRECTORY]

Ranks, keepers and their parity share this machine's cores here; on a node with cores to spare the
keepers take none from the ranks. Prints medians and their ratios, with what fits in between.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, f"{ROOT}/tests/fault")
from support import prepare  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("build", nargs="?", default=f"{ROOT}/build/release")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(f"{options.build}/tools/stretto-tokenize", scratch, {
            "model": {"family": "llama", "layers": 4, "hidden": options.hidden, "heads": 4,
                      "max_positions": 256},
            "data": {"sequence_length": 256, "train": f"{scratch}/text.train.bin"},
            "batch": {"global": 4 * options.ranks, "micro": 2},
            "optimizer": {"schedule": "constant", "lr": 1e-4},
            "runtime": {"threads": 1, "device": "cpu"},
            "checkpoint": {"every": 0},
            "snapshot": {"every": options.every},
            "steps": options.steps,
            "output": f"{scratch}/run",
        })
        with open(f"{scratch}/keeper", "w") as f:
            f.write(f"#!/bin/sh\nexec '{options.build}/tools/stretto-keeper' --trace "
                    f"'{scratch}/trace' \"$@\"\n")
        os.chmod(f"{scratch}/keeper", 0o755)
        done = subprocess.run(
            [f"{options.build}/tools/stretto-run", "--ranks", str(options.ranks), "--launcher",
             "env", "--keepers", str(options.ranks), "--keeper", f"{scratch}/keeper", "--directory",
             f"{scratch}/incidents", "--", f"{options.build}/examples/gpt/stretto-gpt",
             f"{scratch}/config.json"], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        with open(f"{scratch}/run/metrics.jsonl") as lines:
            ms = {r["step"]: r["step_ms"] for r in map(json.loads, lines)}
        with open(f"{scratch}/trace") as lines:
            events = [json.loads(line) for line in lines]
        times = {}
        for e in events:
            if e["step"] > 0 and e["event"] in ("WRITING", "SEALED", "PROTECTED", "COMMITTED"):
                times.setdefault(e["step"], {}).setdefault(e["event"], []).append(e["time"])
        taken = {s: t for s, t in times.items() if len(t.get("COMMITTED", [])) == options.ranks}
    after = [[ms[s + i] for s in taken if s > 2 and s + i in ms]
             for i in range(1, options.every + 1)]
    alone = statistics.median(sum(after[1:], []))
    said = re.search(r"\d+ snapshots taken.*", done.stderr + done.stdout)
    print(said.group(0) if said else "")
    for i, values in enumerate(after):
        median = statistics.median(values)
        print(f"step {i + 1} after a snapshot: {median:8.2f} ms, {median / alone:.3f} of those without")
    for name, begin, end in (("copy", "WRITING", "SEALED"), ("encode", "SEALED", "PROTECTED"),
                             ("commit", "PROTECTED", "COMMITTED")):
        values = [max(t[end]) - (min if name == "copy" else max)(t[begin]) for t in taken.values()]
        print(f"{name:7} {1e3 * statistics.median(values):8.2f} ms")


main()

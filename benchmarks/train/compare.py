#!/usr/bin/env python3
"""Runs several trainers in turns and prints one table of medians and ratios.

usage: compare.py [--rounds 5] [--warm-up 2] --side NAME COMMAND [--side NAME COMMAND]...

A side's speed in one run is the last `"tokens_per_second": X` that it prints; for llm.c, which
prints `step N: ... (took X ms)`, it is --tokens over the median of the times after the warm-up.
The first side is what the others are compared with. Interleaving makes a busy moment of the
machine hit all sides alike.
"""
import argparse
import re
import shlex
import statistics
import subprocess
import sys


def speed(output, tokens, warm_up):
    found = re.findall(r'"tokens_per_second": ([0-9.]+)', output)
    if found:
        return float(found[-1])
    times = [float(t) for t in re.findall(r"took ([0-9.]+) ms", output)][warm_up:]
    return tokens / statistics.median(times) * 1e3 if times else None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="of a step, for sides that print times")
    parser.add_argument("--side", nargs=2, action="append", required=True,
                        metavar=("NAME", "COMMAND"))
    args = parser.parse_args()
    results = {name: [] for name, _ in args.side}
    for i in range(args.rounds):
        for name, command in args.side:
            done = subprocess.run(shlex.split(command), capture_output=True, text=True)
            value = speed(done.stdout, args.tokens, args.warm_up)
            if value is None:
                sys.exit(f"{name}: no speed in its output (exit code {done.returncode}):\n"
                         f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
            results[name].append(value)
            print(f"round {i + 1}: {name}: {value:.1f} tok/s", file=sys.stderr, flush=True)
    first = statistics.median(results[args.side[0][0]])
    print(f"{'side':<28} {'median tok/s':>12} {'least':>9} {'most':>9} {'ratio':>7}")
    for name, values in results.items():
        median = statistics.median(values)
        print(f"{name:<28} {median:>12.1f} {min(values):>9.1f} {max(values):>9.1f} "
              f"{first / median:>6.2f}x")
    print(f"ratio: {args.side[0][0]} over the side; medians of {args.rounds} interleaved runs")


if __name__ == "__main__":
    main()

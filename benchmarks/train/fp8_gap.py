#!/usr/bin/env python3
"""Trains one small model in bf16 and with FP8 layers on the same bytes and prints the gaps in loss.

usage: fp8_gap.py --build BUILD_DIR --text FILE [--steps 500] [--output runs/fp8_gap]
                  [--config configs/quickstart.json] [--set a.b=c]...

BUILD_DIR holds the built stretto-gpt and stretto-tokenize; FILE is plain text of some MB, such as
the one that scripts/quickstart.sh makes. All runs see the same samples in the same order, so that
the gap is that of the arithmetic. To see how much of it is chance, --seeds 3 repeats it all.
"""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
LATE = 50  # steps whose mean loss is compared


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def losses(metrics):
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [r["loss"] for r in records if "loss" in r]
    held_out = [r["eval_loss"] for r in records if "eval_loss" in r]
    late = steps[-LATE:]
    return sum(late) / len(late), held_out[-1], steps[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/fp8_gap"))
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs/quickstart.json")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    text = args.output / "text"
    run([args.build / "tools/stretto-tokenize", "--tokenizer", "bytes", "--output", text,
         "--validation-fraction", "0.1", "--split-documents", "none", args.text])
    print(f"{args.steps} steps; mean loss of the last {LATE}, and held-out loss, in nats")
    for seed in range(args.seeds):
        base = None
        for fp8 in ["none", "e4m3", "hybrid"]:
            output = args.output / f"{fp8}-{seed}"
            shutil.rmtree(output, ignore_errors=True)  # of an earlier call
            settings = {"steps": args.steps, "seed": seed, "output": output,
                        "data.train": f"{text}.train.bin",
                        "data.validation": f"{text}.validation.bin",
                        "runtime.dtype": "bf16", "runtime.fp8": fp8, "optimizer.warmup": args.steps // 20,
                        "evaluate.every": 0, "sample.tokens": 0, "checkpoint.every": 0}
            command = [args.build / "examples/gpt/stretto-gpt", args.config]
            for name, value in settings.items():
                command += ["--set", f"{name}={value}"]
            for change in args.set:
                command += ["--set", change]
            run(command)
            late, held_out, last = losses(output / "metrics.jsonl")
            base = base or (late, held_out)
            gaps = [100 * (value / reference - 1) for value, reference in zip((late, held_out), base)]
            name = "bf16" if fp8 == "none" else fp8
            print(f"seed {seed}  {name:7s} {late:.4f} ({gaps[0]:+.2f} %)  "
                  f"held-out {held_out:.4f} ({gaps[1]:+.2f} %)  last step {last:.4f}", flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Kills a training run again and again, lets it go on, and compares it with one left alone.

usage: kill_and_resume.py GPT_PROGRAM TOKENIZE_PROGRAM MPIRUN_SCRIPT [TRIALS] [SEED] [SETTING=VALUE...]

Each trial: 2 ranks; a random rank gets SIGKILL at a random moment, several times; the run is started
again until it finishes. Its losses must equal those of an undisturbed run bit for bit. Then the same
on 3 ranks from a checkpoint of 2: within 1e-5. SIGTERM must save and leave with code 75. Settings, such
as parallel.pp=2, are those of the 2 ranks. Trials run side by side.
"""
import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support import prepare, ranks_of  # noqa: E402

GPT, TOKENIZE, MPIRUN = sys.argv[1:4]
NUMBERS = [int(a) for a in sys.argv[4:] if "=" not in a]
SETTINGS = [a for a in sys.argv[4:] if "=" in a]
TRIALS = NUMBERS[0] if NUMBERS else 2
SEED = NUMBERS[1] if len(NUMBERS) > 1 else int(time.time())
STEPS = 40


def fail(text):
    raise RuntimeError(f"kill_and_resume (seed {SEED}): {text}")


class Run:
    def __init__(self, scratch, name, steps=STEPS):
        self.output = os.path.join(scratch, name)
        self.scratch, self.steps = scratch, steps

    def command(self, ranks, *extra):
        sets = [f"output={self.output}", f"steps={self.steps}",
                f"data.train={self.scratch}/text.train.bin",
                f"data.validation={self.scratch}/text.validation.bin", *extra]
        return [MPIRUN, str(ranks), GPT, f"{self.scratch}/config.json"] + [
            word for s in sets for word in ("--set", s)]

    def start(self, ranks, *extra):
        return subprocess.Popen(self.command(ranks, *extra), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def finish(self, ranks, *extra):
        done = subprocess.run(self.command(ranks, *extra), capture_output=True, text=True,
                              timeout=120)
        if done.returncode != 0:
            fail(f"exit code {done.returncode}:\n{done.stdout}{done.stderr}")

    def losses(self):
        with open(os.path.join(self.output, "metrics.jsonl")) as lines:
            records = [json.loads(line) for line in lines]
        steps = [r["step"] for r in records]
        if steps != list(range(1, self.steps + 1)):
            fail(f"{self.output}: metrics have the steps {steps}")
        return [(r["loss"], r["grad_norm"], r["eval_loss"] if "eval_loss" in r else None)
                for r in records]


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while time.time() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


hung = []  # trials whose mpirun had to be killed


def kill(scratch, trial, duration, expected):
    """One trial; returns the seconds after which ranks were killed."""
    rng = random.Random(f"{SEED} {trial}")
    moments = []
    run = Run(scratch, f"trial{trial}")
    for _ in range(4):
        process = run.start(2, *SETTINGS)
        wait_for(lambda: len(ranks_of(GPT, process)) == 2 or process.poll() is not None)
        moment = rng.uniform(0, duration)
        time.sleep(moment)
        victims = ranks_of(GPT, process)
        if process.poll() is None and victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            # Open MPI 4.1's mpirun at times waits for a lock of its own for ever once all has ended.
            left = ranks_of(GPT, process)
            process.kill()
            output, _ = process.communicate()
            print(f"trial {trial}: mpirun hung when its ranks were gone", flush=True)
            hung.append(trial)
            if left or len(hung) > 1:
                fail(f"the job hangs:\n{output}")
        if process.returncode == 0:
            break
        moments.append(moment)
        if not wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in victims),
                        seconds=10):
            fail(f"a rank outlived the job:\n{output}")
    run.finish(2, *SETTINGS)
    if run.losses() != expected:
        fail(f"trial {trial}: losses differ from the undisturbed run")
    return moments


def ask(scratch, expected):
    """Asked to stop: saved, exit code 75; then on another number of ranks."""
    run = Run(scratch, "moved")
    process = run.start(2, *SETTINGS)
    metrics = os.path.join(run.output, "metrics.jsonl")
    wait_for(lambda: os.path.exists(metrics) and sum(1 for _ in open(metrics)) > 4)
    for pid in ranks_of(GPT, process):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    if process.returncode not in (0, 75):
        fail(f"SIGTERM ended with code {process.returncode}, not 75:\n{output}")
    if process.returncode == 0:
        print("the run had finished before SIGTERM arrived")
    run.finish(3)
    for step, (a, b) in enumerate(zip(expected, run.losses()), 1):
        if abs(a[0] - b[0]) > 1e-5 * abs(a[0]):
            fail(f"on 3 ranks step {step} has loss {b[0]}, not {a[0]}")
    return process.returncode


def main():
    random.seed(SEED)
    scratch = tempfile.mkdtemp(prefix="stretto kill ")
    try:
        prepare(TOKENIZE, scratch, {
            "model": {"family": "llama", "layers": 2, "hidden": 48, "heads": 4,
                      "max_positions": 64},
            "data": {"sequence_length": 64},
            "batch": {"global": 6, "micro": 2},
            "optimizer": {"schedule": "constant", "lr": 1e-3},
            "runtime": {"threads": 1, "device": "cpu"},
            "evaluate": {"every": 10, "samples": 8},
            "checkpoint": {"every": 3, "keep": 2},
        }, words=lambda: random.choice(["beer", "milk", "ink"]))
        alone = Run(scratch, "alone")
        started = time.time()
        alone.finish(2, *SETTINGS)
        duration = time.time() - started
        expected = alone.losses()
        with concurrent.futures.ThreadPoolExecutor(TRIALS + 1) as pool:
            asked = pool.submit(ask, scratch, expected)
            trials = [pool.submit(kill, scratch, t, duration, expected) for t in range(TRIALS)]
            moments = [m for t in trials for m in t.result()]
        print(f"{TRIALS} trials, killed {len(moments)} times at "
              f"{[round(m, 2) for m in moments]} s of {duration:.2f} s: the same bits")
        print(f"SIGTERM: exit code {asked.result()}; went on with 3 ranks within 1e-5")
    except RuntimeError as error:
        sys.exit(str(error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


main()

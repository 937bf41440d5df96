#!/usr/bin/env python3
"""Kills ranks and keepers of a run whose snapshots live in keepers' memory, and lets it go on.

usage: keeper_and_resume.py GPT_PROGRAM TOKENIZE_PROGRAM KEEPER_PROGRAM MPIRUN_SCRIPT [SEED] [SETTING=VALUE...]

Three nodes are played by three keepers, each with one rank; no checkpoint is written before the end.
A rank gets SIGKILL, then a whole node goes: its keeper is killed and its shared memory unlinked. The
run must go on from a snapshot each time, and its losses must equal those of a run left alone bit for
bit. With two nodes gone at once it must say so and start anew.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support import Nodes, prepare, ranks_of  # noqa: E402

GPT, TOKENIZE, KEEPER, MPIRUN = sys.argv[1:5]
NUMBERS = [int(a) for a in sys.argv[5:] if "=" not in a]
SETTINGS = [a for a in sys.argv[5:] if "=" in a]
SEED = NUMBERS[0] if NUMBERS else int(time.time())
STEPS, NODES = 150, 3
JOB = f"test-{os.getpid()}"


def fail(text):
    sys.exit(f"keeper_and_resume (seed {SEED}): {text}")


class Run:
    def __init__(self, scratch, name, nodes=None):
        self.scratch, self.name, self.nodes = scratch, name, nodes
        self.output = os.path.join(scratch, name)

    def start(self):
        # Relative, and not there at the first start.
        sets = [f"output={self.name}", f"steps={STEPS}",
                f"data.train={self.scratch}/text.train.bin", *SETTINGS]
        program = [GPT, f"{self.scratch}/config.json"] + [w for s in sets for w in ("--set", s)]
        environment = dict(os.environ)
        if self.nodes:
            # Each rank is a node of its own.
            environment["STRETTO_JOB_TOKEN"] = Nodes.TOKEN
            program = ["sh", "-c", 'STRETTO_KEEPER="$0$OMPI_COMM_WORLD_RANK" exec "$@"',
                       f"{self.scratch}/node"] + program
        return subprocess.Popen([MPIRUN, str(NODES)] + program, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True,
                                cwd=self.scratch, env=environment)

    def finish(self):
        process = self.start()
        output, _ = process.communicate(timeout=120)
        if process.returncode != 0:
            fail(f"exit code {process.returncode}:\n{output}")
        return output

    def kill_a_rank_after(self, step):
        """Starts the run, and kills one of its ranks when such a step is committed."""
        process = self.start()
        deadline = time.time() + 60
        while (self.nodes.committed() < step and process.poll() is None
               and time.time() < deadline):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        victims = ranks_of(GPT, process)
        if victims:
            os.kill(random.choice(victims), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        # Its last step is saved on disk, where the next run would find it.
        if process.returncode == 0 or os.path.exists(f"{self.output}/checkpoints"):
            fail(f"the run ended before a rank was killed; raise STEPS:\n{output}")
        return output

    def losses(self):
        with open(os.path.join(self.output, "metrics.jsonl")) as lines:
            records = [json.loads(line) for line in lines]
        if [r["step"] for r in records] != list(range(1, STEPS + 1)):
            fail(f"metrics have the steps {[r['step'] for r in records]}")
        return [(r["loss"], r["grad_norm"]) for r in records]


def restored_step(output):
    found = re.search(r"continuing from the keepers' snapshot of step (\d+)", output)
    return int(found.group(1)) if found else None


def main():
    random.seed(SEED)
    scratch = tempfile.mkdtemp(prefix="stretto-keep-")
    nodes = None
    try:
        prepare(TOKENIZE, scratch, {
            "model": {"family": "llama", "layers": 2, "hidden": 48, "heads": 4,
                      "max_positions": 64},
            "data": {"sequence_length": 64},
            "batch": {"global": 6, "micro": 2},
            "optimizer": {"schedule": "constant", "lr": 1e-3},
            "runtime": {"threads": 1, "device": "cpu"},
        }, words=lambda: random.choice(["beer", "milk", "ink"]))
        alone = Run(scratch, "alone")
        alone.finish()
        expected = alone.losses()

        nodes = Nodes(KEEPER, scratch, JOB, NODES)
        run = Run(scratch, "kept", nodes)
        run.kill_a_rank_after(5)
        # A keeper may still commit what its ranks have left; then the next start finds that. What
        # only some have sealed stays until then. Steps are short beside a snapshot, so that ranks
        # take fewer and fewer: the next new one will do.
        deadline = time.time() + 1
        while not nodes.settled() and time.time() < deadline:
            time.sleep(0.01)
        second = run.kill_a_rank_after(nodes.committed() + 1)
        first_step = restored_step(second)
        if first_step is None or first_step < 5:
            fail(f"after a rank was killed the run did not go on from a snapshot:\n{second}")
        lost = random.randrange(NODES)
        nodes.lose([lost])
        last = run.finish()
        second_step = restored_step(last)
        if second_step is None or second_step <= first_step:
            fail(f"after node {lost} was lost the run did not go on from a rebuilt snapshot:\n{last}")
        if run.losses() != expected:
            fail("losses differ from the undisturbed run")
        print(f"went on from steps {first_step} and, node {lost} rebuilt, {second_step}: the same bits")

        run = Run(scratch, "lost", nodes)
        nodes.lose([0, 1])
        output = run.finish()
        if "too many nodes are gone" not in output or restored_step(output) is not None:
            fail(f"with two of three nodes gone the run did not say so:\n{output}")
        if run.losses() != expected:
            fail("losses of the run that started anew differ")
        print("two nodes gone: said so, and started anew")
        nodes.end()
        nodes = None
    except BaseException:
        if nodes:
            print(nodes.logs())
        raise
    finally:
        if nodes:
            nodes.kill()
        shutil.rmtree(scratch, ignore_errors=True)


main()

#!/usr/bin/env python3
"""Loses a rank inside each kind of communication of a training step and reads what the others say.

usage: faults_inside.py TRAIN_VICTIM TOKENIZE_PROGRAM MPIRUN_SCRIPT RANKS [NAME_OF_CASE]

Each case runs twice: the rank gets SIGKILL, with a long time-out; and SIGSTOP, with a short one. All
the others must end by themselves, non-zero, each with a sentence that names the lost rank and what it
itself waited for, with the axis; one of them waits in the operation where the rank was lost. No
process may stay.
"""
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support import prepare, running  # noqa: E402

VICTIM_PROGRAM, TOKENIZE, MPIRUN = sys.argv[1:4]
RANKS = int(sys.argv[4])
ONLY = sys.argv[5:]
TIMEOUT = 4.0  # of the ranks when one stops; what they may take to find out why is added
NOTICING = 4.0  # that a rank has died: a second, and more on a busy machine
ASKING = 9.0  # the control plane may have to be given up
AT_A_TIME = 12  # they mostly wait

# What a sentence of a survivor has to name besides the rank.
OPERATION = r"\w+\((dp|tp|pp|all)\) seq \d+|(at|coming to|come to) '[^']+'|the checkpoint of step"


class Case:
    """A rank lost at the COUNT-th message of OPERATION after STEPS steps; `partner`: what a survivor
    is in then, where it is not the same operation."""

    def __init__(self, name, victim, operation, settings="", count=2, steps=1, partner=None):
        self.name, self.victim, self.operation = name, victim, operation
        self.settings = settings.split()
        self.count, self.steps, self.partner = count, steps, partner


def pipeline_cases(schedule, settings, last):
    """Both directions, sent and received, on the first and the last rank of a pipeline."""
    settings = f"parallel.schedule={schedule} {settings}"
    sends = r"(send|receive)\(pp\).*"
    return [
        Case(f"{schedule} sends activations", 0, r"send\(pp\).*activations", settings, 5,
             partner=sends),
        Case(f"{schedule} receives gradients", 0, r"receive\(pp\).*gradients", settings, 5,
             partner=sends),
        Case(f"{schedule} sends gradients", last, r"send\(pp\).*gradients", settings, 5,
             partner=sends),
        Case(f"{schedule} receives activations", last, r"receive\(pp\).*activations", settings, 5,
             partner=sends),
    ]


def cases():
    gradients, parameters = r"reduce_scatter\(dp\).*grad bucket", r"all_gather\(dp\).*param bucket"
    if RANKS == 2:
        dp, tp, pp, last = "", "parallel.tp=2", "parallel.pp=2", 1
    else:
        # Survivors outside the lost rank's group too.
        dp, tp, pp, last = ("parallel.tp=2", "parallel.tp=2", "parallel.pp=2", 3)
    yield Case("ZeRO-1 gradients", 1, gradients, dp)
    yield Case("ZeRO-2 gradients", 0, gradients, f"{dp} parallel.zero=2")
    yield Case("ZeRO-3 gradients", 1, gradients, f"{dp} parallel.zero=3")
    yield Case("ZeRO-1 parameters", last, parameters, dp)
    yield Case("ZeRO-3 parameters", 0, parameters, f"{dp} parallel.zero=3", 7)
    yield Case("tensor gather", 1, r"all_gather\(tp\).*attn.qkv gather", tp)
    yield Case("tensor sum", last, r"reduce_scatter\(tp\).* sum\]", tp)
    yield Case("loss merged over the vocabulary", 1, r"all_gather\(tp\).*softmax", tp)
    yield Case("partial gradients", 0, r"reduce_scatter\(tp\).*partial gradients", tp)
    yield from pipeline_cases("1f1b", pp, last)
    yield from pipeline_cases("zb-h1", pp, last)
    yield from pipeline_cases("v-shaped", pp, last if RANKS == 2 else 2)
    tied = r"(send|receive)\(pp\)"
    yield Case("tied gradients", last, r"send\(pp\).*tied gradient", pp, 1, partner=tied)
    yield Case("tied values", 0, r"send\(pp\).*tied values", pp, 1, partner=tied)
    yield Case("norm of the gradient", 1, r"all_reduce\(all\).*step scalars")
    yield Case("evaluation", 0, r"all_reduce\(all\).*evaluation")
    yield Case("broadcast", 0, r"broadcast\(all\).*sample", "parallel.zero=3", 1)
    yield Case("meeting at start", 1, r"'config'", "", 1, 0)
    yield Case("making of the groups", 0, r"'group tp'", "", 1, 0)
    saves = "checkpoint.async=false"
    yield Case("part of a checkpoint", 1, "file", saves, 1, partner="the checkpoint of step")
    yield Case("rank 0's part of a checkpoint", 0, "file", saves, 1,
               partner="the checkpoint of step")


def plain(text):
    """Without numbers, which differ between ranks: of buckets in flight, and sequence numbers."""
    return re.sub(r"\d+", "#", text)


def seconds(output):
    """From the loss of the rank to the last sentence of the others."""
    said = max(map(float, re.findall(r"FAULT rank \d+ at ([\d.]+)", output)))
    return said - float(re.search(r"LOST rank \d+ at ([\d.]+)", output)[1])


def waits_for(case, lost, said):
    """Whether a rank that says this waited for the operation in which the victim was lost."""
    if case.partner:
        return re.search(case.partner, said) is not None
    if re.search(re.escape(plain(lost).split(" seq")[0]), plain(said)):
        return True
    # Several are in flight on an axis, and the victim may have left those before it first.
    operation = re.search(r"(\(\w+\)) seq (\d+)", lost)
    before = operation and re.search(rf"waited for \w+{re.escape(operation[1])} seq (\d+)", said)
    return bool(before) and int(operation[2]) - 4 <= int(before[1]) < int(operation[2])


def judge(case, which, code, output):
    """What is wrong with the end of a job; empty: nothing."""
    lost = re.search(r"LOST rank \d+ at [\d.]+ inside (.*)", output)
    if not lost:
        return "the rank was never in this operation"
    if code == 0:
        return "the job ended with status 0"
    faults = dict(re.findall(r"FAULT rank (\d+) at [\d.]+: (.*)", output))
    partners = 0
    for rank in map(str, range(RANKS)):
        if rank == str(case.victim):
            continue
        said = faults.get(rank)
        if said is None:
            return f"rank {rank} said nothing"
        if not re.search(rf"ranks? (\d+, )*{case.victim}\b", said):
            return f"rank {rank} does not name rank {case.victim}"
        if not re.search(OPERATION, said):
            return f"rank {rank} does not name an operation with its axis"
        if re.search(r"\(?group \d", said):
            return f"rank {rank} speaks of a group without its axis's name"
        partners += waits_for(case, lost[1], said)
    if partners == 0:
        return f"nobody was in {lost[1]}"
    limit = NOTICING if which == signal.SIGKILL else TIMEOUT + ASKING
    return f"it took {seconds(output):.1f} s" if seconds(output) > limit else ""


def run(case, which, scratch):
    """Runs one job and returns its report and whether it is as it should be."""
    name = f"{'SIGKILL' if which == signal.SIGKILL else 'SIGSTOP'} in {case.name}"
    output = os.path.join(scratch, name.replace(" ", "_").replace("'", ""))
    timeout = 120 if which == signal.SIGKILL else TIMEOUT
    settings = [*case.settings, f"runtime.timeout_seconds={timeout}", f"output={output}",
                f"data.train={scratch}/text.train.bin",
                f"data.validation={scratch}/text.validation.bin"]
    command = [MPIRUN, str(RANKS), VICTIM_PROGRAM, f"{scratch}/config.json", str(case.victim),
               str(int(which)), case.operation, str(case.count), str(case.steps), *settings]
    # mpirun ends the others a second after the first has ended: too early where several jobs share a
    # core or two.
    environment = {**os.environ, "TMPDIR": scratch, "OMPI_MCA_odls_base_sigkill_timeout": "2"}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=environment)
    problem = ""
    try:
        text, _ = job.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        problem = "the job hangs"
        job.kill()
        text, _ = job.communicate()
    pids = [int(p) for p in re.findall(r"^PID \d+ (\d+)$", text, re.M)]
    gone = time.time() + 5
    while any(map(running, pids)) and time.time() < gone:
        time.sleep(0.05)
    left = [p for p in pids if running(p)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    problem = (problem or (f"{len(left)} processes stayed" if left else "")
               or judge(case, which, job.returncode, text))
    if problem:
        return f"FAILED: {name}: {problem}\n  {' '.join(command)}\n{text}", False
    return f"{name}: {seconds(text):.1f} s: {re.search('FAULT (.*)', text)[1]}", True


def main():
    scratch = tempfile.mkdtemp(prefix="stretto-faults-")
    try:
        prepare(TOKENIZE, scratch, {
            "model": {"family": "gpt2", "layers": 4, "hidden": 16, "heads": 4,
                      "max_positions": 16},
            "data": {"sequence_length": 16},
            "batch": {"global": 8, "micro": 1},
            "steps": 4,
            "parallel": {"bucket_bytes": 4096},
            "runtime": {"threads": 1, "device": "cpu"},
            "evaluate": {"samples": 4},
            "checkpoint": {"resume": "never"},
        })
        jobs = [(case, which) for case in cases() for which in (signal.SIGSTOP, signal.SIGKILL)
                if not ONLY or case.name in ONLY]
        good = True
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            for report, sound in pool.map(lambda job: run(*job, scratch), jobs):
                print(report, flush=True)
                good = good and sound
        print(f"{len(jobs)} jobs of {RANKS} ranks")
        sys.exit(0 if good and jobs else 1)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


main()

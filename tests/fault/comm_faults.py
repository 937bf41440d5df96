#!/usr/bin/env python3
"""Kills, stops and asks ranks while they all-reduce, and looks at what the others say. The cases run
side by side, because they mostly wait.

usage: comm_faults.py PROGRAM LAUNCHER...
LAUNCHER... is followed by PROGRAM and its arguments, e.g. `scripts/mpirun.sh 3`.
"""
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

from support import running

PROGRAM, LAUNCHER = sys.argv[1], sys.argv[2:]
RANKS = int(LAUNCHER[1])


class Failure(Exception):
    pass


class Job:
    def __init__(self, timeout_ms, directory, *absent):
        self.process = subprocess.Popen(
            LAUNCHER + [PROGRAM, str(timeout_ms), directory, *map(str, absent)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        self.lines = []
        self.pids = {}
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        deadline = time.time() + 60
        while len(self.pids) < RANKS:
            if time.time() > deadline or self.process.poll() is not None:
                self.end()
                fail("the ranks did not start", self)
            time.sleep(0.02)
        time.sleep(0.7)  # the watchdogs have published something

    def read(self):
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip()))
            for rank, pid in re.findall(r"rank (\d+) pid (\d+)", line):
                self.pids[int(rank)] = int(pid)

    def wait(self, seconds):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def alive(self):
        return [r for r, pid in self.pids.items() if running(pid)]

    def end(self):
        for pid in self.pids.values():
            if running(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.reader.join()


def fail(why, job):
    job.end()
    raise Failure("\n".join([why, *(f"  {when:.2f} {line}" for when, line in job.lines)]))


def verdict(job, victim, pattern, begin, seconds):
    """All ranks end by themselves, non-zero, and somebody says what `pattern` asks for."""
    status = job.wait(seconds)
    if status is None:
        fail(f"the job hangs after {seconds} s", job)
    if status == 0:
        fail("the job ended with status 0", job)
    deadline = time.time() + 10
    while job.alive() and time.time() < deadline:
        time.sleep(0.05)
    if job.alive():
        fail(f"ranks {job.alive()} still run", job)
    job.end()
    said = [(when, line) for when, line in job.lines if re.search(pattern, line)]
    if not said:
        fail(f"nobody said '{pattern}'", job)
    return f"{said[0][0] - begin:.2f} s: {said[0][1]}"


def killed(victim):
    """kill -9 of a rank"""
    with tempfile.TemporaryDirectory() as directory:
        job = Job(60000, directory)
        begin = time.time()
        os.kill(job.pids[victim], signal.SIGKILL)
        return verdict(job, victim, rf"FAULT.*rank {victim} died", begin, 20)


def killed_in_setup(victim):
    """kill -9 of a rank while the others agree on a step of set-up"""
    with tempfile.TemporaryDirectory() as directory:
        job = Job(60000, directory, victim)
        begin = time.time()
        os.kill(job.pids[victim], signal.SIGKILL)
        return verdict(job, victim,
                       rf"FAULT.*rank {victim} (has left or )?died.*'loading the data'", begin, 20)


def stopped(victim):
    """SIGSTOP of a rank"""
    with tempfile.TemporaryDirectory() as directory:
        job = Job(2000, directory)
        begin = time.time()
        os.kill(job.pids[victim], signal.SIGSTOP)
        pattern = rf"FAULT.*rank {victim} " if victim else "FAULT.*rank 0 is stopped"
        deadline = time.time() + 30
        while not any(re.search(pattern, line) for _, line in job.lines):
            if time.time() > deadline:
                fail(f"nobody said '{pattern}'", job)
            time.sleep(0.05)
        time.sleep(0.5)
        if running(job.pids[victim]):
            os.kill(job.pids[victim], signal.SIGCONT)
        return verdict(job, victim, pattern, begin, 30)


def asked(victim):
    """SIGUSR2 to every rank"""
    with tempfile.TemporaryDirectory() as directory:
        job = Job(60000, directory)
        for pid in job.pids.values():
            os.kill(pid, signal.SIGUSR2)
        paths = [f"{directory}/flight-rank{r}.json" for r in range(RANKS)]
        deadline = time.time() + 10
        while not all(os.path.exists(p) for p in paths):
            if time.time() > deadline:
                fail("no dump came", job)
            time.sleep(0.05)
        for rank, path in enumerate(paths):
            with open(path) as f:
                dump = json.load(f)
            if dump["rank"] != rank or not any(
                    r["label"] == "grad bucket" and r["op"] == "all_reduce"
                    for r in dump["records"]):
                fail(f"{path} does not hold the all-reduces", job)
        if len(job.alive()) != RANKS:
            fail("a rank ended because of the signal", job)
        job.end()
        return "a dump of each"


def main():
    cases = [(asked, 0), (killed, RANKS - 1), (killed, 0), (killed_in_setup, RANKS - 1),
             (killed_in_setup, 0), (stopped, 1), (stopped, 0)]
    good = True
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        jobs = [(case.__doc__, victim, pool.submit(case, victim)) for case, victim in cases]
        for name, victim, job in jobs:
            try:
                print(f"{name} ({victim}): {job.result()}", flush=True)
            except Failure as failure:
                print(f"FAILED: {name} ({victim}): {failure}", flush=True)
                good = False
    sys.exit(0 if good else 1)


main()

#!/usr/bin/env python3
"""Harms a training job that stretto-run supervises, and sees what becomes of it.

usage: supervised.py CASE mpi|env STRETTO_RUN GPT_PROGRAM TOKENIZE_PROGRAM KEEPER_PROGRAM
"""
import glob
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support  # noqa: E402
from support import prepare  # noqa: E402

CASE, LAUNCHER, STRETTO_RUN, GPT, TOKENIZE, KEEPER = sys.argv[1:7]
STEPS = 80
MARK = f"STRETTO_TEST_MARK={os.getpid()}-{time.time()}"


def check(condition, text):
    if not condition:
        sys.exit(f"{CASE} with {LAUNCHER}: {text}")


def wait_for(condition, what, seconds=60):
    deadline = time.time() + seconds
    while time.time() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    check(False, f"waited {seconds} s for {what}")


def marked():
    """The processes that came of this test's jobs."""
    return support.marked(MARK)


class Job:
    def __init__(self, scratch, name, *options, settings=(), program=(GPT,)):
        self.output, self.incidents = f"{scratch}/{name}", f"{scratch}/{name} incidents"
        self.log = open(f"{scratch}/{name}.log", "w+")
        sets = [f"output={self.output}", f"steps={STEPS}", *settings]
        command = [STRETTO_RUN, "--ranks", "2", "--launcher", LAUNCHER, "--directory",
                   self.incidents, "--delay", "0.1", "--grace", "2", "--mpirun",
                   "mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1",
                   *options, "--", *program, f"{scratch}/config.json"]
        command += [word for s in sets for word in ("--set", s)]
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, start_new_session=True,
            env={**os.environ, **dict([MARK.split("=")]), "TMPDIR": scratch})

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def end(self, code):
        """Waits for the end, which must have this code and leave no process."""
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            check(False, f"stretto-run does not end:\n{self.text()}")
        left = marked()
        check(not left, f"processes {left} are left:\n{self.text()}")
        check(self.process.returncode == code,
              f"ended with {self.process.returncode}, not {code}:\n{self.text()}")
        check(not glob.glob(f"{self.incidents}/live-*"), "the live directory is left")

    def step(self):
        """Steps that rank 0 has done since its last start."""
        try:
            with open(glob.glob(f"{self.incidents}/live-*/rank-0.progress")[0]) as f:
                name, _, step = f.read()[192:].split()
                return int(step) if name == "step" else 0
        except (IndexError, OSError, ValueError):
            return 0

    def pid(self, rank):
        path = glob.glob(f"{self.incidents}/live-*/rank-{rank}.events")[0]
        with open(path) as f:
            return json.loads(f.readline())["pid"]

    def reaches(self, step):
        """Whether it comes to this step and still runs then."""
        wait_for(lambda: self.step() >= step or self.process.poll() is not None, f"step {step}")
        return self.process.poll() is None

    def records(self, count=STEPS):
        """Of all steps."""
        with open(f"{self.output}/metrics.jsonl") as lines:
            records = [json.loads(line) for line in lines]
        steps = [r["step"] for r in records]
        check(steps == list(range(1, count + 1)), f"metrics have the steps {steps}")
        return [(r["loss"], r["grad_norm"], r.get("eval_loss")) for r in records]

    def reports(self):
        reports = []
        for path in sorted(glob.glob(f"{self.incidents}/incident-*/report.json")):
            with open(path) as f:
                reports.append(json.load(f))
            check(os.path.getsize(path.replace(".json", ".txt")) > 100, "the text is short")
        return reports


def harmed(scratch, name, harm, *options, step=11, **more):
    """A job that came to the step and was harmed there; again if it was done before that."""
    for trial in range(6):
        job = Job(scratch, f"{name} {trial}", *options, **more)
        try:
            if job.reaches(step):
                harm(job)
                return job
        except (IndexError, ProcessLookupError):
            pass
        check(job.process.wait(timeout=120) == 0, f"ended before it was harmed:\n{job.text()}")
    check(False, "was always done before it could be harmed")


def send(which, rank=1):
    return lambda job: os.kill(job.pid(rank), which)


def undisturbed(scratch):
    job = Job(scratch, "undisturbed")
    job.end(0)
    check(not os.path.exists(job.incidents), "an incident without a failure")
    return job.records()


def check_recovered(job, expected, kind, signal_name):
    """One failure of rank 1, and nothing in the losses tells of it."""
    check(job.records() == expected, "the losses differ from those of an undisturbed run")
    reports = job.reports()
    check(len(reports) == 1, f"{len(reports)} incidents:\n{job.text()}")
    report = reports[0]
    check(report["kind"] == kind and report["first"] == [1] and report["signal"] == signal_name,
          f"the report blames the wrong one: {report}")
    check(report["last_step"] >= 11, f"last step {report['last_step']}")
    check(report["restored_step"] == report["last_step"] - report["steps_lost"]
          and report["restored_step"] % 3 == 0, f"restored step {report['restored_step']}")
    check(all(isinstance(s, float) and s >= 0 for s in report["seconds"].values()),
          f"seconds {report['seconds']}")
    check("1 incident: rank 1 was " in job.text().splitlines()[-1], f"history:\n{job.text()}")
    return report


def killed(scratch):
    expected = undisturbed(scratch)
    job = harmed(scratch, "killed", send(signal.SIGKILL))
    job.end(0)
    report = check_recovered(job, expected, "killed", "SIGKILL")
    # The dead rank took its record along, the other one says what it waited for.
    check(report["ranks"][1]["operation"] == "unknown", f"{report['ranks'][1]}")
    check("(" in report["ranks"][0]["last_operation"], f"{report['ranks'][0]}")
    check("rank 1" in report["ranks"][0]["said"], f"{report['ranks'][0]}")


def stopped(scratch):
    expected = undisturbed(scratch)
    job = harmed(scratch, "stopped", send(signal.SIGSTOP), "--stall", "2")
    job.end(0)
    report = check_recovered(job, expected, "stopped", "SIGSTOP")
    check(report["seconds"]["detect"] >= 1, f"{report['seconds']}")
    check(report["ranks"][0]["operation"].startswith(("all_", "reduce_")), f"{report['ranks'][0]}")


def asked(scratch, *options):
    job = harmed(scratch, "asked", lambda job: job.process.send_signal(signal.SIGTERM), *options,
                 settings=["steps=100000"])
    job.end(75)
    with open(f"{job.output}/metrics.jsonl") as lines:
        steps = sum(1 for _ in lines)
    check(os.path.exists(f"{job.output}/checkpoints/step-{steps:08}"), f"step {steps} is not saved")
    check(not job.reports(), "being asked to stop is no incident")
    records = []
    for name in (os.path.basename(job.output), "undisturbed"):
        job = Job(scratch, name, settings=[f"steps={steps + 10}"])
        job.end(0)
        records.append(job.records(steps + 10))
    check(records[0] == records[1], "the losses differ from those of an undisturbed run")


def asked_again(scratch):
    """Guards and launchers do not ask all ranks in one moment: some are on their way out then."""
    def ask(job):
        left = [job.pid(rank) for rank in range(2)]
        while left:
            for pid in list(left):
                try:
                    os.kill(pid, signal.SIGUSR1)
                except ProcessLookupError:
                    left.remove(pid)
            time.sleep(0.001)

    harmed(scratch, "again", ask, "--restarts", "0", settings=["steps=100000"]).end(75)


def asked_deaf(scratch):
    """By way of an mpirun that passes no signal on."""
    launcher = f"{scratch.replace(' ', '_')}.mpirun"
    with open(launcher, "w") as f:
        f.write("#!/bin/bash\ntrap '' USR1 USR2\nmpirun --oversubscribe \"$@\" &\n"
                "trap 'kill $!' TERM\nwait $!\nwait $!\n")
    os.chmod(launcher, 0o755)
    try:
        asked(scratch, "--mpirun", launcher)
    finally:
        os.remove(launcher)


def asked_early(scratch):
    """While the launcher still starts ranks it passes nothing on to them."""
    for i, seconds in enumerate((0, 0.1, 0.3, 0.6)):
        job = Job(scratch, f"early{i}", settings=["steps=100000"])
        # Before that it is a process like any other, and has started nothing.
        wait_for(lambda: glob.glob(f"{job.incidents}/live-*"), "the live directory")
        time.sleep(seconds)
        job.process.send_signal(signal.SIGTERM)
        begin = time.time()
        try:
            code = job.process.wait(timeout=60)  # of --save's 120
        except subprocess.TimeoutExpired:
            job.process.kill()
            check(False, f"asked after {seconds} s it does not end:\n{job.text()}")
        print(f"asked after {seconds} s: {time.time() - begin:.1f} s, code {code}")
        check(code in (75, 76), f"asked after {seconds} s: code {code}\n{job.text()}")
        check(not job.reports(), "being asked to stop is no incident")


def orphaned(scratch):
    """SIGKILL to stretto-run itself."""
    def kill(job):
        check(len(marked()) >= 5, "two ranks, two guards and stretto-run were expected")
        job.process.kill()

    # Longer than this waits: they must not end by being done.
    job = harmed(scratch, "orphaned", kill, step=3, settings=["steps=1000000"])
    job.process.wait()
    wait_for(lambda: not marked(), f"the end of {marked()}", seconds=10)


def misconfigured(scratch):
    job = Job(scratch, "misconfigured", settings=["parallel.dp=3"])
    job.end(2)
    reports = job.reports()
    check(len(reports) == 1 and reports[0]["code"] == 2, f"{reports}")
    check(reports[0]["decision"].startswith("no restart: exit code 2"), reports[0]["decision"])
    check(job.text().count("parallel.dp is 3 but 2 ranks run") == 1,
          f"the reason is not said once:\n{job.text()}")


def refused(scratch):
    """By an mpirun that does not know its option, and one that has no place for the ranks."""
    for name, mpirun in (("option", "mpirun --no-such-option"),
                         ("slots", "mpirun --host localhost:1")):
        job = Job(scratch, name, "--mpirun", mpirun)
        job.end(1)
        reports = job.reports()
        check([r["kind"] for r in reports] == ["launcher"] * 2, f"{name}: {reports}\n{job.text()}")
        said = " ".join(reports[1]["launcher_said"])
        check(("no-such-option" if name == "option" else "slots") in said, f"{name}: it said {said}")
        check("before it had started any rank (\"" in job.text(), job.text())
        check("gave up: the launcher started no rank in 2 tries" in job.text(), job.text())


def repeated(scratch):
    """Fails after the same step each time."""
    job = Job(scratch, "repeated", settings=["spikes.max_loss=0.1", "spikes.max_skipped=4"])
    job.end(1)
    reports = job.reports()
    check([r["kind"] for r in reports] == ["exited"] * 3, f"{[r['kind'] for r in reports]}")
    check([r["last_step"] for r in reports] == [3] * 3, f"{[r['last_step'] for r in reports]}")
    check("gave up: the same failure came 3 times after step 3" in job.text(), job.text())


def fewer(scratch):
    """Rank 1 of 2 is lost again and again."""
    expected = undisturbed(scratch)
    program = f"{scratch}/program"
    with open(program, "w") as f:
        f.write("#!/bin/sh\n"
                "[ $WORLD_SIZE$RANK = 21 ] && [ $STRETTO_RESTARTS -gt 0 ] && kill -9 $$\n"
                f'exec {shlex.quote(GPT)} "$@"\n')
    os.chmod(program, 0o755)
    job = harmed(scratch, "fewer", send(signal.SIGKILL), "--min-ranks", "1", program=(program,))
    job.end(0)
    for step, (a, b) in enumerate(zip(expected, job.records()), 1):
        check(abs(a[0] - b[0]) <= 1e-5 * abs(a[0]), f"step {step} has loss {b[0]}, not {a[0]}")
    reports = job.reports()
    check([r["size"] for r in reports] == [2, 2], f"{[r['size'] for r in reports]}")
    check("on with 1 of 2 ranks" in reports[1]["decision"], reports[1]["decision"])


def keepers(scratch):
    """They outlive the ranks, and end with the job."""
    program = f"{scratch}/keeper"
    with open(program, "w") as f:
        f.write(f"#!/bin/sh\necho $$ >> '{scratch}/started'\nexec {shlex.quote(KEEPER)} \"$@\"\n")
    os.chmod(program, 0o755)
    trainer = f"{scratch}/trainer"
    with open(trainer, "w") as f:
        f.write(f"#!/bin/sh\necho $RANK $STRETTO_KEEPER >> '{scratch}/found'\n"
                f'[ -n "$STRETTO_JOB_TOKEN" ] && exec {shlex.quote(GPT)} "$@"\n')
    os.chmod(trainer, 0o755)
    job = harmed(scratch, "keepers", send(signal.SIGKILL), "--keepers", "2", "--keeper", program,
                 program=(trainer,))
    job.end(0)
    with open(f"{scratch}/started") as f:
        check(len(f.readlines()) == 2, "the keepers did not outlive the ranks")
    with open(f"{scratch}/found") as f:
        found = sorted(f.read().split("\n"))[1:]
    check(len(found) == 4 and found[0] == found[1] and found[2] == found[3]
          and found[0][2:] != found[2][2:], f"the ranks found {found}")


def snapshots(scratch):
    """With nothing on disk the job goes on from what keepers hold in memory."""
    expected = undisturbed(scratch)
    segments = set(os.listdir("/dev/shm"))
    job = harmed(scratch, "snapshots", send(signal.SIGKILL), "--keepers", "2", "--keeper", KEEPER,
                 step=20, settings=("checkpoint.every=0", "snapshot.every=1"))
    job.end(0)
    report = job.reports()[0]
    check(job.records() == expected, "the losses differ from those of an undisturbed run")
    # Steps are so short here that some snapshots are passed over.
    check(0 < report["restored_step"] <= report["last_step"], f"{report}")
    check(report["steps_lost"] == report["last_step"] - report["restored_step"], f"{report}")
    left = set(os.listdir("/dev/shm")) - segments
    check(not any("stretto" in name for name in left), f"shared memory {left} is left")


def main():
    scratch = tempfile.mkdtemp(prefix="stretto run ")
    random.seed(1)
    try:
        prepare(TOKENIZE, scratch, {
            "model": {"family": "llama", "layers": 2, "hidden": 48, "heads": 4,
                      "max_positions": 64},
            "data": {"sequence_length": 64, "train": f"{scratch}/text.train.bin",
                     "validation": f"{scratch}/text.validation.bin"},
            "batch": {"global": 6, "micro": 2},
            "optimizer": {"schedule": "constant", "lr": 1e-3},
            "runtime": {"threads": 1, "device": "cpu"},
            "evaluate": {"every": 10, "samples": 8},
            "checkpoint": {"every": 3, "keep": 2},
        }, words=lambda: random.choice(["beer", "milk", "ink"]))
        {f.__name__: f for f in (killed, stopped, asked, asked_again, asked_deaf, asked_early,
                                 orphaned, misconfigured, refused, repeated, fewer, keepers,
                                 snapshots)}[CASE](scratch)
    finally:
        for pid in marked():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


main()

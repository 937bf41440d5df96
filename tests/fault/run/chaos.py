#!/usr/bin/env python3
"""Kills trainers and whole nodes of supervised runs with keepers at random instants, and sees what
becomes of it. Each kill is a trial; scripts/chaos.sh runs it.

usage: chaos.py [options] STRETTO_RUN GPT_PROGRAM TOKENIZE_PROGRAM KEEPER_PROGRAM

A trial aims at a phase: compute, capture, encode, commit and spill of snapshots, or the recovery
from the kill before. Which one it has hit is found afterwards, in the keepers' traces and the
ranks' marks. Then:
- the job goes on from the newest step that was committed anywhere when it was hit, or a newer one;
- the steps lost are at most k + 1, k being how many steps apart snapshots were there, with those
  that were passed over;
- every loss is that of a run that was left alone, and none is missing;
- nothing hangs; no process, shared memory or socket is left.
"""
import argparse
import collections
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
from support import marked, prepare, running  # noqa: E402

PHASES = ("compute", "capture", "encode", "commit", "spill", "recovery")
# Which event begins a phase, and how many milliseconds the keepers make of it: too short to be hit
# otherwise.
BEGINS = {"capture": "seal", "encode": "encode", "commit": "commit", "spill": "spill"}
PAUSES = {"seal": 3, "encode": 6, "commit": 6, "spill": 80}
STEPS = 2000
MOST_NODES = 8  # that one run may lose: stretto-run starts 10 keepers again
PATIENCE = 60
MARK = f"STRETTO_TEST_MARK=chaos-{os.getpid()}-{time.time()}"


class Failure(Exception):
    pass


def check(condition, text):
    if not condition:
        raise Failure(text)


class Trace:
    """What the keepers of a run have written so far."""

    def __init__(self, path):
        open(path, "w").close()
        self.file = open(path)
        self.rest = ""
        self.events = []

    def read(self):
        """The new events."""
        lines = (self.rest + self.file.read()).split("\n")
        self.rest = lines.pop()
        new = [json.loads(line) for line in lines]
        self.events += new
        return new


class Run:
    """A supervised job with keepers; it ends when it is asked to."""

    def __init__(self, options, scratch, name, keepers):
        self.name, self.keepers = name, keepers
        self.output, self.incidents = f"{scratch}/{name}", f"{scratch}/{name}-incidents"
        self.job = f"chaos-{os.getpid()}-{name}"
        self.log = open(f"{scratch}/{name}.log", "w+")
        self.kills = []  # (time, nodes)
        self.restored = 0  # when it last was
        self.trace = Trace(f"{scratch}/{name}.trace")
        program = f"{scratch}/{name}-keeper"
        slow = ",".join(f"{event}={ms}" for event, ms in PAUSES.items())
        with open(program, "w") as f:
            f.write("#!/bin/sh\nexec " + shlex.join(
                [options.keeper, "--trace", f"{scratch}/{name}.trace", "--slow", slow,
                 "--dir-every", "0.4"]) + ' "$@"\n')
        os.chmod(program, 0o755)
        command = [options.stretto_run, "--ranks", str(options.ranks), "--launcher", "env",
                   "--directory", self.incidents, "--job", self.job, "--grace", "2", "--delay", "0",
                   "--delay-cap", "0", "--restarts", "100000", "--window", "0", "--same", "0"]
        if keepers:
            command += ["--keepers", str(options.nodes), "--keeper", program, "--keeper-dir",
                        f"{self.output}/checkpoints"]
            if options.parity is not None:
                command += ["--data", str(options.nodes - options.parity), "--parity",
                            str(options.parity)]
        command += ["--", options.gpt, f"{scratch}/config.json", "--set", f"output={self.output}",
                    "--set", f"steps={STEPS if keepers else options.steps}"]
        key, value = MARK.split("=")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log,
                                        start_new_session=True, env={**os.environ, key: value})

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def wait(self, condition, what):
        """Until the condition holds; with the keepers' events read in between."""
        deadline = time.time() + PATIENCE
        while time.time() < deadline:
            self.trace.read()
            found = condition()
            if found:
                return found
            check(self.process.poll() is None,
                  f"stretto-run has ended with {self.process.returncode}, waiting for {what}")
            time.sleep(0.0005)
        raise Failure(f"it hangs: waited {PATIENCE} s for {what}")

    def pids(self):
        """Of the ranks that have been started and of which no end is known."""
        found = {}
        for path in glob.glob(f"{self.incidents}/live-*/rank-*.events"):
            try:
                with open(path) as f:
                    found[int(path.rsplit("-", 1)[1].split(".")[0])] = json.loads(f.readline())["pid"]
            except (OSError, ValueError):
                continue
        return found

    def keeper_pid(self, node):
        for pid in marked(MARK):
            try:
                with open(f"/proc/{pid}/cmdline") as f:
                    words = f.read().split("\0")
            except OSError:
                continue
            if "--nodes" in words and words[words.index("--node") + 1] == str(node):
                return pid
        return None

    def marks(self, live=None):
        """When the ranks of the present start had met, were restored, had done their first step."""
        found = collections.defaultdict(list)
        for path in glob.glob(f"{live or self.incidents + '/live-*'}/rank-*.progress"):
            try:
                with open(path) as f:
                    text = f.read()
            except OSError:
                continue
            for i, name in enumerate(("met", "restored", "first")):
                words = text[i * 64:(i + 1) * 64].split()
                if len(words) == 3:
                    found[name].append((int(words[1]) * 1e-6, int(words[2])))
        return found

    def reports(self):
        found = []
        for path in sorted(glob.glob(f"{self.incidents}/incident-*/report.json")):
            try:
                with open(path) as f:
                    report = json.load(f)
            except (OSError, ValueError):
                continue
            for values in (report, report["seconds"]):
                values.update({k: None for k, v in values.items() if v == "unknown"})
            found.append(report)
        return found

    def committed(self, until=float("inf")):
        return max((e["step"] for e in self.trace.events
                    if e["event"] == "COMMITTED" and e["time"] <= until), default=0)

    def end(self, expected):
        """Asks it to save and end; looks at all that it leaves."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failure("it hangs: asked to stop, it does not end") from None
        check(self.process.returncode in (0, 75), f"it ended with {self.process.returncode}")
        left = marked(MARK)
        check(not left, f"processes {left} are left")
        left = glob.glob(f"/dev/shm/stretto-{self.job}-*")
        check(not left, f"shared memory {left} is left")
        left = glob.glob(f"/tmp/stretto-{os.getuid()}/{self.job}-*.sock")
        check(not left, f"sockets {left} are left")
        records = losses(self.output)
        check([r[0] for r in records] == list(range(1, len(records) + 1)),
              f"the records have the steps {[r[0] for r in records]}")
        check(len(records) <= len(expected), "more steps than the undisturbed run has")
        for got, wanted in zip(records, expected):
            check(got == wanted, f"step {got[0]} has {got[1:]}, undisturbed {wanted[1:]}")
        return len(records)

    def kill_all(self):
        for pid in marked(MARK):
            os.kill(pid, signal.SIGKILL)
        remove(glob.glob(f"/dev/shm/stretto-{self.job}-*")
               + glob.glob(f"/tmp/stretto-{os.getuid()}/{self.job}-*"))


def remove(paths):
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:  # a keeper that starts removes them, too
            pass


def losses(output):
    with open(f"{output}/metrics.jsonl") as lines:
        records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["grad_norm"], r.get("eval_loss")) for r in records]


def snapshot_phase(events, nodes, moment, lost):
    """What the keepers were about at the moment. `lost`: (time, nodes) of keepers that were killed."""
    state, spilling = [{} for _ in range(nodes)], [False] * nodes
    lost = sorted(lost)
    for e in sorted((e for e in events if e["time"] <= moment), key=lambda e: e["time"]):
        while lost and lost[0][0] <= e["time"]:
            for node in lost.pop(0)[1]:
                state[node], spilling[node] = {}, False
        node, name, key = e["node"], e["event"], (e["round"], e["step"])
        if name == "EMPTY":
            state[node].pop(key, None)
        elif name.isupper():
            state[node][key] = name
        elif name in ("spill", "spilled"):
            spilling[node] = name == "spill"
    if any(spilling):
        return "spill"
    newest = max((key for held in state for key in held), default=None)
    where = [held.get(newest) for held in state]
    if newest is None or all(s == "COMMITTED" for s in where):
        return "compute"
    if None in where or "WRITING" in where:
        return "capture"
    return "encode" if "SEALED" in where else "commit"


class Chaos:
    def __init__(self, options, scratch, expected):
        self.options, self.scratch, self.expected = options, scratch, expected
        self.trials, self.failures = [], []

    def next_aim(self):
        """Any phase, or the one that was hit least."""
        if random.random() < 0.5:
            return random.choice(PHASES)
        hit = collections.Counter(t["phase"] for t in self.trials)
        return min(PHASES, key=lambda phase: (hit[phase], random.random()))

    def batch(self, number):
        """One run that is hit again and again."""
        run = Run(self.options, self.scratch, f"run{number}", keepers=True)
        try:
            first, nodes_lost = len(self.trials), 0
            while (len(self.trials) < self.options.trials
                   and len(self.trials) - first < self.options.batch):
                trials = self.hit(run, whole_nodes=nodes_lost < MOST_NODES)
                nodes_lost += sum(1 for t in trials if t["killed"] == "node")
                if run.committed() > len(self.expected) - 60:
                    break
            steps = run.end(self.expected)
            print(f"run {number}: {len(self.trials) - first} kills in {steps} steps", flush=True)
        except Failure as failure:
            self.failures.append(f"run {number}, seed {self.options.seed}: {failure}")
            print(f"{self.failures[-1]}\n{run.text()[-6000:]}", flush=True)
            for event in run.trace.events[-60:]:
                print(event)
        finally:
            run.kill_all()

    def await_progress(self, run):
        """Until the run has taken some snapshots since, and all keepers are whole again."""
        few = random.randint(2, 4)

        def taken():
            for node in range(self.options.nodes):
                if sum(1 for e in run.trace.events if e["node"] == node and e["time"] > run.restored
                       and e["event"] == "COMMITTED") < few:
                    return False
            return len(run.marks()["first"]) == self.options.ranks
        run.wait(taken, "new snapshots")

    def kill(self, run, whole_node, rank=None):
        """A rank or the node it is on, with its memory."""
        options = self.options
        ranks = run.pids()
        check(len(ranks) > 0, "no rank runs that could be killed")
        rank = random.choice(sorted(ranks)) if rank is None else rank
        node = rank * options.nodes // options.ranks
        victims = [ranks[r] for r in ranks if r * options.nodes // options.ranks == node]
        keeper = run.keeper_pid(node) if whole_node else None
        if keeper is None:
            whole_node, victims = False, [ranks[rank]]
        moment = time.time()
        for pid in victims + ([keeper] if whole_node else []):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if whole_node:
            while running(keeper):
                time.sleep(0.0005)
            # What is named so from here on may be the next keeper's; it makes none before ranks come.
            remove(glob.glob(f"/dev/shm/stretto-{run.job}-{node}-*"))
            run.kills.append((moment, [node]))
        return {"time": moment, "killed": "node" if whole_node else "rank", "rank": rank,
                "node": node}

    def hit(self, run, whole_nodes):
        """One trial, or two when the second hits the recovery from the first."""
        options = self.options
        aim = self.next_aim()
        self.await_progress(run)
        started = min(t for t, _ in run.marks()["first"])
        incidents = len(run.reports())
        if aim in BEGINS:
            if aim == "capture" and random.random() < 0.5:
                self.await_event(run, "WRITING")  # while it is copied
            else:
                self.await_event(run, BEGINS[aim])
                time.sleep(random.uniform(0, PAUSES[BEGINS[aim]] * 0.8e-3))
        elif aim == "compute":
            self.await_event(run, "COMMITTED", node=0)
            # The newest events tell of what is under way.
            run.wait(lambda: snapshot_phase(run.trace.events[-20 * options.nodes:], options.nodes,
                                            time.time(), []) == "compute", "a pause")
            time.sleep(random.uniform(0, 0.003))
        else:
            time.sleep(random.uniform(0, 0.1))
        share = options.node_share if whole_nodes else 0
        first = self.kill(run, random.random() < share)
        first["aim"] = "compute" if aim == "recovery" else aim
        trials = [first]
        if aim == "recovery":
            trials.append(self.hit_recovery(run, first, whole_nodes))
        self.judge(run, trials, started, incidents)
        self.trials += trials
        run.restored = max(t for t, _ in run.marks()["restored"])
        return trials

    def await_event(self, run, name, node=None):
        deadline = time.time() + PATIENCE
        while time.time() < deadline:
            if any(e["event"] == name and node in (None, e["node"]) for e in run.trace.read()):
                return
            check(run.process.poll() is None,
                  f"stretto-run has ended with {run.process.returncode}")
            time.sleep(0.0003)
        raise Failure(f"waited {PATIENCE} s for a {name}")

    def hit_recovery(self, run, first, whole_nodes):
        """A second failure before the first is recovered."""
        before = run.pids()
        # One parity: another node may go only when the first kill left all.
        node_too = whole_nodes and first["killed"] == "rank" and random.random() < 0.3
        pids = run.wait(lambda: (lambda p: p if p and not set(p.values()) & set(before.values())
                                 and len(p) == self.options.ranks else None)(run.pids()),
                        "ranks that are started again")
        # Over all of it: ranks meet, attach to keepers, set up, restore, do a step.
        time.sleep(random.choice([random.uniform(0, 0.1), random.uniform(0, 0.6)]))
        second = self.kill(run, node_too, random.choice(sorted(pids)))
        second["aim"] = "recovery"
        return second

    def judge(self, run, trials, started, incidents):
        options = self.options
        last = trials[-1]["time"]
        run.wait(lambda: (m := run.marks()["first"]) and len(m) == options.ranks
                 and min(t for t, _ in m) > last, "a step after the restart")
        reports = run.wait(lambda: (r := run.reports()[incidents:]) and r[-1]["restored_step"]
                           is not None and r[-1]["seconds"].get("first_step") is not None and r,
                           "the report of the restart")
        check(len(reports) <= len(trials), f"{len(reports)} incidents of {len(trials)} kills")
        restored = reports[-1]["restored_step"]
        completed = max([r["last_step"] or 0 for r in reports])
        for trial in trials:
            moment = trial["time"]
            trial["phase"] = snapshot_phase(run.trace.events, options.nodes, moment,
                                            [k for k in run.kills if k[0] < moment])
            trial["newest"] = run.committed(moment)
            check(restored >= trial["newest"],
                  f"step {trial['newest']} was committed when {trial} happened, and the job went on "
                  f"from {restored}")
            trial["restored"], trial["completed"] = restored, completed
            trial["lost"] = max(0, completed - restored)
            trial["seconds"] = reports[-1]["seconds"]
            given_up = {e["step"] for e in run.trace.events
                        if e["event"] in ("pass", "EMPTY") and started <= e["time"]
                        and restored < e["step"] <= completed}
            trial["k"] = len(given_up) + 1
            check(trial["lost"] <= trial["k"] + 1,
                  f"{trial['lost']} steps were lost with snapshots every {trial['k']}: {trial}")
        if len(trials) > 1:
            # A kill that came after the first step of the restart is one like any other.
            first_step = reports[0]["seconds"].get("first_step") if len(reports) > 1 else None
            if first_step is None:
                trials[1]["phase"] = "recovery"


def summary(trials, hits, failures, options):
    text = [f"{len(trials)} trials on {options.nodes} nodes with {options.ranks} ranks, seed "
            f"{options.seed}: {len(failures)} failures",
            "phase      trials  nodes  lost steps, mean and most"]
    for phase in PHASES:
        hit = [t for t in trials if t["phase"] == phase]
        lost = [t["lost"] for t in hit] or [0]
        text.append(f"{phase:9} {hits[phase]:7} {sum(t['killed'] == 'node' for t in hit):6} "
                    f"{sum(lost) / len(lost):9.2f} {max(lost)}")
    lost = [t["lost"] for t in trials] or [0]
    text.append(f"{'all':9} {len(trials):7} {sum(t['killed'] == 'node' for t in trials):6} "
                f"{sum(lost) / len(lost):9.2f} {max(lost)}")
    text.append("seconds of a recovery, mean and most:")
    phases = {name for t in trials for name in t["seconds"]}
    for name in ("detect", "end", "back_off", "start", "load", "first_step", "total"):
        if name in phases:
            values = [t["seconds"][name] for t in trials if t["seconds"].get(name) is not None]
            text.append(f"  {name:10} {sum(values) / len(values):6.3f} {max(values):6.3f}")
    return "\n".join(text + failures)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"chaos.sh: {message}; see --help\n")


def check_options(parser, options):
    """Ends with one sentence about the first that makes no sense."""
    for name, least in (("trials", 1), ("nodes", 1), ("ranks", 0), ("parity", 1), ("batch", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, not {value}")
    if options.ranks and options.ranks < options.nodes:
        parser.error(f"--ranks must be at least --nodes, {options.nodes}, not {options.ranks}")
    if options.parity is not None and options.parity >= options.nodes:
        parser.error(f"--parity must be less than --nodes, {options.nodes}, not {options.parity}")
    if not 0 <= options.node_share <= 1:
        parser.error(f"--node-share must be 0 to 1, not {options.node_share}")
    folder = os.path.dirname(os.path.abspath(options.json))
    if options.json and (os.path.isdir(options.json) or not os.access(folder, os.W_OK)):
        parser.error(f"--json {options.json} cannot be written")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--nodes", type=int, default=3, help="keepers")
    parser.add_argument("--ranks", type=int, default=0, help="0: as many as nodes")
    parser.add_argument("--parity", type=int, help="if not the keepers' default")
    parser.add_argument("--node-share", type=float, default=0.2,
                        help="of the kills that take a whole node")
    parser.add_argument("--batch", type=int, default=25, help="most kills of one run")
    parser.add_argument("--json", default="", help="file for all trials")
    for name in ("stretto_run", "gpt", "tokenize", "keeper"):
        parser.add_argument(name)
    options = parser.parse_args()
    check_options(parser, options)
    options.ranks = options.ranks or options.nodes
    options.steps = 8 * min(options.trials, options.batch) + 100
    random.seed(options.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = tempfile.mkdtemp(prefix="stretto-chaos-")
    began = time.time()
    try:
        words = random.Random(1)
        prepare(options.tokenize, scratch, {
            "model": {"family": "llama", "layers": 2, "hidden": 96, "heads": 4,
                      "max_positions": 64},
            "data": {"sequence_length": 64, "train": f"{scratch}/text.train.bin",
                     "validation": f"{scratch}/text.validation.bin"},
            "batch": {"global": 6 * options.ranks, "micro": 1},
            "optimizer": {"schedule": "constant", "lr": 1e-3},
            "runtime": {"threads": 1, "device": "cpu"},
            "evaluate": {"every": 10, "samples": options.ranks},
            "checkpoint": {"every": 7, "keep": 2},  # into the folder that keepers spill to
            "snapshot": {"every": 1},
        }, words=lambda: words.choice(["beer", "milk", "ink"]))
        alone = Run(options, scratch, "alone", keepers=False)
        check(alone.process.wait(600) == 0, f"the undisturbed run failed:\n{alone.text()}")
        expected = losses(alone.output)
        print(f"undisturbed: {len(expected)} steps in {time.time() - began:.1f} s", flush=True)
        chaos = Chaos(options, scratch, expected)
        number = 0
        while len(chaos.trials) < options.trials and len(chaos.failures) < 5:
            number += 1
            chaos.batch(number)
        hits = collections.Counter(t["phase"] for t in chaos.trials)
        for phase in PHASES:
            if options.trials >= 100 and hits[phase] < 0.1 * len(chaos.trials):
                chaos.failures.append(f"only {hits[phase]} trials have hit {phase}")
        text = summary(chaos.trials, hits, chaos.failures, options)
        print(f"{text}\n{time.time() - began:.0f} s in all")
        if options.json:
            with open(options.json, "w") as f:
                json.dump({"seed": options.seed, "nodes": options.nodes, "ranks": options.ranks,
                           "phases": hits, "failures": chaos.failures, "trials": chaos.trials}, f,
                          indent=1)
    finally:
        for pid in marked(MARK):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(1 if chaos.failures else 0)


main()

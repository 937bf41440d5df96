#!/usr/bin/env python3
"""Trains on two network namespaces that a slow link joins, and takes the link away.

usage: two_nodes.py NETWORK_NODE TOKENIZE_PROGRAM

- dp 2, pp 2, and dp 2 x tp 2 over both: the losses of one host bit for bit, the planned bytes on each
  axis, and not faster than the link (tbf) allows; tbf's own count, as a control, shows that it acted.
- tp 2 across them is refused in one sentence.
- The link goes down in the middle: both sides end within the time-out with a sentence that names the
  other and the operation.
Exits with 77, and says why, where there is no root, `ip netns` or `tc`.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support import prepare  # noqa: E402

NODE, TOKENIZE = sys.argv[1:3]
NAMES = [f"stretto-{os.getpid()}-{side}" for side in "ab"]
ADDRESSES = ["10.99.0.1", "10.99.0.2"]
PORT = "29555"  # of a namespace of our own
RATE = 1e6  # bytes a second each way
BURST = 16 << 10
STEPS = 4


class Failure(Exception):
    pass


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"'{' '.join(command)}' failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def inside(side, *command):
    return run("ip", "netns", "exec", NAMES[side], *command)


def clean_up(names):
    for name in names:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in listed.stdout.split():
            os.kill(int(pid), 9)
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def remove_leftovers():
    """Of runs that were killed."""
    for name in re.findall(r"^stretto-\d+-[ab]\b", run("ip", "netns", "list"), re.M):
        if not os.path.exists(f"/proc/{name.split('-')[1]}"):
            clean_up([name])


def set_up():
    for name in NAMES:
        run("ip", "netns", "add", name)
    run("ip", "link", "add", "veth0", "netns", NAMES[0], "type", "veth", "peer", "name", "veth0",
        "netns", NAMES[1])
    for side, address in enumerate(ADDRESSES):
        inside(side, "ip", "addr", "add", f"{address}/24", "dev", "veth0")
        inside(side, "ip", "link", "set", "lo", "up")
        inside(side, "ip", "link", "set", "veth0", "up")
        limit(side, True)


def limit(side, on):
    if on:
        inside(side, "tc", "qdisc", "add", "dev", "veth0", "root", "tbf", "rate",
               f"{int(8 * RATE)}bit", "burst", str(BURST), "latency", "400ms")
    else:
        inside(side, "tc", "qdisc", "del", "dev", "veth0", "root")


def overlimits(side):
    """How often the limit has held packets back since it was set."""
    return int(re.search(r"overlimits (\d+)",
                         inside(side, "tc", "-s", "qdisc", "show", "dev", "veth0")).group(1))


def sent(side):
    return int(inside(side, "cat", "/sys/class/net/veth0/statistics/tx_bytes"))


def start(scratch, ranks, settings, two_nodes=True, steps=STEPS):
    jobs = []
    here = ranks // 2 if two_nodes else ranks
    for rank in range(ranks):
        side = rank // here
        where = ["ip", "netns", "exec", NAMES[side]]
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here),
                       "GROUP_RANK": str(side), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
        output = tempfile.mkdtemp(dir=scratch) if rank == 0 else output
        command = where + [NODE, f"{scratch}/config.json", f"steps={steps}", f"output={output}",
                           f"data.train={scratch}/text.train.bin", *settings.split()]
        jobs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True))
    return jobs


def finish(jobs, seconds=120):
    """What they printed, and their exit codes."""
    deadline = time.time() + seconds
    texts = []
    for job in jobs:
        try:
            texts.append(job.communicate(timeout=max(0.1, deadline - time.time()))[0])
        except subprocess.TimeoutExpired:
            for other in jobs:
                other.kill()
            raise Failure(f"a rank still runs after {seconds} s; it printed\n"
                          + job.communicate()[0]) from None
    return "".join(texts), [job.returncode for job in jobs]


def train(*arguments, **options):
    text, codes = finish(start(*arguments, **options))
    if any(codes):
        raise Failure(f"exit codes {codes}\n{text}")
    losses = {(r, s): loss for r, s, loss in re.findall(r"^STEP (\d+) (\d+) (\S+)", text, re.M)}
    seconds = max(float(s) for s in re.findall(r"^SECONDS \d+ (\S+)", text, re.M))
    across = 0
    for rank, axis, real, planned in re.findall(r"^BYTES (\d+) (\w+) (\d+) (\d+)", text, re.M):
        if real != planned:
            raise Failure(f"rank {rank} sent {real} bytes a step over {axis}, not {planned}")
        if rank == "0" and axis in ("dp", "pp"):
            across += int(real)
    return losses, seconds, across


def compare(scratch, ranks, settings):
    """One host, two nodes without a limit, two nodes with it."""
    alone, _, _ = train(scratch, ranks, settings, two_nodes=False)
    for side in range(2):
        limit(side, False)
    fast, free_seconds, _ = train(scratch, ranks, settings)
    for side in range(2):
        limit(side, True)
    wire = sent(0)
    slow, seconds, across = train(scratch, ranks, settings)
    wire = sent(0) - wire
    if not alone or alone != fast or alone != slow:
        raise Failure(f"{settings}: losses differ:\n{alone}\n{fast}\n{slow}")
    # The ranks of a node share its link.
    across *= ranks // 2
    least = ((STEPS - 1) * across - BURST) / RATE
    if seconds < least:
        raise Failure(f"{settings}: {seconds:.2f} s, faster than the link: {least:.2f} s")
    if overlimits(0) == 0:
        raise Failure(f"{settings}: tbf has held nothing back")
    if wire < (STEPS - 1) * across:
        raise Failure(f"{settings}: {wire} bytes on the link, but {across} are sent in a step")
    print(f"{settings}: the same losses; {across} bytes a step each way as planned; {seconds:.2f} s,"
          f" the link allows {least:.2f} s; {free_seconds:.2f} s without a limit", flush=True)


def refuses_tensor_axis(scratch):
    text, codes = finish(start(scratch, 2, "parallel.tp=2"))
    said = re.findall(r"^FAULT \d: (.*)", text, re.M)
    if 0 in codes or len(said) != 2 or not all("on different machines" in s for s in said):
        raise Failure(f"tp 2 across machines: exit codes {codes}\n{text}")
    print(f"tp 2: {said[0]}", flush=True)


def link_down(scratch, settings):
    timeout = 5
    jobs = start(scratch, 2, f"{settings} runtime.timeout_seconds={timeout}", steps=10000)
    line = ""
    while not re.match(r"STEP 0 2 ", line):
        line = jobs[0].stdout.readline()
        if not line:
            raise Failure("the run ended before its link was taken away")
    inside(1, "ip", "link", "set", "veth0", "down")
    begin = time.time()
    try:
        # Rank 1 may have to give the control plane up besides, and both end in order.
        text, codes = finish(jobs, timeout + 15)
    finally:
        inside(1, "ip", "link", "set", "veth0", "up")
    for rank in range(2):
        said = re.search(rf"^FAULT {rank}: (.*)", text, re.M)
        if codes[rank] == 0 or not said:
            raise Failure(f"link down: exit codes {codes}\n{text}")
        if not re.search(rf"rank {1 - rank}\b.*network", said[1]) or not re.search(
                r"\w+\((dp|pp|all)\) seq \d+", said[1]):
            raise Failure(f"rank {rank} does not say what is wrong: {said[1]}")
        print(f"{settings}: link down: {said[1]}", flush=True)
    print(f"{settings}: both ended {time.time() - begin:.1f} s after it, time-out {timeout} s")


def main():
    if os.geteuid() != 0:
        print("SKIP: network namespaces need root")
        sys.exit(77)
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            print(f"SKIP: there is no `{program}` here; install iproute2")
            sys.exit(77)
    scratch = tempfile.mkdtemp(prefix="stretto-network-")
    try:
        try:
            remove_leftovers()
            set_up()
        except OSError as error:
            print(f"SKIP: this machine has no network namespaces with a rate limit: {error}")
            sys.exit(77)
        prepare(TOKENIZE, scratch, {
            "model": {"family": "gpt2", "layers": 2, "hidden": 64, "heads": 4,
                      "max_positions": 64},
            "data": {"sequence_length": 64},
            "batch": {"global": 16, "micro": 1},
            "runtime": {"threads": 1, "device": "cpu", "timeout_seconds": 60},
            "checkpoint": {"resume": "never"},
        })
        compare(scratch, 2, "parallel.dp=2")
        compare(scratch, 2, "parallel.pp=2")
        compare(scratch, 4, "parallel.dp=2 parallel.tp=2")
        refuses_tensor_axis(scratch)
        link_down(scratch, "parallel.dp=2")
        link_down(scratch, "parallel.pp=2")
        print("ok")
    except Failure as failure:
        print("FAILED:", failure)
        sys.exit(1)
    finally:
        clean_up(NAMES)
        shutil.rmtree(scratch, ignore_errors=True)


main()

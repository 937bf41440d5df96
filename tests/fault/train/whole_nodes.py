#!/usr/bin/env python3
"""Takes whole nodes from keepers that hold a run's snapshot, and compares what they rebuild.

usage: whole_nodes.py CASE GPT_PROGRAM TOKENIZE_PROGRAM KEEPER_PROGRAM

CASE is K+M, a group of so many nodes, or GxK+M, several groups: each node has a keeper and a rank.
As many nodes of each group as the code bears are lost together, again and again; the bytes of every
slot must be those from before each time. A run must go on from there with the losses of one that was
left alone. With a node more gone it must fall back on the checkpoint, and say so.
"parity": a byte of a mirror flips in a keeper's own memory; it must not come back.
"adopt": the keeper of the only node is killed, and the next one takes its memory over.
"disk": committed snapshots are to be written to a full disk (77 where none can be mounted).
"""
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support import Nodes, free_ports, prepare  # noqa: E402

CASE, GPT, TOKENIZE, KEEPER = sys.argv[1:5]
HEADER = struct.Struct("<8sIIQQiiqqqqqQQ")  # src/snapshot/slot.cc
COMMITTED = 4


def fail(text):
    raise RuntimeError(f"whole_nodes {CASE}: {text}")


def wait_for(condition, what):
    deadline = time.time() + 60
    while time.time() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    return fail(f"waited 60 s for {what}")


def train(scratch, ranks, output, steps, nodes=None, code=0):
    """Runs the ranks to their end, which has this code; what they have written."""
    port = free_ports(1)[0]
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if nodes:
            environment.update(STRETTO_JOB_TOKEN=Nodes.TOKEN, STRETTO_KEEPER=nodes.socket(rank % nodes.count))
        processes.append(subprocess.Popen(
            [GPT, f"{scratch}/config.json", "--set", f"output={output}", "--set", f"steps={steps}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment))
    texts = [process.communicate(timeout=120)[0] for process in processes]
    for process, text in zip(processes, texts):
        if process.returncode != code:
            fail(f"a rank ended with {process.returncode}:\n{text}")
    return "".join(texts)


def losses(output):
    with open(f"{output}/metrics.jsonl") as lines:
        records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["grad_norm"], r.get("eval_loss")) for r in records]


def slots_of(nodes, node):
    """(path, step, bytes of the payload) of the committed slots."""
    found = []
    for path in nodes.segments(node):
        with open(path, "rb") as f:
            header = HEADER.unpack(f.read(HEADER.size))
            if header[2] != COMMITTED:
                continue
            f.seek(4096)
            found.append((path, header[8], f.read(header[10])))
    return sorted(found, key=lambda slot: slot[1])


def newest(nodes, node):
    slots = slots_of(nodes, node)
    return (slots[-1][1], hashlib.sha256(slots[-1][2]).hexdigest()) if slots else None


def settled(nodes):
    """The newest step that all nodes have committed, with nothing under way."""
    steps = wait_for(nodes.settled, "the keepers to settle")
    if len(steps) != 1 or steps == {0}:
        fail(f"the keepers have committed the steps {steps}")
    return steps.pop()


def lost_sets(groups, data, parity):
    """Nodes that may go together: of node n the group is n % groups."""
    size = data + parity
    for trial in range(3):
        yield [place * groups + group for group in range(groups)
               for place in random.sample(range(size), parity)]
    yield [place * groups + group for group in range(groups) for place in range(parity)]  # node 0


def code(scratch, groups, data, parity):
    count = groups * (data + parity)
    expected_output = f"{scratch}/alone"
    train(scratch, count, expected_output, 20)
    expected = losses(expected_output)
    nodes = Nodes(KEEPER, scratch, f"whole-{os.getpid()}", count, "--data", str(data), "--parity",
                  str(parity))
    output = f"{scratch}/kept"
    try:
        train(scratch, count, output, 8, nodes)
        step = settled(nodes)
        before = {n: newest(nodes, n) for n in range(count)}
        for lost in lost_sets(groups, data, parity):
            nodes.lose(lost)
            if settled(nodes) != step:
                fail(f"nodes {lost} were lost, and step {step} with them")
            after = {n: newest(nodes, n) for n in range(count)}
            if after != before:
                fail(f"nodes {lost} were rebuilt as {after}, not {before}")
        shutil.rmtree(f"{output}/checkpoints")
        text = train(scratch, count, output, 12, nodes)
        if f"continuing from the keepers' snapshot of step {step}" not in text:
            fail(f"the run did not go on from step {step}:\n{text}")
        if losses(output) != expected[:12]:
            fail(f"the losses {losses(output)} are not {expected[:12]}")
        # One more than it bears, of one group.
        settled(nodes)
        nodes.lose([place * groups for place in range(parity + 1)])
        wait_for(lambda: "lost 1" in nodes.ask(count - 1), "the keepers to say what is lost")
        text = train(scratch, count, output, 20, nodes)
        if "too many nodes are gone" not in text or "step-00000012" not in text:
            fail(f"with {parity + 1} nodes gone the run did not fall back:\n{text}")
        if losses(output) != expected:
            fail("the losses after the fall-back differ")
        nodes.end()
    except BaseException:
        print(nodes.logs())
        raise
    finally:
        nodes.kill()
    print(f"{groups} x ({data} + {parity}): step {step} came back with the same bytes")


def flip_in_memory(pid, pattern):
    """Wherever it lies in private mappings of the process, also in buffers that it passed through."""
    found = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b", 0) as memory:
        for line in maps:
            span, mode = line.split()[:2]
            if "/dev/shm" in line or not mode.startswith("rw"):
                continue
            begin, end = (int(x, 16) for x in span.split("-"))
            try:
                memory.seek(begin)
                held = memory.read(end - begin)
            except OSError:
                continue
            for match in re.finditer(re.escape(pattern), held):
                memory.seek(begin + match.start())
                memory.write(bytes([pattern[0] ^ 1]))
                found += 1
    return found


def parity(scratch):
    nodes = Nodes(KEEPER, scratch, f"whole-{os.getpid()}", 2)
    try:
        train(scratch, 2, f"{scratch}/kept", 12, nodes)
        step = settled(nodes)
        slots = slots_of(nodes, 0)
        pattern = slots[-1][2][1024:1024 + 256]
        if not flip_in_memory(nodes.keepers[1].pid, pattern):
            fail("node 0's bytes are not found in its mirror")
        older = [s for s in slots if s[1] < step]
        nodes.lose([0])
        wait_for(lambda: "damaged on node 1" in nodes.logs(), "the damage to be noticed")
        # The step before is whole, where there is one; else it is said that nothing is.
        if older:
            if settled(nodes) != older[-1][1]:
                fail(f"after step {step} was damaged step {nodes.committed()} came back")
            if newest(nodes, 0)[1] != hashlib.sha256(older[-1][2]).hexdigest():
                fail("the older snapshot came back with other bytes")
        else:
            wait_for(lambda: "lost 1" in nodes.ask(1), "the keepers to say what is lost")
        nodes.end()
    except BaseException:
        print(nodes.logs())
        raise
    finally:
        nodes.kill()
    print(f"a flipped byte of the mirror of step {step} was noticed")


def refuses(*options):
    """The keeper is none with these, says so in a line, and ends with code 2."""
    done = subprocess.run([KEEPER, *options], capture_output=True, text=True, timeout=20,
                          env={**os.environ, "STRETTO_JOB_TOKEN": Nodes.TOKEN})
    if done.returncode != 2 or done.stderr.count("\n") != 1 or done.stdout:
        fail(f"with {options} the keeper ended with {done.returncode}: {done.stdout}{done.stderr}")


def adopt(scratch):
    refuses("--nodes", "x")
    refuses("--unknown")
    refuses("--job", "a/b")
    refuses("--job", "a", "--node", "3")
    refuses("--job", "a", "--socket", f"{scratch}/s", "--slow", "encode")
    refuses("--job", "a", "--socket", f"{scratch}/s", "--slow", "encod=1")
    refuses("--job", "a", "--socket", f"{scratch}/s", "--ask", "")
    os.mkfifo(f"{scratch}/fifo")
    refuses("--job", "a", "--socket", f"{scratch}/s", "--trace", f"{scratch}/fifo")
    refuses("--job", "a", "--socket", f"{scratch}/s", "--peers", "127.0.0.1:1,127.0.0.1:2")
    twice = "127.0.0.1:7000,127.0.0.1:7000"
    refuses("--job", "a", "--socket", f"{scratch}/s", "--nodes", "2", "--peers", twice)
    unknown = "127.0.0.1:0,127.0.0.1:7000"
    refuses("--job", "a", "--socket", f"{scratch}/s", "--nodes", "2", "--peers", unknown)
    refuses("--job", "a", "--socket", f"{scratch}/s", "--memory", "-2")
    refuses("--job", "a", "--socket", f"{scratch}/s", "--keep", "-1")
    refuses("--job", "a", "--socket", f"{scratch}/text.txt")
    refuses("--job", "a", "--socket", f"{scratch}/none/s")
    refuses("--job", "a", "--socket", f"{scratch}/s", "--dir", f"{scratch}/text.txt/below")
    ranks = 2
    train(scratch, ranks, f"{scratch}/alone", 20)
    nodes = Nodes(KEEPER, scratch, f"whole-{os.getpid()}", 1)
    try:
        output = f"{scratch}/kept"
        train(scratch, ranks, output, 12, nodes)
        step, before = settled(nodes), slots_of(nodes, 0)
        nodes.lose([0], with_memory=False)
        if settled(nodes) != step:
            fail(f"step {step} was not taken over")
        shutil.rmtree(f"{output}/checkpoints")
        # As if it had been killed before it wrote the record of that step.
        with open(f"{output}/metrics.jsonl") as f:
            records = f.readlines()
        with open(f"{output}/metrics.jsonl", "w") as f:
            f.writelines(records[:step - 1])
        other = train(scratch, ranks, f"{scratch}/other", 20, nodes, code=2)
        if f"is of the run with output {output}, not {scratch}/other" not in other:
            fail(f"another run has gone on from the snapshot:\n{other}")
        text = train(scratch, ranks, output, 20, nodes)
        if f"continuing from the keepers' snapshot of step {step}" not in text:
            fail(f"the run did not go on from step {step}:\n{text}")
        if losses(output) != losses(f"{scratch}/alone"):
            fail("the losses differ")
        with open(f"{output}/metrics.jsonl") as f:
            records = [json.loads(line) for line in f]
        own = [(r["step_ms"], r["exposed_snapshot_ms"], r["memory_bytes"]) for r in records]
        if [i for i, o in enumerate(own, 1) if o == (None, None, None)] != [step]:
            fail(f"the record of step {step} was written by the next run, but its times and memory "
                 f"are {own}")
        # A flipped byte in the newest, in one rank's part; and what is no slot.
        step, before = settled(nodes), slots_of(nodes, 0)
        path = before[-1][0]
        with open(path, "r+b") as f:
            f.seek(4096 + 1000)
            byte = f.read(1)[0]
            f.seek(4096 + 1000)
            f.write(bytes([byte ^ 1]))
        stray = f"/dev/shm/stretto-{nodes.job}-0-0-0-99"
        with open(stray, "wb") as f:
            f.write(b"no slot" * 1000)
        shutil.copy(stray, stray + "x")
        nodes.lose([0], with_memory=False)
        said = nodes.logs()
        for wanted in (f"{path}: the bytes of ", f"{stray} is no slot of a snapshot"):
            if wanted not in said:
                fail(f"'{wanted}' is not said")
        # What has no slot's name is somebody else's.
        if [p for p in nodes.segments(0) if p in (path, stray, stray + "x")] != [stray + "x"]:
            fail("what was refused is still there, or what is not the keeper's is gone")
        os.remove(stray + "x")
        nodes.end()
    except BaseException:
        print(nodes.logs())
        raise
    finally:
        nodes.kill()
    too_small(scratch)
    print(f"the keeper that came again has taken step {step} over, and refused what was damaged")


def too_small(scratch):
    """One of two nodes has no memory for snapshots: the run says so, and its keeper not all the time."""
    nodes = Nodes(KEEPER, scratch, f"small-{os.getpid()}", 2)
    try:
        if "the newest that is COMMITTED is of step" not in train(scratch, 2, f"{scratch}/room", 12,
                                                                  nodes):
            fail("a run with snapshots does not say which is the newest")
        nodes.end()
        nodes = Nodes(KEEPER, scratch, f"small-{os.getpid()}", 2)
        nodes.keepers[1].kill()
        nodes.keepers[1].wait()
        nodes.options = ("--memory", "1000")
        os.remove(f"{scratch}/keeper1.log")
        nodes.keepers[1] = nodes.start(1)
        text = train(scratch, 2, f"{scratch}/no-room", 12, nodes)
        if "none of the snapshots is COMMITTED" not in text:
            fail(f"a run without a snapshot says nothing of it:\n{text}")
        with open(f"{scratch}/keeper1.log") as f:
            told = f.read().count("no snapshots: ")
        if told != 1:
            fail(f"the keeper without memory says so {told} times")
        nodes.end()
    finally:
        nodes.kill()


def disk(scratch):
    small = f"{scratch}/small"
    os.mkdir(small)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small],
                             capture_output=True, text=True)
    if mounted.returncode != 0:
        print(f"no small disk can be mounted: {mounted.stderr.strip()}")
        sys.exit(77)
    nodes = None
    try:
        nodes = Nodes(KEEPER, scratch, f"whole-{os.getpid()}", 2, "--dir", f"{small}/spilled",
                      "--dir-every", "0")
        train(scratch, 2, f"{scratch}/kept", 12, nodes)
        if settled(nodes) < 1:
            fail("nothing was committed")
        text = nodes.logs()
        if not re.search(r"is not written to disk: .*No space left", text):
            fail(f"the full disk is not told of:\n{text}")
        # The last one may still be tried.
        wait_for(lambda: not os.listdir(f"{small}/spilled"), "the full disk to be left empty")
        nodes.end()
    finally:
        if nodes:
            nodes.kill()
        subprocess.run(["umount", small], check=True)
    print("a full disk takes no snapshot away")


def main():
    seed = int(time.time())
    random.seed(seed)
    scratch = tempfile.mkdtemp(prefix="stretto-whole-")
    try:
        prepare(TOKENIZE, scratch, {
            "model": {"family": "llama", "layers": 2, "hidden": 48, "heads": 4,
                      "max_positions": 64},
            "data": {"sequence_length": 64, "train": f"{scratch}/text.train.bin",
                     "validation": f"{scratch}/text.validation.bin"},
            "evaluate": {"every": 4, "samples": 8},
            "batch": {"global": 24, "micro": 1},
            "optimizer": {"schedule": "constant", "lr": 1e-3},
            "runtime": {"threads": 1, "device": "cpu"},
        })
        if CASE in ("parity", "adopt", "disk"):
            {"parity": parity, "adopt": adopt, "disk": disk}[CASE](scratch)
        else:
            groups, data, spare = re.fullmatch(r"(?:(\d+)x)?(\d+)\+(\d+)", CASE).groups()
            code(scratch, int(groups or 1), int(data), int(spare))
    except BaseException:
        print(f"seed {seed}")
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


main()

"""What the tests of failing runs share."""
import glob
import json
import os
import re
import socket
import subprocess


def running(pid):
    """Whether the process exists and has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def marked(mark):
    """The processes that have NAME=VALUE in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                if mark.encode() in f.read().split(b"\0") and running(int(pid)):
                    found.append(int(pid))
        except OSError:
            continue
    return found


def ranks_of(program, process):
    """Process ids of the ranks that run `program`, children of the process."""
    ids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                parent = re.search(r"\) \S (\d+)", f.read()).group(1)
            with open(f"/proc/{pid}/cmdline") as f:
                name = f.read().split("\0")[0]
        except OSError:
            continue
        if int(parent) == process.pid and os.path.basename(name) == os.path.basename(program):
            ids.append(int(pid))
    return ids


def prepare(tokenize, scratch, config, words=lambda: "milk"):
    """Writes a small text, its tokens (text.train.bin) and config.json into the folder."""
    with open(f"{scratch}/text.txt", "w") as text:
        text.writelines(f"{i * i} bottles of {words()}\n\n" for i in range(400))
    subprocess.run([tokenize, "--tokenizer", "bytes", "--output", f"{scratch}/text",
                    f"{scratch}/text.txt"], check=True, stdout=subprocess.DEVNULL)
    with open(f"{scratch}/config.json", "w") as file:
        json.dump(config, file)


def free_ports(count):
    taken = [socket.socket() for _ in range(count)]
    for s in taken:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in taken]
    for s in taken:
        s.close()
    return ports


class Nodes:
    """The keepers of pretended nodes of this machine."""

    TOKEN = "a token of the test"

    def __init__(self, program, scratch, job, count, *options):
        self.program, self.scratch, self.job, self.options = program, scratch, job, options
        self.peers = ",".join(f"127.0.0.1:{p}" for p in free_ports(count))
        self.environment = {**os.environ, "STRETTO_JOB_TOKEN": self.TOKEN}
        self.count = count
        self.keepers = [self.start(n) for n in range(count)]

    def socket(self, node):
        return f"{self.scratch}/node{node}"

    def start(self, node):
        keeper = subprocess.Popen(
            [self.program, "--job", self.job, "--node", str(node), "--nodes", str(self.count),
             "--peers", self.peers, "--socket", self.socket(node), *self.options],
            stdout=subprocess.PIPE, stderr=open(f"{self.scratch}/keeper{node}.log", "a"),
            text=True, env=self.environment)
        line = keeper.stdout.readline()
        if not line.startswith("ready "):
            raise RuntimeError(f"keeper {node} said '{line}'")
        return keeper

    def ask(self, node=0):
        return subprocess.run([self.program, "--ask", self.socket(node)], capture_output=True,
                              text=True, env=self.environment, check=True).stdout

    def committed(self, node=0):
        """The newest committed step that the node has."""
        return max((int(s) for s in re.findall(r"COMMITTED step (\d+)", self.ask(node))), default=0)

    def settled(self):
        """The committed steps, one where all nodes have the same; None while something is under way."""
        texts = [self.ask(n) for n in range(self.count)]
        if any(re.search(r"WRITING|SEALED|PROTECTED|ready 0", t) for t in texts):
            return None
        return {self.committed(n) for n in range(self.count)}

    def segments(self, node):
        return glob.glob(f"/dev/shm/stretto-{self.job}-{node}-*")

    def lose(self, nodes, with_memory=True):
        """Their keepers go, and their memory, too; others take their places."""
        for node in nodes:
            self.keepers[node].kill()
            self.keepers[node].wait()
            for path in self.segments(node) if with_memory else ():
                os.unlink(path)
        for node in nodes:
            self.keepers[node] = self.start(node)

    def logs(self):
        text = ""
        for node in range(self.count):
            with open(f"{self.scratch}/keeper{node}.log") as log:
                text += f"keeper {node}:\n{log.read()}"
        return text

    def end(self):
        for keeper in self.keepers:
            keeper.terminate()
        for keeper in self.keepers:
            if keeper.wait(timeout=10) != 0:
                raise RuntimeError(f"a keeper ended with code {keeper.returncode}")
        left = self.segments("*")
        if left:
            raise RuntimeError(f"keepers left {left} behind")

    def kill(self):
        for keeper in self.keepers:
            keeper.kill()
            keeper.wait()
        for path in self.segments("*"):
            os.unlink(path)

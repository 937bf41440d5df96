"""What the tests of failing runs share."""
import json
import os
import re
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

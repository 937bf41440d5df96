#!/usr/bin/env python3
"""Starts a trainer where its GPU, its memory or its libraries are not as they should be.

usage: bad_gpu_input.py GPT_PROGRAM TOKENIZE_PROGRAM MPIRUN_SCRIPT GPU_HOG HOLLOW [CASE]

Every case ends within its time, with the exit code and the one sentence that it asks for, and leaves
no process behind. One line for each; CASE: only those with this in their name. Exit code 77: all
that can be run here went well, but the rest needs more GPUs.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

GPT, TOKENIZE, MPIRUN, HOG, HOLLOW = sys.argv[1:6]
ONLY = sys.argv[6] if len(sys.argv) > 6 else ""
SECONDS = 120
CRASH = re.compile(r"terminate called|Segmentation fault|Assertion .* failed|core dumped|Aborted")


class Case:
    def __init__(self, name, says, *sets, fails=True, ranks=1, gpus=1, leave=None, hollow=None,
                 environment=None):
        self.name, self.says, self.sets, self.fails = name, says, sets, fails
        self.ranks, self.gpus, self.leave = ranks, gpus, leave
        self.environment = dict(environment or {})
        if hollow is not None:
            old = os.environ.get("LD_LIBRARY_PATH")
            self.environment["LD_LIBRARY_PATH"] = os.path.join(HOLLOW, hollow) + (
                f":{old}" if old else "")


def cases(gpus):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    nothing = r"(no GPU is visible to this process|no NVIDIA driver).*runtime\.device=cpu"
    full = r"end the other programs on it \(nvidia-smi lists them\)"
    saves = (r"what saves most: runtime\.recompute=block, a smaller batch\.micro, "
             r"runtime\.loss_chunk=8192, optimizer\.offload=true$")
    huge = ("model.layers=48", "model.hidden=16384", "model.heads=128")
    bf16 = "runtime.dtype=bf16"
    return [
        Case("no GPU, cuda", nothing, "runtime.device=cuda", gpus=0, environment=hidden),
        Case("no GPU, cuda, 2 ranks", nothing, "runtime.device=cuda", gpus=0, ranks=2,
             environment=hidden),
        Case("no GPU, auto", r"on the CPU: .*" + nothing, "runtime.device=auto", gpus=0,
             fails=False, environment=hidden),
        Case("more ranks than GPUs, cuda",
             rf"rank {gpus} .*GPU {gpus} was asked for, but this process sees {gpus} GPUs?;",
             "runtime.device=cuda", ranks=gpus + 1),
        Case("more ranks than GPUs, auto", r"on the CPU: rank \d+ chose", "runtime.device=auto",
             ranks=gpus + 1, fails=False),
        Case("GPU full", r"GPU 0.*" + full, "runtime.device=cuda", leave=32),
        Case("GPU full, auto", r"GPU 0.*" + full, "runtime.device=auto", leave=32),
        Case("no room for scratch memory", r"a stream on GPU 0 needs \d+ bytes.*" + full,
             "runtime.device=cuda", leave=1800),
        Case("model too large", r"the plan needs .* more on cuda:0 .* are free; " + saves,
             "runtime.device=cuda", *huge),
        Case("budget too small",
             r"the plan needs .*, but runtime\.device_memory_bytes is 97\.66 KiB; raise it; " +
             saves, "runtime.device=cuda", "runtime.device_memory_bytes=100000"),
        Case("no cuDNN", r"attention runs on own kernels.*; (install|configure)",
             "runtime.device=cuda", bf16, fails=False, hollow="cudnn"),
        Case("no cuBLASLt", r"matrix products on a GPU need cuBLASLt \d+, but .* lacks "
             r"cublasLt\w+\); install", "runtime.device=cuda", hollow="cublaslt"),
        Case("no NCCL", r"libnccl\.so\.2 lacks nccl\w+; install NCCL", "runtime.device=cuda",
             ranks=2, gpus=2, hollow="nccl"),
        Case("NCCL too old", r"libnccl\.so\.2 is NCCL 2\.18\.5, but .* is needed; install NCCL",
             "runtime.device=cuda", ranks=2, gpus=2, hollow="old_nccl"),
    ]


class Hog:
    """Most of the memory of GPU 0, taken by another process."""

    def __init__(self, leave):
        self.process = subprocess.Popen([HOG, "0", str(leave)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        if "holding" not in self.process.stdout.readline():
            raise RuntimeError("gpu_hog could not take the memory")

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)


def left_behind(scratch):
    """Processes that still work on files below `scratch`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                command = f.read().decode(errors="replace")
        except OSError:
            continue
        if scratch in command and int(pid) != os.getpid():
            found.append(int(pid))
    return found


def wrong(case, scratch, number):
    """What is wrong with the way the case ended; and the sentence."""
    sets = [f"output={scratch}/run{number}", f"data.train={scratch}/text.train.bin", *case.sets]
    command = [MPIRUN, str(case.ranks), GPT, f"{scratch}/config.json"] + [
        word for s in sets for word in ("--set", s)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", timeout=SECONDS,
                              env={**os.environ, **case.environment})
    except subprocess.TimeoutExpired as late:
        for pid in left_behind(scratch):
            os.kill(pid, 9)
        return f"did not end within {SECONDS} s", (late.stdout or b"").decode(errors="replace")
    output = done.stdout
    if CRASH.search(output):
        return "crashed", output
    if (done.returncode != 0) != case.fails:
        return f"ended with code {done.returncode}", output
    said = [line for line in output.splitlines() if re.search(case.says, line)]
    if len(said) != 1:
        return f"said the sentence {len(said)} times", output
    errors = [line for line in output.splitlines() if line.startswith("stretto-gpt: ")]
    if len(errors) != (1 if case.fails else 0):
        return f"has {len(errors)} lines of errors", output
    deadline = time.time() + 10
    while left_behind(scratch):
        if time.time() > deadline:
            return f"left processes {left_behind(scratch)} behind", output
        time.sleep(0.1)
    return "", said[0]


def main():
    gpus = int(subprocess.run([HOG, "count"], stdout=subprocess.PIPE, text=True,
                              check=True).stdout)
    scratch = tempfile.mkdtemp(prefix="stretto-bad-gpu-")
    failed, skipped = 0, 0
    try:
        with open(f"{scratch}/text.txt", "w") as text:
            for i in range(200):
                text.write(f"{i * i} bottles of beer\n\n")
        subprocess.run([TOKENIZE, "--tokenizer", "bytes", "--output", f"{scratch}/text",
                        f"{scratch}/text.txt"], check=True, stdout=subprocess.DEVNULL)
        with open(f"{scratch}/config.json", "w") as config:
            json.dump({
                "steps": 2,
                "model": {"family": "llama", "layers": 2, "hidden": 64, "heads": 4,
                          "max_positions": 64},
                "data": {"sequence_length": 64},
                "batch": {"global": 2 * max(gpus + 1, 2), "micro": 1},
                "runtime": {"threads": 1},
                "sample": {"tokens": 0},
            }, config)
        for number, case in enumerate(cases(gpus)):
            if ONLY not in case.name:
                continue
            if case.gpus > gpus:
                skipped += 1
                print(f"skip  {case.name}: needs {case.gpus} GPUs, here are {gpus}")
                continue
            begin = time.time()
            hog = Hog(case.leave) if case.leave is not None else None
            try:
                why, text = wrong(case, scratch, number)
            finally:
                if hog is not None:
                    hog.end()
            failed += why != ""
            print(f"{'FAIL' if why else 'ok':5} {case.name} ({time.time() - begin:.1f} s): ", end="")
            print(f"{why}\n  asked for: {case.says}\n{text}" if why else text[:200], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if failed:
        sys.exit(f"{failed} cases failed")
    sys.exit(77 if skipped else 0)


main()

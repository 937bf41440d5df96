#!/usr/bin/env python3
"""Holds our checkpoints and safetensors files against PyTorch and the safetensors package.

Usage: read_with_torch.py <checkpoint_parity>

Four claims:
  1. PyTorch's HuggingFaceStorageReader loads and reassembles a checkpoint that three of our ranks
     wrote, with the values that were saved.
  2. Our safetensors writer gives the same bytes as the reference writer.
  3. We read what the reference writes, one file or a sharded Hugging Face directory.
  4. What the reference reader refuses, we refuse (a few thousand damaged files), and the other way
     round save for the points where we are stricter on purpose.

Exit status 77: a package is missing (ctest shows the test as skipped).
"""

import json
import os
import random
import struct
import subprocess
import sys
import tempfile

try:
    import safetensors
    import safetensors.torch
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
except ImportError as error:
    print(f"skipped: {error}; set STRETTO_PYTHON to an interpreter with torch and safetensors")
    sys.exit(77)

STEP = 7
MODEL = [  # OddModel() of tests/unit/snapshot/model_state.h
    ("wte.weight", torch.float32, (13, 5)),
    ("h.0.attn.weight", torch.bfloat16, (7, 3, 2)),
    ("h.0.bias", torch.float64, (3,)),
    ("ln.weight", torch.float32, (11,)),
    ("steps", torch.int64, (1,)),
    ("empty", torch.float32, (0, 4)),
    ("optim.exp_avg.wte.weight", torch.float32, (13, 5)),
]


def expected(name, dtype, shape):
    """ValueOf() of model_state.h for every element."""
    seed = STEP * 31
    for c in name.encode():
        seed = (seed * 7 + c) % 113
    count = 1
    for d in shape:
        count *= d
    values = [float((seed + i * 3) % 127) - 60.0 for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)


def check(condition, what):
    if not condition:
        print(f"FAILED: {what}")
        sys.exit(1)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def check_checkpoint(path):
    reader = HuggingFaceStorageReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    # A tensor without elements has no slice, so it is known to stretto.json only.
    wanted = [t for t in MODEL if t[0] != "empty"]
    check(sorted(metadata) == sorted(name for name, _, _ in wanted), f"tensors: {sorted(metadata)}")
    state = {}
    for name, dtype, shape in wanted:
        check(tuple(metadata[name].size) == shape, f"{name}: size {metadata[name].size}")
        check(metadata[name].properties.dtype == dtype, f"{name}: {metadata[name].properties}")
        state[name] = torch.zeros(shape, dtype=dtype)
    check(len(metadata["wte.weight"].chunks) == 3, "wte.weight was cut over three ranks")
    dcp.load(state, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
    for name, dtype, shape in wanted:
        check(same(state[name], expected(name, dtype, shape)), f"{name} differs after loading")
    with open(os.path.join(path, "stretto.json")) as file:
        manifest = json.load(file)
    check(manifest["trainer_state"] == {"tokens": 123}, "trainer state")
    print(f"ok: torch {torch.__version__} loads {len(wanted)} tensors from three ranks' shards")


def check_bytes(program, directory):
    tensors = {name: expected(name, dtype, shape) for name, dtype, shape in MODEL}
    theirs = os.path.join(directory, "theirs.safetensors")
    safetensors.torch.save_file(tensors, theirs, metadata={"format": "pt"})
    with open(theirs, "rb") as a, open(os.path.join(directory, "sample.safetensors"), "rb") as b:
        check(a.read() == b.read(), "our sample file has the reference writer's bytes")

    odd = {
        "a": torch.arange(5, dtype=torch.float16),
        'quote " back \\ tab \t nul \x01 del \x7f \u00e9 \U0001f600 /': torch.ones(2, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "u8": torch.arange(7, dtype=torch.uint8),
        "i32": torch.arange(3, dtype=torch.int32),
        "e4m3": torch.ones(3).to(torch.float8_e4m3fn),
        "e5m2": torch.ones(1).to(torch.float8_e5m2),
        "B": torch.zeros(0, 3, dtype=torch.bfloat16),
    }
    for metadata in ({"format": "pt"}, None, {"k": 'v " \n \u00e9'}):
        copied = os.path.join(directory, "copied.safetensors")
        safetensors.torch.save_file(odd, theirs, metadata=metadata)
        subprocess.run([program, "copy", theirs, copied], check=True)
        with open(theirs, "rb") as a, open(copied, "rb") as b:
            check(a.read() == b.read(), f"a file read and written again is the same ({metadata})")
    print(f"ok: bytes as safetensors {safetensors.__version__} writes them")


def check_hugging_face(program, directory):
    tensors = {f"layer.{i}.weight": torch.randn(3 + i, 5) for i in range(9)}
    source, target = os.path.join(directory, "hf"), os.path.join(directory, "hf-copy")
    try:
        from huggingface_hub import save_torch_state_dict
    except ImportError:
        print("not checked: huggingface_hub is absent")
        return
    os.makedirs(source)
    save_torch_state_dict(tensors, source, max_shard_size=300)
    check(os.path.exists(os.path.join(source, "model.safetensors.index.json")), "it is sharded")
    subprocess.run([program, "copy-hf", source, target, "500"], check=True)
    with open(os.path.join(target, "model.safetensors.index.json")) as file:
        index = json.load(file)
    check(sorted(index["weight_map"]) == sorted(tensors), "the index lists all tensors")
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    check(index["metadata"]["total_size"] == total, "total_size")
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(os.path.join(target, file), framework="pt") as shard:
            check(same(shard.get_tensor(name), tensors[name]), f"{name} in {file}")
    print("ok: a sharded Hugging Face directory read and written again")


def damaged(rng):
    """Files near the edge of the format: headers from a grammar with errors, and flipped bytes."""

    def number():
        return rng.choice(["0", "1", "2", "3", "4", "8", "12", "-1", "-0", "1.0", "1e0", "null",
                           "[]", "9223372036854775807", "18446744073709551616", "4294967296", '"1"'])

    def tensor(begin):
        size = rng.choice([0, 1, 2, 4])
        width = {"F32": 4, "BF16": 2, "U8": 1, "F64": 8, "F4": 1}
        dtype = rng.choice(list(width) + (["X"] if rng.random() < 0.1 else []))
        shape = [str(size)] if rng.random() < 0.8 else ["0", str(size)]
        if size == 1 and rng.random() < 0.3:
            shape = []
        count = 0 if "0" in shape else size
        bits = 4 if dtype == "F4" else 8 * width.get(dtype, 4)
        end = begin + count * bits // 8
        offsets = [str(begin), str(end)]
        if rng.random() < 0.08:
            shape = [number() for _ in range(rng.randrange(4))]
        if rng.random() < 0.08:
            offsets = [number() for _ in range(rng.randrange(1, 4))]
        fields = [f'"dtype":"{dtype}"', f'"shape":[{",".join(shape)}]',
                  f'"data_offsets":[{",".join(offsets)}]']
        if rng.random() < 0.1:
            fields.append(rng.choice(['"x":{"y":[1,{}]}', '"x":null', '"dtype":"U8"', '"shape":1']))
        if rng.random() < 0.04:
            fields.pop(rng.randrange(len(fields)))
        rng.shuffle(fields)
        return "{" + ",".join(fields) + "}", end

    members, end = [], 0
    if rng.random() < 0.4:
        members.append('"__metadata__":' + rng.choice(
            ["{}", '{"format":"pt"}', "null", '{"a":1}', '{"a":{}}', "[]", '{"a":"\\ud800"}',
             '{"a":null}', '"x"']))
    for i in range(rng.randrange(4)):
        value, end = tensor(end)
        members.append(f'"{rng.choice("abcdefgh") + str(i)}":{value}')
    rng.shuffle(members)
    header = "{" + ",".join(members) + "}" + " " * rng.randrange(3)
    if rng.random() < 0.05:
        header = rng.choice([" ", "\n", "[", "x"]) + header
    if rng.random() < 0.05:
        header += rng.choice(["\n", "x", "}", "\0", "\t"])
    header = bytearray(header.encode())
    if rng.random() < 0.15:
        header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
    length = len(header)
    if rng.random() < 0.05:
        length += rng.choice([-1, 1, 2**31, 2**63])
    length = max(length, 0)
    extra = rng.choice([-1, 1]) if rng.random() < 0.05 else 0
    return struct.pack("<Q", length) + bytes(header) + b"\1" * max(end + extra, 0)


# Where we refuse what the reference accepts: the start of the file must be { as the format's text
# says; no name twice; a tensor's description is an object.
STRICTER = ("does not start with {", "twice", "has a list where none")


def check_refusals(program, directory):
    rng = random.Random(20240520)
    corpus = os.path.join(directory, "corpus")
    os.makedirs(corpus)
    files = {}
    for i in range(4000):
        files[f"{i:05d}"] = damaged(rng)
        with open(os.path.join(corpus, f"{i:05d}"), "wb") as file:
            file.write(files[f"{i:05d}"])
    out = subprocess.run([program, "check", corpus], check=True, stdout=subprocess.PIPE).stdout
    verdicts = dict(line.split("\t", 1) for line in out.decode(errors="replace").splitlines())
    check(len(verdicts) == len(files), "a verdict for every file")
    accepted = stricter = 0
    for name, content in files.items():
        try:
            safetensors.deserialize(content)
            reference = "ok"
        except Exception as error:  # the package's own exception type
            reference = str(error)
        ours = verdicts[name]
        if reference == "ok" and ours != "ok":
            check(any(reason in ours for reason in STRICTER), f"{content!r}: only we say: {ours}")
            stricter += 1
        else:
            check((reference == "ok") == (ours == "ok"),
                  f"{content!r}: reference: {reference}; ours: {ours}")
            accepted += ours == "ok"
    check(accepted > 300 and accepted < 3700, f"{accepted} sound files of {len(files)}: a poor mix")
    print(f"ok: {len(files)} files, {accepted} accepted by both, {stricter} refused by us only")


def main():
    program = os.path.abspath(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([program, "write", directory], check=True)
        check_checkpoint(os.path.join(directory, "checkpoint", f"step-{STEP:08d}"))
        check_bytes(program, directory)
        check_hugging_face(program, directory)
        check_refusals(program, directory)


if __name__ == "__main__":
    main()

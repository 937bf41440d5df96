#!/usr/bin/env python3
"""Compares a token file with what tiktoken makes of the same text, and times tiktoken.

    stretto-tokenize --tokenizer gpt2.tiktoken --split-documents none --validation-fraction 0 \
        --output /tmp/x text.txt
    python3 compare.py gpt2.tiktoken text.txt /tmp/x.train.bin      # needs tiktoken and numpy
"""

import base64
import sys
import time

import numpy as np

from generate import encoding


def main():
    vocabulary, text_path, tokens_path = sys.argv[1:]
    with open(vocabulary, "rb") as file:
        lines = [line.split() for line in file.read().splitlines()]
    reference = encoding({base64.b64decode(token): int(rank) for token, rank in lines})
    with open(text_path, encoding="utf-8", newline="") as file:
        text = file.read()
    start = time.perf_counter()
    expected = np.array(reference.encode_ordinary(text))
    seconds = time.perf_counter() - start
    actual = np.fromfile(tokens_path, dtype=np.uint16)[512:]
    size = len(text.encode())
    print(f"{size} bytes, {len(expected)} tokens, tiktoken at {size / seconds / 1e6:.1f} MB/s")
    if not np.array_equal(expected, actual):
        n = min(len(expected), len(actual))
        sys.exit(f"differs at token {int(np.argmax(expected[:n] != actual[:n]))}")
    print("equal")


if __name__ == "__main__":
    main()

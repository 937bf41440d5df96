#!/usr/bin/env python3
"""Writes the expected ids of the tokenizer parity tests, as the reference tokenizers give them.

    python3 generate.py [gpt2.tiktoken]      # needs tiktoken and tokenizers from PyPI

Makes, beside this file:
  cases/tiny.tiktoken                    a vocabulary of 256 bytes and some hundred merges
  cases/tiny/vocab.json, merges.txt      the same in Hugging Face's form
  cases/tiny_expected.txt                tiktoken's ids over it; tokenizers' must be the same
  cases/gpt2_expected.txt                tiktoken's ids with GPT-2's vocabulary, when it is given
Each line of an expected file is the text in hexadecimal, a tab and the ids.
"""

import base64
import collections
import json
import pathlib
import random
import sys

import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
HERE = pathlib.Path(__file__).resolve().parent / "cases"
END_OF_TEXT = "<|endoftext|>"

SENTENCES = [
    "In the beginning was the word, and the word was with the reader.",
    "They'll say it isn't so; we've heard that they're wrong, I'd bet.",
    "THEY'LL shout: IT'S 1,234.56 times 10^-7!  (or not)",
    "int main(int argc, char** argv) {\n\treturn argc > 1 ? 0 : 1;\n}\n",
    "  two leading spaces, two trailing  ",
    "a\n\n\nb \n c\t\td\r\ne",
    "naïve café, Ελληνικά, русский, עברית, العربية, हिन्दी, 日本語, 한국어, ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ½ ² ③ Ⅷ ٣ 〇",
    "\u180e\u2003x\u3000\u3000y\u00a0z\u200bw\ufeff",
    END_OF_TEXT + " is text here",
    "\x00\x01\x7f\u0080\u009f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "thethethethethethethethethethethethethethethethethethethethethethethethethethe",
    " " * 100 + "x" + "\n" * 70,
    "",
]


def random_text(rng):
    """Characters of every plane and class, with runs."""
    text = []
    for _ in range(rng.randrange(1, 60)):
        kind = rng.random()
        if kind < 0.35:
            c = chr(rng.randrange(0x20, 0x7F))
        elif kind < 0.5:
            c = rng.choice(" \n\t\r'\u00a0\u180e\u2003\u2028\u3000\u0085")
        elif kind < 0.75:
            c = chr(rng.randrange(0x80, 0x3000))
        elif kind < 0.9:
            c = chr(rng.choice([rng.randrange(0x3000, 0xD800), rng.randrange(0xE000, 0x10000)]))
        else:
            c = chr(rng.randrange(0x10000, 0x110000))
        text.append(c * rng.choice([1, 1, 1, 2, 3]))
    return "".join(text)


def byte_characters():
    """GPT-2's printable character of each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, following = {}, 0x100
    for byte in range(256):
        if byte in printable:
            characters[byte] = chr(byte)
        else:
            characters[byte] = chr(following)
            following += 1
    return characters


def train(texts, merges):
    """Plain BPE training over whole texts cut at spaces; returns the tokens by rank and the merges."""
    words = collections.Counter()
    for text in texts:
        for word in text.replace(" ", "\0 ").split("\0"):
            words[tuple(bytes([b]) for b in word.encode())] += 1
    tokens, pairs_made = [bytes([b]) for b in range(256)], []
    for _ in range(merges):
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                if pair[0] + pair[1] not in tokens:
                    pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(best[0] + best[1])
        pairs_made.append(best)
        merged = collections.Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append(word[i] + word[i + 1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] += count
        words = merged
    return tokens, pairs_made


def encoding(ranks):
    return tiktoken.Encoding(
        "gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def write_expected(path, texts, encode):
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for text in texts:
            file.write(f"{text.encode().hex()}\t{' '.join(map(str, encode(text)))}\n")


def main():
    rng = random.Random(20240520)
    texts = SENTENCES + [random_text(rng) for _ in range(150)]

    HERE.joinpath("tiny").mkdir(parents=True, exist_ok=True)
    tokens, merges = train(SENTENCES, 300)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    with open(HERE / "tiny.tiktoken", "w", encoding="ascii", newline="\n") as file:
        for token, rank in ranks.items():
            file.write(f"{base64.b64encode(token).decode()} {rank}\n")
    characters = byte_characters()
    named = lambda token: "".join(characters[b] for b in token)
    vocabulary = {named(token): rank for token, rank in ranks.items()}
    pairs = [(named(left), named(right)) for left, right in merges]
    with open(HERE / "tiny" / "vocab.json", "w", encoding="utf-8", newline="\n") as file:
        json.dump({**vocabulary, END_OF_TEXT: len(ranks)}, file, ensure_ascii=False)
        file.write("\n")
    with open(HERE / "tiny" / "merges.txt", "w", encoding="utf-8", newline="\n") as file:
        file.write("#version: 0.2\n")
        file.writelines(f"{left} {right}\n" for left, right in pairs)

    tiny = encoding(ranks)
    write_expected(HERE / "tiny_expected.txt", texts, tiny.encode_ordinary)
    other = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()
    for text in texts:
        assert other.encode(text).ids == tiny.encode_ordinary(text), text

    if len(sys.argv) > 1:
        with open(sys.argv[1], "rb") as file:
            lines = [line.split() for line in file.read().splitlines()]
        gpt2 = encoding({base64.b64decode(token): int(rank) for token, rank in lines})
        write_expected(HERE / "gpt2_expected.txt", texts, gpt2.encode_ordinary)


if __name__ == "__main__":
    main()

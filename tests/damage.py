"""Damage files at random, and observe in a child process what reading them does."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from retroexit.core.files import write_json
from retroexit.errors import RetroExitError

RESEALED = "with a new digest,"


def in_child(work, seconds=200):
    """Run ``work(report)`` in a forked process, which may crash or hang.

    Args:
        work: Passes values that JSON can hold to ``report``; those from before a crash are returned too.
        seconds: Time after which the process is killed.

    Returns:
        The reports; and how the process ended: ``""`` if well, else a signal's name or a traceback.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        log = Path(folder, "reports")

        def run():
            with log.open("w", buffering=1) as out:
                try:
                    work(lambda report: print(json.dumps(report), file=out))
                except BaseException:
                    print(json.dumps(traceback.format_exc()), file=out)
                    os._exit(1)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        reports = [json.loads(line) for line in log.read_text().splitlines()]
    if process.exitcode:
        end = signal.Signals(-process.exitcode).name if process.exitcode < 0 else reports.pop()
        return reports, end
    return reports, ""


def outcomes(folder, count, read):
    """Cut or flip bits in a folder's files ``count`` times, and read it in a child process each time.

    Returns:
        Pairs of damaged file and what ``read`` returned, or ``"refused"`` where it raised a `RetroExitError`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)

    def work(report):
        torch.set_num_threads(1)  # the thread pool of the parent does not exist in a forked process
        for done in mutations(files, count, ways=(_cut, _flip)):
            report([done, "began"])
            try:
                report([done, read()])
            except RetroExitError:
                report([done, "refused"])

    reports, end = in_child(work)
    assert end == "", f"{end} at {reports[-1]}"
    results = [report for report in reports if report[1] != "began"]
    assert len(results) == count
    return {(done.partition(":")[0], result) for done, result in results}


@contextmanager
def time_limit(seconds):
    """End a call that takes longer by `KeyboardInterrupt`, which no reader catches, also where it waits for a pipe."""

    def expire(_number, _frame):
        raise KeyboardInterrupt(f"longer than {seconds} s")

    before, left = signal.signal(signal.SIGALRM, expire), signal.alarm(seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.alarm(left)


def mutations(files, count, seed=0, begin=0, ways=()):
    """Damage one file after another, numbers ``begin`` to ``count``; each is whole again afterwards.

    Args:
        files: The files.
        count: Number of mutations in all.
        seed: Of all random choices; a mutation depends on it and its number only.
        begin: Number of the first one, from 0.
        ways: Taken in turn; all of `WAYS` by default.

    Yields:
        What was done to which file, while it is done.
    """
    contents = {path: path.read_bytes() for path in files}
    for number in range(begin, count):
        draw = random.Random(f"{seed} {number}")
        path = files[number % len(files)]
        way = (ways or WAYS)[number // len(files) % len(ways or WAYS)]
        try:
            done = way(path, contents, draw)
            if path.is_file() and path.read_bytes() == contents[path]:  # zeros over zeros, say
                done = _cut(path, contents, draw)
            yield f"{path.name}: {done}"
        finally:
            _remove(path)
            path.write_bytes(contents[path])


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cut(path, contents, draw):
    size = draw.randrange(len(contents[path]))
    path.write_bytes(contents[path][:size])
    return f"cut to {size} bytes"


def _flip(path, contents, draw):
    data, most = bytearray(contents[path]), draw.choice((64, 256, 2**40))
    bits = draw.sample(range(8 * min(most, len(data))), min(draw.randint(1, 8), 8 * len(data)))
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bits {bits} flipped"


def _zero(path, contents, draw):
    data = bytearray(contents[path])
    begin = draw.randrange(len(data))
    size = min(draw.choice((16, 512, 4096)), len(data) - begin)
    data[begin : begin + size] = bytes(size)
    path.write_bytes(data)
    return f"{size} zeros at {begin}"


def _swap(path, contents, draw):
    others = [other for other in contents if other != path]
    if not others:
        path.write_bytes(contents[path][::-1])
        return "reversed"
    other = draw.choice(others)
    path.write_bytes(contents[other])
    return f"swapped with {other.name}"


def _retype(path, contents, draw):
    """Give one value of JSON another type."""
    try:
        facts = json.loads(contents[path])
        places = list(_places(facts))
    except ValueError:
        return _flip(path, contents, draw)
    parent, key = draw.choice(places)
    before = parent[key]
    values = (None, True, -1, 1e300, float("nan"), "text", [], [[]], {}, {"a": None})
    value = parent[key] = draw.choice([value for value in values if type(value) is not type(before)])
    path.write_text(json.dumps(facts))
    return f"{key}: {str(before)[:40]!r} replaced by {value!r}"


def _reseal(path, contents, draw):
    """Do `_retype` and renew the digest, as if the file had been written so."""
    done = _retype(path, contents, draw)
    try:
        write_json(path, json.loads(path.read_text()))
    except (ValueError, TypeError):
        return done
    return f"{RESEALED} {done}"


def _places(value):
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(part, (dict, list)):
            yield from _places(part)


def _nest(path, contents, draw):
    depth = draw.choice((500, 100_000))
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    path.write_bytes(opening * depth + b"1" + closing * depth)
    return f"nested {depth} deep"


def _pipe(path, contents, draw):
    path.unlink()
    os.mkfifo(path)
    return "a named pipe"


def _folder(path, contents, draw):
    path.unlink()
    path.mkdir()
    return "a folder"


def _nan(path, contents, draw):
    """Write NaN over a number, as float32; into zip files, with the checksums that torch writes."""
    try:
        state = torch.load(path, weights_only=True)
        tensors = [v for v in _tensors(state) if v.is_floating_point() and v.numel()]
        is_zip = contents[path][:2] == b"PK"
        draw.choice(tensors).view(-1)[0] = draw.choice((float("nan"), float("inf")))
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)
        return "NaN, saved again"
    except Exception:
        data = bytearray(contents[path])
        begin = draw.randrange(len(data)) // 4 * 4
        data[begin : begin + 4] = b"\x00\x00\xc0\x7f"[: len(data) - begin]
        path.write_bytes(data)
        return f"NaN at {begin}"


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


WAYS = (_cut, _flip, _zero, _swap, _retype, _reseal, _nest, _pipe, _folder, _nan)

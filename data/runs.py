"""A run's folder, the data that the run is of, and what fits an earlier run.

    checkpoint.pt    while a run is unfinished: all that it needs to go on
    adapter.pt       when it is finished: what was trained
    metrics.jsonl    a line of JSON for each loss and each validation; a finished run's last line is its result

A run that is refused touches nothing that is there. A run that starts anew leaves an earlier one's files as they are
until it has written the same of its own.
"""
import contextlib
import hashlib
import json
import os
import signal
import tempfile
import threading
from collections import Counter
from pathlib import Path

import torch

from data.jsonl import check_example

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- The folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run_folder(folder, resume, overwrite):
    """Keep other runs out of `folder`, and yield (checkpoint, result) of the run to go on with, each a dict or None.

    ValueError where another run is at work, the folder cannot be written, or an earlier run would be lost.
    """
    folder = Path(folder)
    handle = lock(folder)
    try:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"{folder} cannot be written ({error.strerror}): give another --out_dir") from None
        for half in (*folder.glob("*.pt.*.tmp"), *folder.glob("metrics.jsonl.*.tmp")):  # of a run killed as it saved
            half.unlink()
        unfinished, finished = (folder / "checkpoint.pt").exists(), is_finished(folder)
        if (unfinished or finished) and not (resume or overwrite):
            kind, way_out = ("an unfinished", "--resume=true") if unfinished else ("a finished", "another --out_dir")
            raise ValueError(f"{folder} holds {kind} run: give {way_out}, or --overwrite=true to start anew")
        checkpoint = read_tensors(folder / "checkpoint.pt") if resume and unfinished else None
        yield checkpoint, finished_run(folder) if resume and finished and not unfinished else None
    finally:
        if handle is not None:  # the run that holds the folder, and no other, removes it if it is empty
            with contextlib.suppress(OSError):
                folder.rmdir()
            os.close(handle)


def lock(folder):
    """Make the folder if need be, and lock it until the handle that is returned is closed, or the process ends, by a
    kill too. None where there are no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # removed meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{folder}: another run is at work there; give this one another --out_dir") from None
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            os.close(handle)
            return None
        os.close(handle)  # this folder was removed by the run that had locked it, and is not the one of that name


def read_tensors(path):
    """What torch.save has written to `path`; ValueError for a file cut short."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises half a dozen kinds
        raise ValueError(f"{path} cannot be read, as if cut short ({type(error).__name__}): --overwrite=true starts "
                         f"anew") from None


def finished_run(folder):
    """The result of the finished run in `folder`, a dict: the last line of its metrics.jsonl. ValueError without it."""
    try:
        line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return {**line, "data": line["data"]}  # no other line has "data"
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{folder} holds no finished run: its metrics.jsonl does not end in a result") from None


def is_finished(folder):
    with contextlib.suppress(ValueError):
        return bool(finished_run(folder))
    return (folder / "adapter.pt").exists()


def note(folder, history, line):
    """Add `line`, a dict, to `history`, and write it all to metrics.jsonl. Where an earlier run has its result there,
    that stays until `line` is the new one."""
    history.append(line)
    if "data" in line or not is_finished(folder):
        temporary = folder / f"metrics.jsonl.{os.getpid()}.tmp"
        try:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
            temporary.replace(folder / "metrics.jsonl")
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def interrupts_held():
    """Inside, a first Ctrl-C only adds an entry to the list that is yielded, so that a step can be ended and saved."""
    pressed, python_s = [], signal.default_int_handler

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, python_s)  # for a second one

    # A job in the background ignores Ctrl-C, and threads beside the main one get none. That stays as it is.
    main_thread = threading.current_thread() is threading.main_thread()
    holds = main_thread and signal.getsignal(signal.SIGINT) is python_s
    if holds:
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        if holds:
            signal.signal(signal.SIGINT, python_s)


# ---- The data --------------------------------------------------------------------------------------------------------


def data_of(task):
    """What is kept of a run's data, a dict: to know them again, to describe them, and to predict for the like."""
    digest = hashlib.sha256()
    for example in (*task.train, "validation", *task.validation):
        digest.update(json.dumps(example).encode())
    of_train, of_validation = (Counter(example.get("label") for example in part)
                               for part in (task.train, task.validation))
    counts = [of_train[i] for i in range(len(task.classes))]
    commonest = of_validation[counts.index(max(counts))] / len(task.validation) if counts else None
    return {"kind": task.kind, "classes": task.classes, "counts": counts, "n_train": len(task.train),
            "n_validation": len(task.validation), "n_pairs": sum("text_b" in example for example in task.train),
            "commonest": commonest, "data": digest.hexdigest()[:16]}


def describe(data, shown=8):
    """One line: the kind of task, and how many examples to train on each class has."""
    if data["kind"] == "regression":
        return "regression, since labels have a decimal point"
    if data["kind"] == "multiple_choice":
        return "multiple choice"
    counts = sorted(zip(data["counts"], map(str, data["classes"])), key=lambda pair: -pair[0])
    named = [f"{name[:40]} {count:,}" for count, name in counts[:shown]] + ["..."] * (len(counts) > shown)
    return (f"classification, {len(counts)} classes: {', '.join(named)}; the commonest is "
            f"{counts[0][0] / data['n_train']:.2f} of them")


# ---- What fits a run -------------------------------------------------------------------------------------------------

# A run may go on with another of these. They move numbers by rounding alone, and the data are compared by themselves.
MAY_CHANGE = ("device", "task", "data_dir", "micro_batch_size", "gradient_checkpointing", "checkpoint_interval")


def settings_to_keep(folder, run, cfg):
    """The settings of the run in `folder`, {option: value}; ValueError where other ones were given in cfg."""
    settings = run["settings"]
    given = {name: getattr(cfg, name) for name in settings if name in cfg.given and getattr(cfg, name) != "auto"}
    other = [name for name in given if given[name] != settings[name] and name not in MAY_CHANGE]
    if other:
        raise ValueError(f"{folder} holds a run with {', '.join(f'{name} {settings[name]}' for name in other)}, and "
                         f"--resume=true keeps its options")
    return settings | {name: given[name] for name in MAY_CHANGE if name in given}


def check_same_data(folder, run, data):
    """ValueError naming the first thing in which `data`, of data_of, differs from what the run in `folder` has kept."""
    for name, now in data.items():
        if run.get(name) != now:
            raise ValueError(f"{folder} holds a run on other data: {name} {str(run.get(name))[:80]} there, "
                             f"{str(now)[:80]} now; --overwrite=true starts anew")


def as_example(example, run, where):
    """A text, a pair or a dict as an example that `run`, a result, takes; or ValueError, which begins with `where`."""
    if isinstance(example, str):
        example = {"text_a": example}
    elif isinstance(example, (list, tuple)):
        if len(example) != 2:
            raise ValueError(f"{where} is a list of {len(example)}: it should be a text, a pair of texts, or a dict")
        example = dict(zip(("text_a", "text_b"), example))
    example = check_example(example, where, labelled=False)
    needed = ("instruction" if run["settings"]["protocol"] == "instruct" else
              "choices" if run["kind"] == "multiple_choice" else "text_a")
    if needed not in example:
        raise ValueError(f'{where} has no "{needed}", which this run on {run["task"]} takes')
    learnt = {0: "single texts", run["n_train"]: "pairs of texts"}.get(run["n_pairs"])  # None: from both
    given = "pairs of texts" if "text_b" in example else "single texts"
    if needed == "text_a" and learnt not in (given, None):
        raise ValueError(f"{where}: this run on {run['task']} learnt from {learnt}, and takes no {given}")
    return example

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

import torch

from data.jsonl import check_example

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- The folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_folder(folder, resume, overwrite):
    """Keep other runs out of `folder`, and yield (checkpoint, result) of the run to go on with, each a dict or None.

    ValueError where another run is at work, or an earlier one would be lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()  # fails now, and not after the run, where nothing can be written
        for half in folder.glob("*.pt.*.tmp"):  # of a run killed as it saved
            half.unlink()
        unfinished, finished = (folder / "checkpoint.pt").exists(), (folder / "adapter.pt").exists()
        if (unfinished or finished) and not (resume or overwrite):
            kind = "an unfinished" if unfinished else "a finished"
            raise ValueError(f"{folder} holds {kind} run: --resume=true keeps it, --overwrite=true starts anew")
        checkpoint = read_tensors(folder / "checkpoint.pt") if resume and unfinished else None
        result = finished_run(folder) if resume and finished and not unfinished else None
        yield checkpoint, result
    finally:
        if handle is not None:  # only the run that holds the folder may remove it
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty
            os.close(handle)


def lock(folder):
    """Hold `folder` until the handle that is returned is closed, or the process ends. None where there are no locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder}: another run is at work there; give this one another --out_dir") from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    os.close(handle)
    raise ValueError(f"{folder} was removed this moment, by a run that ended there: start again")


def read_tensors(path):
    """What torch.save has written to `path`; ValueError for a file cut short."""
    open(path, "rb").close()  # a missing file raises its own error here
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds
        raise ValueError(f"{path} cannot be read, as if cut short ({type(error).__name__}): --overwrite=true starts "
                         f"anew") from None


def finished_run(folder):
    """The result of the finished run in `folder`, a dict; ValueError where there is none."""
    if (folder / "checkpoint.pt").exists():
        checkpoint = read_tensors(folder / "checkpoint.pt")
        if checkpoint["step"] == checkpoint["settings"]["max_steps"]:  # adapter.pt may be its, metrics.jsonl older
            raise ValueError(f"{folder} holds a run that was stopped as it ended: --resume=true ends it")
    with contextlib.suppress(OSError, ValueError, IndexError):
        last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        if "final" in last:
            return last
    raise ValueError(f"{folder} holds no finished run: its metrics.jsonl does not end in a result")


def note(folder, history, line):
    """Add `line`, a dict, to `history`, and write it all to metrics.jsonl. That of an earlier run, one with an
    adapter.pt, stays until `line` is the new result."""
    history.append(line)
    if "final" in line or not (folder / "adapter.pt").exists():
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in history), encoding="utf-8")


@contextlib.contextmanager
def interrupts_held():
    """Inside, a first Ctrl-C only adds to the list that is yielded, so that the step can be ended and saved."""
    pressed, before = [], signal.getsignal(signal.SIGINT)

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)  # a second one stops at once

    if threading.current_thread() is not threading.main_thread():  # no Ctrl-C comes here
        yield pressed
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ---- The data --------------------------------------------------------------------------------------------------------


def data_of(task):
    """What is kept of a run's data, a dict: to know them again, to describe them, and to predict for the like."""
    digest = hashlib.sha256()
    for example in (*task.train, "validation", *task.validation):
        digest.update(json.dumps(example).encode())
    counts = Counter(example.get("label") for example in task.train)
    commonest = None  # share of the validation data that the training data's commonest class would get right
    if task.classes:
        most = counts.most_common(1)[0][0]
        commonest = sum(example["label"] == most for example in task.validation) / len(task.validation)
    return {"kind": task.kind, "classes": task.classes, "counts": [counts[i] for i in range(len(task.classes))],
            "n_train": len(task.train), "n_validation": len(task.validation), "commonest": commonest,
            "n_pairs": sum("text_b" in example for example in task.train), "data": digest.hexdigest()[:16]}


def weights_of(base):
    """What is kept of a pre-trained model, a dict, to know it again: a hash of the first numbers of each parameter."""
    digest = hashlib.sha256()
    for p in base.parameters():
        digest.update(str(p.flatten()[:64].tolist()).encode())
    return {"weights": digest.hexdigest()[:16]}


def describe(data):
    """One line: the kind of task, and how many examples to train on each class has."""
    texts = {0: "single texts", data["n_train"]: "pairs of texts"}.get(data["n_pairs"], "texts and pairs")
    if data["kind"] == "regression":
        return f"regression, since labels have a decimal point; {texts}"
    if data["kind"] == "multiple_choice":
        return "multiple choice"
    counts = Counter(dict(zip(data["classes"], data["counts"]))).most_common()
    named = ", ".join(f"{str(name)[:40]} {count:,}" for name, count in counts[:8])
    named += ", ..." if counts[8:] else ""
    return (f"classification, {len(counts)} classes: {named}; the commonest is "
            f"{counts[0][1] / data['n_train']:.2f} of them; {texts}")


# ---- What fits a run -------------------------------------------------------------------------------------------------

# With these a run may go on otherwise: they move numbers by rounding alone. The data are compared by themselves.
MAY_CHANGE = ("device", "task", "data_dir", "micro_batch_size", "gradient_checkpointing")


def settings_to_keep(folder, run, cfg):
    """The settings of the run in `folder`, {option: value}; ValueError where another one was given in cfg."""
    kept = dict(run["settings"])
    for name in sorted(cfg.given & kept.keys()):
        if name in MAY_CHANGE:
            kept[name] = getattr(cfg, name)
        elif getattr(cfg, name) not in ("auto", kept[name]):
            raise ValueError(f"{folder} holds a run with --{name}={kept[name]}, and --resume=true keeps its options")
    return kept


def check_same(folder, run, kept):
    """ValueError naming the first thing in which `kept`, of data_of or weights_of, differs from the run in `folder`."""
    for name, now in kept.items():
        if run[name] != now:
            raise ValueError(f"{folder} holds a run on other data or weights: {name} {str(run[name])[:80]} there, "
                             f"{str(now)[:80]} now; --overwrite=true starts anew")


def as_example(example, run, where):
    """A text, a pair or a dict as an example that `run`, a result, takes; or ValueError, which begins with `where`."""
    if isinstance(example, str):
        example = {"text_a": example}
    elif isinstance(example, (list, tuple)) and len(example) == 2:
        example = dict(zip(("text_a", "text_b"), example))
    example = check_example(example, where, labelled=False)
    needed = ("instruction" if run["settings"]["protocol"] == "instruct" else
              "choices" if run["kind"] == "multiple_choice" else "text_a")
    if needed not in example:
        raise ValueError(f'{where} has no "{needed}", which this run on {run["task"]} takes')
    if "text_b" in example and run["n_pairs"] == 0:
        raise ValueError(f"{where}: this run on {run['task']} learnt from single texts, and takes no pairs")
    if "text_b" not in example and run["n_pairs"] == run["n_train"]:
        raise ValueError(f"{where}: this run on {run['task']} learnt from pairs of texts, and takes no single ones")
    return example

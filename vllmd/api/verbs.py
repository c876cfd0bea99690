"""The table of operators' verbs: one row for each, from which everything else that concerns the verb is made.

From a row follow the route and its checks (``vllmd.admin.verbs``), the operation in ``/openapi.json``, a method of
``Client`` and ``AsyncClient`` (written by ``packaging/dev/make-clients``), a verb of vllmctl with its arguments, help
and completion (``vllmd.cli.table``), and its lines in the manual.

A verb either posts an event to the core (``event``: its class in ``vllmd.core.events``, whose fields have the
parameters' names), or calls a method (``does``: its path in ``vllmd.admin.control.Control``, with the parameters by
their names). ``tests/api/test_verbs.py`` holds every row to that. Streams (events, logs), health, metrics and the
instances API are not verbs, and have no rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Literal
from urllib.parse import quote

from vllmd.api.answers import (
    Answer,
    Cached,
    Cancelled,
    Decisions,
    Device,
    Download,
    KeyLine,
    Keys,
    Killed,
    ModelLine,
    NewKey,
    Plan,
    Preview,
    Probed,
    Recordings,
    Reloaded,
    Removed,
    RequestInFull,
    Requests,
    Status,
    Suspended,
    Usage,
)
from vllmd.api.kinds import Choice, Count, Flag, JsonObject, Kind, ModelName, Moment, Seconds, StatusClass, Text, Word
from vllmd.errors import BadRequest, NotFound
from vllmd.frozen import frozen

LONGEST_PROBE = 3600.0  # seconds
LONGEST_LEASE = 1e9  # seconds; some thirty years
LONGEST_RECORDING, RECORDING = 7 * 86400.0, 600.0  # seconds: the limit, and the default
LONGEST_BODY, BODY = 16 << 20, 64 << 10  # bytes kept of one body: the limit, and the default
MOST_SHOWN, SHOWN = 10_000, 100  # requests in one answer: the limit, and the default
REQUIRED = ...  # in place of a parameter's default: it must be given


@frozen
class Param:
    """One parameter of a verb.

    ``name``: in Python, and on the wire unless ``wire`` says another. ``default``: REQUIRED without one. ``keyword``:
    the clients' methods take it by name only. ``flags``: vllmctl's spellings, by default ``--NAME``; a parameter of the
    path is a word there, called ``metavar``, and with ``many`` the verb is done for each of several words.
    ``missing``: the error for a value in the path that cannot be right.
    """

    name: str
    kind: Kind
    about: str = ""
    place: Literal["path", "query", "body"] = "query"
    default: object = REQUIRED
    wire: str = ""
    keyword: bool = False
    flags: tuple[str, ...] = ()
    metavar: str = ""
    many: bool = False
    missing: str = "there is no {value!r} here"

    @property
    def key(self) -> str:
        """The parameter's name on the wire."""
        return self.wire or self.name

    def read_text(self, text: str) -> object:
        """Read the parameter from a path or a query. Raises NotFound, BadRequest."""
        if not text and self.default == "":
            return text
        try:
            return self.kind.of_text(text)
        except ValueError:
            if self.place == "path":
                raise NotFound(self.missing.format(value=text)) from None
            raise self._wrong(text) from None

    def read_json(self, value: object) -> object:
        """Read the parameter from a body; null counts where the default is None. Raises BadRequest."""
        if value is None and self.default is None:
            return None
        try:
            return self.kind.of_json(value)
        except ValueError:
            raise self._wrong(value) from None

    def _wrong(self, value: object) -> BadRequest:
        null = ", or null" if self.place == "body" and self.default is None else ""
        return BadRequest(f"{self.key} must be {self.kind.accepts}{null}, not {value!r:.100}", param=self.key)


@frozen
class Method:
    """A method of the clients. ``part``: the field of the answer that it returns, "" for the whole answer."""

    name: str
    about: str
    part: str = ""


@frozen
class Command:
    """A verb of vllmctl. ``about``: its line of help, ``more``: the rest of its description.

    ``fixed``: values of parameters that the command line does not take. ``printed``: the line that is printed for each
    thing done, with parameters and fields of the answer in braces; of a verb that settles, the end of the line
    "MODEL is running after 3s".
    """

    name: str
    about: str
    more: str = ""
    aliases: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    printed: str = ""


@frozen
class Call:
    """One HTTP request of a client. ``patient``: its answer may take as long as a start, so it has no read timeout."""

    method: str
    path: str
    body: Mapping[str, object] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    patient: bool = False


@frozen
class Verb:
    """One row of the table.

    ``event`` or ``does``: what is done, see the file's docstring. Where that returns nothing, the answer is the
    ModelLine of the model. ``settles``: the model changes its state, and the caller may wait for the end of that
    (``?wait=true``) or follow it (``Accept: application/x-ndjson``). ``patient``: the answer always takes as long as
    engines take. ``each``: the answer is about many models, and ``does`` gets the ``caller``, to show only those that
    it may see. ``ends_with_client``: it changes nothing and takes its time, so it ends when whoever asked has left.
    ``refuses``: HTTP statuses of errors that are the verb's own, for the documentation.
    """

    name: str
    method: str
    path: str
    summary: str
    answer: type[Answer]
    params: tuple[Param, ...] = ()
    event: str = ""
    does: str = ""
    scope: Literal["read", "admin"] = "admin"
    settles: bool = False
    patient: bool = False
    each: bool = False
    ends_with_client: bool = False
    about: str = ""
    refuses: tuple[int, ...] = ()
    python: Method | None = None
    commands: tuple[Command, ...] = ()

    @property
    def takes(self) -> tuple[Param, ...]:
        """All parameters, with ``wait`` if the verb settles."""
        return (*self.params, WAIT) if self.settles else self.params

    @property
    def of_one_model(self) -> bool:
        """Whether the path names a model."""
        return any(each.place == "path" and isinstance(each.kind, ModelName) for each in self.params)

    def call(self, arguments: Mapping[str, object]) -> Call:
        """The HTTP request with these arguments by the parameters' names. Raises BadRequest for an empty path part."""
        path, query, body = self.path, dict[str, str](), dict[str, object]()
        for param in sorted(self.takes, key=lambda each: each is not WAIT):
            value = arguments.get(param.name, param.default)
            if value is REQUIRED:
                raise TypeError(f"{self.name} needs {param.name}")
            if param.place == "path":
                path = re.sub(rf"\{{{param.name}(:path)?\}}", quoted(value).replace("\\", r"\\"), path)
            elif param.place == "body":
                body[param.key] = value
            elif not (value is None or value is False or value == ""):
                query[param.key] = "true" if value is True else str(value)
        patient = self.patient or bool(self.settles and arguments.get("wait"))
        return Call(self.method, path, body or None, query, patient)


def quoted(value: object) -> str:
    """A value as one part of a path: slashes in a model's name are quoted, so that no verb can hide behind them."""
    if value == "":
        raise BadRequest("the model's name is empty", param="model")
    return quote(str(value), safe="")


PLANNED = (
    Param("since", Moment(), "with what came since then (default: seven days ago)", "body", None),
    Param("devices", Text("sizes of devices", 2000), "on these devices instead, such as 80GiB,80GiB", "body", None),
    Param("policy", Text("a policy"), "by this one instead", "body", None),
    Param("host_memory", Text("a size"), "with so much host memory for sleepers instead", "body", None),
    Param("models", JsonObject("an object"), "settings, by model, instead of its own", "body", default={}),
)  # fmt: skip
PREVIEWED_DRAIN = Param("action", Word(("drain", "undrain")), "which verb")
PREVIEWED = Param("action", Word(("load", "sleep", "unload", "restart", "pin", "unpin", "lease", "release", "probe",
                                "disable", "enable")), "which verb")  # fmt: skip
WAIT = Param("wait", Flag(), "answer when it has settled, not at once", default=False, keyword=True)
MODEL = Param("model", ModelName(), place="path", metavar="MODEL", many=True,
              about="name, alias, or the end of a name that only one model has")  # fmt: skip
FORCE_OFF = Param("force", Flag(), "break off running requests", default=False, keyword=True, flags=("-f", "--force"))
FORCE_KILL = Param("force", Flag(), "also a process that is no engine's but is on a GPU", default=False, keyword=True,
                   flags=("-f", "--force"))  # fmt: skip
LEVEL = Param("level", Choice((1, 2, 3)), "how deep; 3 stops it (default: 1)", default=1, flags=("-l", "--level"))
PINNED = Param("pinned", Flag(), "whether it is to be", "body", default=True)
MESSAGE = Param("message", Text("a message", 500), "the message that its clients get", "body", None,
                flags=("-m", "--message"), metavar="TEXT")  # fmt: skip
LEASE = Param("lease", Text("a name of your choice"), "its name", "body")
SECONDS = Param("seconds", Seconds(LONGEST_LEASE), "for how long; null: until released", "body", None,
                wire="deadline_seconds")  # fmt: skip
STOP = Param("stop", Flag(), "the last one to go stops the model", default=False, keyword=True)
ALL = Param("all", Flag(), "wait for every engine, not only for the fastest", default=False, flags=("-a", "--all"))
LIMIT = Param("limit", Seconds(LONGEST_PROBE, above_zero=True), "how long at most (default: replicas.probe_limit)",
              default=None, keyword=True, metavar="TIME")  # fmt: skip
PID = Param("pid", Count(2, what="the number of a process"), "a process, as ps and nvidia-smi number them", "path",
            metavar="PID", missing="there is no process {value!r} that could be an engine's")  # fmt: skip
DEVICE = Param("device", Count(), "its number in vllmctl gpus", "path", metavar="GPU", many=True,
               missing="there is no device {value!r}: devices have numbers, see vllmctl gpus")  # fmt: skip
NAMED = Param("model", Text("the name of a model"), "its name", "path", metavar="MODEL")
FILES = Param("files", Flag(), "its files in the engines' cache as well", default=False, keyword=True)
DRY = Param("dry", Flag(), "only say what would go", default=False, keyword=True)
SUSPENDED = Param("suspended", Flag(), "whether it is about to sleep", "body", default=True)
DRAINED = Param("drained", Flag(), "whether it is to be", "body", default=True)

KEY = Param("name", Text("the name of a key"), "its name", "path", missing="there is no key {value!r}")
KEY_SETTINGS = Param("settings", JsonObject("an object"), "scopes, models, limits, priority, share, as in auth.keys "
                     "of the configuration; null takes a limit away", "body", default={})  # fmt: skip

OF_MODEL = Param("model", Text("the name of a model"), "of that model only", default="")
OF_KEY = Param("key", Text("the name of a key, or -"), "of the key with that name only; - is nobody's", default=None)
WANTED = (
    OF_MODEL,
    OF_KEY,
    Param("status", StatusClass(), "with that status only, such as 429 or 5xx", default=""),
    Param("since", Moment(), "that came since then: Unix time, or how long ago, such as 1h", default=None),
    Param("failed", Flag(), "only those that failed", default=False),
    Param("slower", Seconds(LONGEST_LEASE), "only those that took so many seconds or more", default=None),
)
REQUEST_ID = Param("request_id", Text("the id of a request"), "its x-request-id", "path", metavar="ID", many=True,
                   missing="there is no request {value!r}")  # fmt: skip

PROBES = """\
Probe the model's engines, all at once. Returns the ``fastest``, and the seconds of each of the ``replicas``.

Without ``all`` none is waited for once another has answered; with it each has ``limit`` seconds.
Raises Conflict where none of them serves."""

ON_MODEL = "/admin/models/{model:path}"
VERBS: tuple[Verb, ...] = (
    Verb("load", "POST", f"{ON_MODEL}/load", "Start or wake a model", ModelLine, (MODEL,),
         does="commands.load", settles=True,
         python=Method("load_model",
                       "Start or wake a model. Raises EngineFailed if the caller waits and the model does not start."),
         commands=(Command("start", "Start or wake models, and wait until they serve", aliases=("load",),
                           printed="; its output: vllmctl logs {model}"),)),
    Verb("wake", "POST", f"{ON_MODEL}/wake", "Wake or start a model", ModelLine, (MODEL,),
         does="commands.load", settles=True,
         python=Method("wake_model", "Wake the model, or start it where it is not loaded."),
         commands=(Command("wake-up", "Wake models, and wait until they serve",
                           aliases=("wakeup", "wake_up", "wake")),)),
    Verb("unload", "POST", f"{ON_MODEL}/unload", "Stop a model", ModelLine, (MODEL, FORCE_OFF),
         does="commands.unload", settles=True,
         python=Method("unload_model", "Stop a model, after its requests unless ``force``."),
         commands=(Command("stop", "Stop models after their requests, and forget failures", aliases=("unload",)),)),
    Verb("sleep", "POST", f"{ON_MODEL}/sleep", "Put a model to sleep", ModelLine, (MODEL, LEVEL),
         does="commands.sleep", settles=True, refuses=(409,),
         python=Method("sleep_model", "Put a model to sleep at level 1 or 2, or stop it (3)."),
         commands=(Command("sleep", "Put models to sleep after their requests",
                           "Level 1 keeps the weights in host memory, level 2 discards them, level 3 stops the "
                           "engine."),)),
    Verb("pin", "POST", f"{ON_MODEL}/pin", "Pin or unpin a model", ModelLine, (MODEL, PINNED), event="PinSet",
         python=Method("pin_model", "Keep a model loaded once it is, or let it be evicted again."),
         commands=(Command("pin", "Keep models loaded: they are never evicted and never sleep", fixed={"pinned": True},
                           printed="{model} is pinned until vllmctl unpin, or until the daemon restarts"),
                   Command("unpin", "Let models be evicted and sleep again", fixed={"pinned": False},
                           printed="{model} is not pinned any more; a restart of the daemon pins what the "
                                "configuration pins"))),
    Verb("disable", "POST", f"{ON_MODEL}/disable", "Take a model out of use until it is enabled", ModelLine,
         (MODEL, MESSAGE), does="commands.disable", refuses=(503,),
         about="Running requests are finished, then the engine is stopped. Waiting and new ones get 503 with the code "
               "model_disabled and the message. It stays disabled over restarts. A replica may be named, too.",
         python=Method("disable_model", "Take a model out of use, after its requests; clients get ``message`` then."),
         commands=(Command("disable", "Take models out of use; their clients get your message",
                           "Running requests are finished, then the engine is stopped; waiting and new ones get status "
                           "503 with the message. Nothing loads the model, over restarts as well, until vllmctl "
                           "enable. Of a model with replicas one may be named, such as MODEL@2.",
                           printed="{model} is disabled; clients get the message: {disabled}"),)),
    Verb("enable", "POST", f"{ON_MODEL}/enable", "Serve a disabled model again", ModelLine, (MODEL,),
         does="commands.enable", refuses=(503,),
         python=Method("enable_model", "Serve a disabled model again, with all its replicas."),
         commands=(Command("enable", "Put models in use again that were disabled",
                           printed="{model} is in use again; the next request loads it"),)),
    Verb("probe", "POST", f"{ON_MODEL}/probe", "How soon a model's engines answer", Probed,
         (MODEL, ALL, LIMIT), does="commands.probe", patient=True, ends_with_client=True, refuses=(409,),
         python=Method("probe", PROBES)),
    Verb("lease", "POST", f"{ON_MODEL}/lease", "Keep a model for a time", ModelLine, (MODEL, LEASE, SECONDS),
         does="commands.lease",
         python=Method("lease_model", "Keep a model loaded under the name ``lease``, for ``seconds``; the last lease "
                                      "to end stops it.")),
    Verb("release", "DELETE", f"{ON_MODEL}/lease", "Give a lease back", ModelLine,
         (MODEL, Param("lease", Text("the name of a lease"), "its name"), STOP), does="commands.release",
         python=Method("release_model", "Give a lease back; ``stop``: if it was the last, stop the model at once.")),
    Verb("preview", "GET", f"{ON_MODEL}/preview", "What a verb would do with a model now", Preview,
         (MODEL, PREVIEWED), does="previews.of_model", scope="read", each=True,
         python=Method("preview", "What the verb ``action`` would do with a model now; nothing is done.")),
    Verb("preview_device", "GET", "/admin/devices/{device}/preview", "What a verb would do with a device",
         Preview, (DEVICE, PREVIEWED_DRAIN), does="previews.of_device", scope="read",
         python=Method("preview_device", "What draining the device, or giving it back, would do; nothing is done.")),
    Verb("status", "GET", "/admin/status", "Everything vllmctl shows", Status, does="status.status", scope="read",
         each=True,
         python=Method("status", "The status of the daemon, its devices and its models.")),
    Verb("decisions", "GET", "/admin/decisions", "The last decisions and their numbers", Decisions,
         (Param("model", ModelName(), "of that model only", default=""),), does="status.decisions", scope="read",
         python=Method("decisions", "The last decisions with their numbers, oldest first.", "decisions")),
    Verb("plan", "POST", "/admin/plan", "Simulate the recorded traffic with other devices, models or rules",
         Plan, PLANNED, does="plans.run", patient=True, ends_with_client=True, refuses=(404, 409, 504),
         about="Two runs, as it is and with the change, as vllmctl simulate --recorded makes them. A process of its "
               "own does it, one plan at a time, with the last 20,000 requests at most.",
         python=Method("plan", "Simulate the recorded traffic as it is, and with other devices, models or rules.")),
    Verb("reload", "POST", "/admin/reload", "Read the configuration again", Reloaded, does="commands.reload",
         python=Method("reload", "Read the configuration again. Raises ConfigError where it is invalid.")),
    Verb("kill", "POST", "/admin/processes/{pid}/kill", "Kill the engine that has a process", Killed,
         (PID, FORCE_KILL), does="commands.kill",
         python=Method("kill_process", "Kill the whole engine that a process belongs to."),
         commands=(Command("kill", "Kill the whole engine that a process belongs to, where nothing else ends it",
             "Models end properly with vllmctl stop. A process that is no engine's, but holds a GPU, is killed with "
             "--force, as far as the daemon's user may.", printed="{message}"),)),
    Verb("drain", "POST", "/admin/devices/{device}/drain", "Take a device out of use for maintenance, or give it back",
         Device, (DEVICE, DRAINED), does="commands.drain",
         python=Method("drain_device", "Take a device out of use, or give it back."),
         commands=(Command("drain", "Take GPUs out of use for maintenance: engines there end after their requests, and "
                           "no new one starts", fixed={"drained": True},
                           printed="device {device} is drained until vllmctl undrain, or until the daemon restarts; "
                                "vllmctl gpus shows what still runs there"),
                   Command("undrain", "Give drained GPUs back", fixed={"drained": False},
                           printed="device {device} is in use again"))),
    Verb("suspend", "POST", "/admin/suspend", "Take the engines off the GPUs before the machine sleeps, or let them "
         "back", Suspended, (SUSPENDED,), does="commands.suspend", patient=True,
         about="Requests have five seconds, then they are cut; CPU models go on. vllmd-sleep.service calls it.",
         python=Method("suspend", "Take the engines off the GPUs, or let them back. Returns those that were there."),
         commands=(Command("suspend", "Take the engines off the GPUs, before the machine sleeps",
                           fixed={"suspended": True}, printed="no engine is on a GPU until vllmctl resume"),
                   Command("resume", "Let engines use the GPUs again, after the machine's sleep",
                           fixed={"suspended": False}, printed="the GPUs are in use again"))),
    Verb("cached", "GET", "/admin/store", "What the engines' caches hold", Cached, does="store.contents", scope="read",
         python=Method("cached_models", "The models in the engines' caches, and which served models use each.",
                       "cached")),
    Verb("stop-download", "DELETE", "/admin/store/downloads/{model:path}", "End the download of a model", Download,
         (NAMED,), does="store.stop", refuses=(404,),
         python=Method("stop_download", "End a download; the part that is here is kept for the next one.")),
    Verb("remove", "DELETE", "/admin/store/models/{model:path}", "Remove an added model", Removed,
         (NAMED, FILES, DRY), does="store.remove", patient=True, refuses=(404, 409),
         python=Method("remove_model",
                       "Remove an added model, and with ``files`` its files; ``dry``: only say what would go.")),
    Verb("keys", "GET", "/admin/keys", "The API keys, without their text", Keys, does="keys.list", scope="read",
         python=Method("keys", "All keys, without their text.", "keys")),
    Verb("create_key", "POST", "/admin/keys", "Make an API key; only this answer has its text", NewKey,
         (Param("name", Text("a name"), "its name", "body"), KEY_SETTINGS), does="keys.create", refuses=(409,),
         about="Without any key every client may use the models: from the first one on every request needs one.",
         python=Method("create_key", "Make a key; only this answer has its text.")),
    Verb("limit_key", "POST", "/admin/keys/{name:path}/limits", "Change the settings of a key, at once", KeyLine,
         (KEY, KEY_SETTINGS), does="keys.limit",
         python=Method("limit_key", "Change the named settings of a key, and no others.")),
    Verb("revoke_key", "DELETE", "/admin/keys/{name:path}", "Revoke a key, at once", Keys, (KEY,),
         does="keys.revoke",
         python=Method("revoke_key", "Revoke a key. Returns the keys that are left.", "keys")),
    Verb("requests", "GET", "/admin/requests", "The last requests, and those under way", Requests,
         (*WANTED, Param("limit", Count(0, MOST_SHOWN), "how many of the last", default=SHOWN)),
         does="records.requests", scope="read", each=True,
         python=Method("requests", "The last requests and those under way that match the filters.")),
    Verb("request", "GET", "/admin/requests/{request_id:path}", "One of the last requests, with its head",
         RequestInFull, (REQUEST_ID,), does="records.request", scope="read", each=True, refuses=(404,),
         about="With its bodies, if they were recorded and the caller has the scope admin.",
         python=Method("request", "One of the last requests, with its head. Raises NotFound.")),
    Verb("cancel", "DELETE", "/admin/requests/{request_id:path}", "Cancel a request that is under way", Cancelled,
         (REQUEST_ID,), does="records.cancel", each=True, refuses=(404,),
         about="A waiting request leaves its queue, a running one its engine. The client gets status 403 with the code "
               "request_cancelled, after which clients do not try again by themselves; where the answer has begun, it "
               "is broken off.",
         python=Method("cancel_request", "Cancel a request that waits or runs. Raises NotFound.", "cancelled"),
         commands=(Command("cancel", "Cancel requests that are under way, by their ids in vllmctl requests",
                           "Their clients get status 403 with the code request_cancelled, after which they do not try "
                           "again by themselves; where an answer has begun, it is broken off. The engine is free at "
                           "once; the model stays loaded.", printed="request {request_id} is cancelled"),)),
    Verb("recordings", "GET", "/admin/recordings", "The recordings of bodies that are under way", Recordings,
         does="records.recorded", scope="read",
         python=Method("recordings", "The recordings of bodies under way, and the size of what they have kept.")),
    Verb("record", "POST", "/admin/recordings", "Record bodies of a model's or a key's requests", Recordings,
         (Param("model", Text("the name of a model"), "of that model", "body", default=None),
          Param("key", Text("the name of a key"), "of the key with that name", "body", default=None),
          Param("seconds", Seconds(LONGEST_RECORDING, above_zero=True), "for how long", "body", default=RECORDING),
          Param("most_bytes", Count(1, LONGEST_BODY), "how much of each body", "body", default=BODY)),
         does="records.record",
         about="Each recorded answer has the field x-vllmd-recorded.",
         python=Method("record", "Keep bodies, in memory, of a model's requests, a key's, or of both together.")),
    Verb("stop-recording", "DELETE", "/admin/recordings", "End a recording, or all", Recordings,
         (Param("number", Count(), "which; all without it", default=None),), does="records.stop_recording",
         about="The end of the last recording removes all recorded bodies.", refuses=(404,),
         python=Method("stop_recording", "End one recording, or all.")),
    Verb("usage", "GET", "/admin/usage", "Use by key, model or time", Usage,
         (Param("by", Text("key, model, day, hour or month, or several with commas between"), "what to add up by",
                default="key"),
          Param("since", Moment(), "Unix time, or how long ago; 30d without it", default=None),
          Param("until", Moment(), "the same; now without it", default=None), OF_KEY, OF_MODEL),
         does="records.usage", scope="read", refuses=(404, 503),
         python=Method("usage", "Sums of use; ``since`` and ``until``: Unix time, the last 30 days without them.")),
)  # fmt: skip


def verb(name: str) -> Verb:
    """The row of this name. Raises KeyError."""
    return {row.name: row for row in VERBS}[name]

"""The table of operators' verbs. A row is all that the route, its documentation, the clients and vllmctl know of one.

Of a row follow: the route and what it checks (``vllmd.admin.verbs``), its operation in ``/openapi.json``, a method of
``Client`` and ``AsyncClient`` (``packaging/dev/make-clients`` writes them), a verb of vllmctl with its arguments, help
and completion (``vllmd.cli.table``), and its lines in the manual.

What is done is either a core's event, by its name in ``vllmd.core.events``, whose fields are called as the parameters
are; or a method of what ``vllmd.admin.control`` describes, which takes the parameters by their names. A test holds both
to the row. What is no operator's verb has no row: streams (events, logs), health, metrics, the instances API.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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

LONGEST_PROBE = 3600.0  # seconds
LONGEST_LEASE = 1e9  # seconds; some thirty years
LONGEST_RECORDING, RECORDING = 7 * 86400.0, 600.0  # seconds
LONGEST_BODY, BODY = 16 << 20, 64 << 10  # bytes kept of one
MOST_SHOWN, SHOWN = 10_000, 100  # requests in one answer
REQUIRED = ...


@dataclass(frozen=True, eq=False, repr=False)
class Param:
    """One parameter.

    ``name``: Python's, and that on the wire unless ``wire`` is another. ``default``: REQUIRED without one.
    ``keyword``: the clients' methods take it by its name only. ``flags``: how vllmctl spells it, ``--NAME`` if nothing
    else is said; one of the path is a word, called ``metavar``, of which it takes ``many`` and does the verb for each.
    ``missing``: what is said of a value in a path that cannot be one.
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


@dataclass(frozen=True, eq=False, repr=False)
class Method:
    """A method of the clients. ``part``: which field of the answer it returns, "" for the answer."""

    name: str
    about: str
    part: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Command:
    """A verb of vllmctl. ``about`` is its line of help, ``more`` the rest of its description.

    ``fixed``: parameters that it does not take, with their values. ``said``: what is printed for each thing done, with
    the parameters and the answer's fields in braces; for a verb that settles, what follows "M is running after 3s".
    """

    name: str
    about: str
    more: str = ""
    aliases: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """One request. ``patient``: its answer may take as long as a model takes to load, so no read timeout counts."""

    method: str
    path: str
    body: Mapping[str, object] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    patient: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Verb:
    """One row.

    ``event`` or ``does``: see above. A ModelLine is the answer that needs no maker: it is the line of the model.
    ``settles``: the model moves, and who asks may wait (``?wait=true``) until it has come to rest, or follow it
    (``Accept: application/x-ndjson``). ``patient``: it takes as long as engines take, whoever waits.
    ``each``: it tells of many models, and ``does`` gets the ``caller``, whom only its own ones are shown.
    ``refuses``: HTTP statuses with which it says no in its own way, for the documentation.
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
    about: str = ""
    refuses: tuple[int, ...] = ()
    python: Method | None = None
    commands: tuple[Command, ...] = ()

    @property
    def takes(self) -> tuple[Param, ...]:
        """All parameters, ``wait`` among them where it settles."""
        return (*self.params, WAIT) if self.settles else self.params

    @property
    def of_one_model(self) -> bool:
        """Whether the path names a model."""
        return any(each.place == "path" and isinstance(each.kind, ModelName) for each in self.params)

    def call(self, arguments: Mapping[str, object]) -> Call:
        """The request, with these values by the parameters' names. Raises BadRequest for an empty name in the path."""
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
    """A model's name may hold slashes; they are quoted so that no verb can hide in it."""
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
MESSAGE = Param("message", Text("a message", 500), "what its clients are told", "body", None,
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
Ask each of its engines a short question, all at the same time: ``fastest``, and ``replicas`` with seconds.

But with ``all``, which gives each of them ``limit`` seconds, nobody is waited for once another has answered.
Raises Conflict where none of them serves."""

ON_MODEL = "/admin/models/{model:path}"
VERBS: tuple[Verb, ...] = (
    Verb("load", "POST", f"{ON_MODEL}/load", "Start or wake a model", ModelLine, (MODEL,),
         does="commands.load", settles=True,
         python=Method("load_model",
                       "Start or wake it. Raises EngineFailed where it was waited for and did not start."),
         commands=(Command("start", "Start or wake models, and wait until they serve", aliases=("load",),
                           said="; its output: vllmctl logs {model}"),)),
    Verb("wake", "POST", f"{ON_MODEL}/wake", "Wake or start a model", ModelLine, (MODEL,),
         does="commands.load", settles=True,
         python=Method("wake_model", "Wake the model, or start it where it is not loaded."),
         commands=(Command("wake-up", "Wake models, and wait until they serve",
                           aliases=("wakeup", "wake_up", "wake")),)),
    Verb("unload", "POST", f"{ON_MODEL}/unload", "Stop a model", ModelLine, (MODEL, FORCE_OFF),
         does="commands.unload", settles=True,
         python=Method("unload_model", "Stop it, after its requests unless ``force``."),
         commands=(Command("stop", "Stop models after their requests, and forget failures", aliases=("unload",)),)),
    Verb("sleep", "POST", f"{ON_MODEL}/sleep", "Put a model to sleep", ModelLine, (MODEL, LEVEL),
         does="commands.sleep", settles=True, refuses=(409,),
         python=Method("sleep_model", "Put it to sleep at level 1 or 2, or stop it (3)."),
         commands=(Command("sleep", "Put models to sleep after their requests",
                           "Level 1 keeps the weights in host memory, level 2 discards them, level 3 stops the "
                           "engine."),)),
    Verb("pin", "POST", f"{ON_MODEL}/pin", "Pin or unpin a model", ModelLine, (MODEL, PINNED), event="PinSet",
         python=Method("pin_model", "Keep it loaded once it is, or do so no more."),
         commands=(Command("pin", "Keep models loaded: they are never evicted and never sleep", fixed={"pinned": True},
                           said="{model} is pinned until vllmctl unpin, or until the daemon restarts"),
                   Command("unpin", "Let models be evicted and sleep again", fixed={"pinned": False},
                           said="{model} is pinned no more; a restart of the daemon pins what the "
                                "configuration pins"))),
    Verb("disable", "POST", f"{ON_MODEL}/disable", "Serve nobody by a model until it is enabled", ModelLine,
         (MODEL, MESSAGE), does="commands.disable", refuses=(503,),
         about="Requests for it get 503 with the code model_disabled and the message. Those that run come to their "
               "end, then its engine is stopped. It stays disabled over restarts. A replica may be named, too.",
         python=Method("disable_model", "Have its clients told ``message``; it stops once its requests have ended."),
         commands=(Command("disable", "Take models out of use: who asks for them gets your message",
                           "Requests that run come to their end, then the engine is stopped; those that wait, and all "
                           "that come, get status 503 with the message. Nothing loads the model, over restarts as "
                           "well, until vllmctl enable. Of a model with replicas one may be named, such as MODEL@2.",
                           said="{model} is disabled; clients are told: {disabled}"),)),
    Verb("enable", "POST", f"{ON_MODEL}/enable", "Serve a disabled model again", ModelLine, (MODEL,),
         does="commands.enable", refuses=(503,),
         python=Method("enable_model", "Serve it again, with all its replicas."),
         commands=(Command("enable", "Put models in use again that were disabled",
                           said="{model} is in use again; the next request loads it"),)),
    Verb("probe", "POST", f"{ON_MODEL}/probe", "How soon each of a model's engines answers", Probed,
         (MODEL, ALL, LIMIT), does="commands.probe", patient=True, refuses=(409,),
         python=Method("probe", PROBES)),
    Verb("lease", "POST", f"{ON_MODEL}/lease", "Keep a model for a time", ModelLine, (MODEL, LEASE, SECONDS),
         does="commands.lease",
         python=Method("lease_model", "Keep it under the name ``lease``; after ``seconds`` the lease ends, and the "
                                      "last one stops the model.")),
    Verb("release", "DELETE", f"{ON_MODEL}/lease", "Give a lease back", ModelLine,
         (MODEL, Param("lease", Text("the name of a lease"), "its name"), STOP), does="commands.release",
         python=Method("release_model", "Give a lease back; ``stop``: if it was the last, stop the model at once.")),
    Verb("preview", "GET", f"{ON_MODEL}/preview", "What a verb would do with a model, as things stand", Preview,
         (MODEL, PREVIEWED), does="previews.of_model", scope="read", each=True,
         python=Method("preview", "What that verb would do with it as things stand; nothing is done.")),
    Verb("preview_device", "GET", "/admin/devices/{device}/preview", "What a verb would do with a device",
         Preview, (DEVICE, PREVIEWED_DRAIN), does="previews.of_device", scope="read",
         python=Method("preview_device", "What draining the device, or giving it back, would do; nothing is done.")),
    Verb("status", "GET", "/admin/status", "Everything vllmctl shows", Status, does="status.status", scope="read",
         each=True,
         python=Method("status", "How everything stands: the daemon, its devices, its models.")),
    Verb("decisions", "GET", "/admin/decisions", "The last decisions and their numbers", Decisions,
         (Param("model", ModelName(), "of that model only", default=""),), does="status.decisions", scope="read",
         python=Method("decisions", "The last decisions with their numbers, oldest first.", "decisions")),
    Verb("plan", "POST", "/admin/plan", "What the recorded traffic would have met with other devices, models or rules",
         Plan, PLANNED, does="plans.run", patient=True, refuses=(404, 409, 504),
         about="Simulated beside how it is, as vllmctl simulate --recorded does it, by a process of its own; one at a "
               "time, with the last 20,000 requests at most.",
         python=Method("plan", "What the recorded traffic would have met with other devices, models or rules.")),
    Verb("reload", "POST", "/admin/reload", "Take the configuration anew", Reloaded, does="commands.reload",
         python=Method("reload", "Take the configuration anew. Raises ConfigError if it is invalid; nothing changed.")),
    Verb("kill", "POST", "/admin/processes/{pid}/kill", "Kill the engine that has a process", Killed,
         (PID, FORCE_KILL), does="commands.kill",
         python=Method("kill_process", "Kill the engine that has the process, as a whole."),
         commands=(Command("kill", "Kill the engine that has a process, as a whole: for one that nothing else ends",
             "Models end properly with vllmctl stop. A process that is no engine's, but holds a GPU, is killed with "
             "--force, as far as the daemon's user may.", said="{message}"),)),
    Verb("drain", "POST", "/admin/devices/{device}/drain", "Take a device out of use for maintenance, or give it back",
         Device, (DEVICE, DRAINED), does="commands.drain",
         python=Method("drain_device", "Take a device out of use, or give it back; how it is then."),
         commands=(Command("drain", "Take GPUs out of use for maintenance: what runs there ends with its requests, and "
                           "nothing new comes", fixed={"drained": True},
                           said="device {device} is drained until vllmctl undrain, or until the daemon restarts; "
                                "vllmctl gpus shows what still runs there"),
                   Command("undrain", "Give drained GPUs back", fixed={"drained": False},
                           said="device {device} is in use again"))),
    Verb("suspend", "POST", "/admin/suspend", "Have engines leave the GPUs before the machine sleeps, or come back",
         Suspended, (SUSPENDED,), does="commands.suspend", patient=True,
         about="Requests get five seconds, then they are cut; CPU models go on. vllmd-sleep.service asks for it.",
         python=Method("suspend", "Have engines leave the GPUs, or come back; who was there."),
         commands=(Command("suspend", "Have engines leave the GPUs, before the machine sleeps",
                           fixed={"suspended": True}, said="no engine is on a GPU until vllmctl resume"),
                   Command("resume", "Let engines use the GPUs again, after the machine's sleep",
                           fixed={"suspended": False}, said="the GPUs are in use again"))),
    Verb("cached", "GET", "/admin/store", "What the engines' caches hold", Cached, does="store.contents", scope="read",
         python=Method("cached_models", "What the engines' caches hold, and which models are loaded from it.",
                       "cached")),
    Verb("stop-download", "DELETE", "/admin/store/downloads/{model:path}", "End the download of a model", Download,
         (NAMED,), does="store.stop", refuses=(404,),
         python=Method("stop_download", "End a download; what has come is kept for the next one.")),
    Verb("remove", "DELETE", "/admin/store/models/{model:path}", "Serve a model no more", Removed,
         (NAMED, FILES, DRY), does="store.remove", patient=True, refuses=(404, 409),
         python=Method("remove_model",
                       "Serve an added model no more, and with ``files`` remove those; ``dry``: only say so.")),
    Verb("keys", "GET", "/admin/keys", "The API keys, without their text", Keys, does="keys.list", scope="read",
         python=Method("keys", "All keys, without their text.", "keys")),
    Verb("create_key", "POST", "/admin/keys", "Make an API key; its text is told this once", NewKey,
         (Param("name", Text("a name"), "whose it is", "body"), KEY_SETTINGS), does="keys.create", refuses=(409,),
         about="Without any keys everybody may use the models: from the first one on every request needs one.",
         python=Method("create_key", "Make a key; its text is told this once.")),
    Verb("limit_key", "POST", "/admin/keys/{name}/limits", "Change what a key may, at once", KeyLine,
         (KEY, KEY_SETTINGS), does="keys.limit",
         python=Method("limit_key", "Change the settings that are named, and no others.")),
    Verb("revoke_key", "DELETE", "/admin/keys/{name}", "Have a key open nothing any more, at once", Keys, (KEY,),
         does="keys.revoke",
         python=Method("revoke_key", "Have it open nothing any more.", "keys")),
    Verb("requests", "GET", "/admin/requests", "The last requests, and those under way", Requests,
         (*WANTED, Param("limit", Count(0, MOST_SHOWN), "how many of the last", default=SHOWN)),
         does="records.requests", scope="read", each=True,
         python=Method("requests", "The last requests and those under way that are as asked for, from ``since`` on.")),
    Verb("request", "GET", "/admin/requests/{request_id}", "One of the last requests, with its head", RequestInFull,
         (REQUEST_ID,), does="records.request", scope="read", each=True, refuses=(404,),
         about="With bodies, if they were recorded and the caller may change things.",
         python=Method("request", "One of the last requests. Raises NotFound.")),
    Verb("cancel", "DELETE", "/admin/requests/{request_id}", "End a request that is under way", Cancelled,
         (REQUEST_ID,), does="records.cancel", each=True, refuses=(404,),
         about="One that waits leaves its queue, one that runs its engine. Its client gets status 403 with the code "
               "request_cancelled, after which clients do not try again by themselves; where the answer has begun, it "
               "is broken off.",
         python=Method("cancel_request", "End one that waits or runs, as it was then. Raises NotFound.", "cancelled"),
         commands=(Command("cancel", "End requests that are under way, by their ids in vllmctl requests",
                           "Their clients get status 403 with the code request_cancelled, after which they do not try "
                           "again by themselves; where an answer has begun, it is broken off. The engine is free at "
                           "once; the model stays loaded.", said="request {request_id} is cancelled"),)),
    Verb("recordings", "GET", "/admin/recordings", "Whose bodies are recorded now", Recordings,
         does="records.recorded", scope="read",
         python=Method("recordings", "Whose bodies are recorded, and how much is kept.")),
    Verb("record", "POST", "/admin/recordings", "Record bodies of a model's or a key's requests", Recordings,
         (Param("model", Text("the name of a model"), "of that model", "body", default=None),
          Param("key", Text("the name of a key"), "of the key with that name", "body", default=None),
          Param("seconds", Seconds(LONGEST_RECORDING, above_zero=True), "for how long", "body", default=RECORDING),
          Param("most_bytes", Count(1, LONGEST_BODY), "how much of each body", "body", default=BODY)),
         does="records.record",
         about="Clients are told by the field x-vllmd-recorded of each answer.",
         python=Method("record", "Have bodies kept, in memory, of a model's requests, a key's, or of both together.")),
    Verb("stop-recording", "DELETE", "/admin/recordings", "End a recording, or all", Recordings,
         (Param("number", Count(), "which; all without it", default=None),), does="records.stop_recording",
         about="With the last one what is kept of bodies goes.", refuses=(404,),
         python=Method("stop_recording", "End one, or all of them.")),
    Verb("usage", "GET", "/admin/usage", "Who used how much", Usage,
         (Param("by", Text("key, model, day, hour or month, or several with commas between"), "what to add up by",
                default="key"),
          Param("since", Moment(), "Unix time, or how long ago; 30d without it", default=None),
          Param("until", Moment(), "the same; now without it", default=None), OF_KEY, OF_MODEL),
         does="records.usage", scope="read", refuses=(404, 503),
         python=Method("usage", "Sums of use; ``since`` and ``until``: Unix time, the last 30 days without them.")),
)  # fmt: skip


def verb(name: str) -> Verb:
    """The row of this name. Raises KeyError."""
    for row in VERBS:
        if row.name == name:
            return row
    raise KeyError(name)

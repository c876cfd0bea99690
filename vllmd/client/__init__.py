"""The Python library: a client, and managers that keep a model loaded for as long as a program needs it.

``sync`` and ``asynchronous`` hold the two clients, ``calls`` the endpoints that
both send, ``sse``, ``figures`` and ``errors`` what comes back. ``servers`` and ``offline``
are the managers: of a served model, and of one in a process of its own.
Nothing of the daemon is imported here.
"""

from vllmd.client.asynchronous import AsyncClient
from vllmd.client.engine_args import VLLMEngineArgs
from vllmd.client.errors import AnswerError, StreamFailed, TimedOut, Unreachable
from vllmd.client.offline import ModelManager
from vllmd.client.servers import ServerManager
from vllmd.client.sync import Client
from vllmd.errors import VllmdError

VLLMProxyClient = Client
VLLMProxyAsyncClient = AsyncClient

__all__ = [
    "AnswerError",
    "AsyncClient",
    "Client",
    "ModelManager",
    "ServerManager",
    "StreamFailed",
    "TimedOut",
    "Unreachable",
    "VLLMEngineArgs",
    "VLLMProxyAsyncClient",
    "VLLMProxyClient",
    "VllmdError",
]

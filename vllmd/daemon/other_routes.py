"""The routes that a daemon has when somebody asks for one of them: the page's, operators', metrics, Ollama's.

The daemon imports this a moment after it has opened (``service.import_other_routes``); ``listeners`` puts the routes in
at the first request for a path that is none of the models' (``Router.add_later``).
"""

from __future__ import annotations

from vllmd.admin.control import Control
from vllmd.admin.page_routes import PageEndpoints, add_page
from vllmd.admin.routes import add_metrics, add_operator
from vllmd.admin.verbs import audited
from vllmd.ollama.endpoints import add_ollama_routes
from vllmd.ollama.store import DaemonStore
from vllmd.proxy.forward import Relay
from vllmd.proxy.routing import Router

__all__ = ["PageEndpoints", "add_others"]


def add_others(router: Router, page: PageEndpoints, relay: Relay, control: Control) -> None:
    """Put the routes of the file's head into ``router``, in the order in which they are matched."""
    add_page(router, page)
    add_metrics(router, control)
    add_operator(router, control)
    add_ollama_routes(router, relay, control, DaemonStore(control), audited)

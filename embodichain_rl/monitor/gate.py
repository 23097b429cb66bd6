"""Who may see the page: those with the token, from this machine, and no other site's scripts."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ["Gate"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine. A name that another site lets point here is refused."""

COOKIE = "embodichain_rl_token"


class Gate:
    """An ASGI application that lets requests through to another one, or refuses them with 403.

    The token is given once in the address, and then kept in a cookie that scripts can't read and that no other site's
    requests carry. A request that says another origin than the page's is refused, also for the websocket.

    Args:
        app: the other application.
        token: the token.
    """

    def __init__(self, app: Any, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        kept = _cookie(headers.get("cookie", ""), f"{COOKIE}_{_port(headers)}")
        if not self._is_ours(headers) or not (self._matches(given) or self._matches(kept)):
            await _refuse(scope, receive, send)
            return
        if not self._matches(given):
            await self._app(scope, receive, send)
            return
        cookie = f"{COOKIE}_{_port(headers)}={self._token}; Path=/; HttpOnly; SameSite=Strict"

        async def send_with_cookie(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
            await send(message)

        await self._app(scope, receive, send_with_cookie)

    def _matches(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())

    def _is_ours(self, headers: dict[str, str]) -> bool:
        host = headers.get("host", "")
        if host.rsplit(":", 1)[0] not in LOCAL:
            return False
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc == host


def _port(headers: dict[str, str]) -> str:
    # Cookies do not know ports: two pages of this machine would take each other's.
    return headers.get("host", "").rsplit(":", 1)[-1]


def _cookie(header: str, name: str) -> str:
    cookies: SimpleCookie = SimpleCookie()
    cookies.load(header)
    return cookies[name].value if name in cookies else ""


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 4403})
        return
    text = b"Open the address that embodichain-rl has printed, with its token, on this machine."
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": text})

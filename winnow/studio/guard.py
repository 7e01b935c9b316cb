"""What stands before the studio's routes: Host, Origin and the key of this run, so that no other page can drive it."""

from __future__ import annotations

from typing import Any

from winnow.serve.errors import ApiError
from winnow.serve.guard import Guard, Header

REPORT = "/report/"  # pages of stores: a frame sends no key, and the word in the address is one
KEYED = "/api/"
OWN = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
OWN += "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
FRAMED = "sandbox allow-scripts; frame-ancestors 'self'"  # beside the policy that the report itself has
SAME = (b"same-origin", b"none")


class StudioGuard(Guard):
    """Answers requests of the studio's own page only.

    The page itself is open: it holds no secret. What it calls asks for the key, which the printed address carries
    behind the #, where no server and no other page sees it.
    """

    def is_open(self, path: str) -> bool:
        return not path.startswith(KEYED)

    def headers(self, path: str) -> list[Header]:
        policy = FRAMED if path.startswith(REPORT) else OWN
        return [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-store"),
        ]

    def check(self, scope: Any) -> None:
        super().check(scope)
        found = dict(scope["headers"])
        host, origin = found[b"host"], found.get(b"origin")
        foreign = origin is not None and origin not in (b"http://" + host, b"https://" + host)
        if self.is_open(scope["path"]) and not scope["path"].startswith(REPORT):
            return
        if foreign or found.get(b"sec-fetch-site", SAME[0]) not in SAME:
            raise ApiError("This request comes from another page.", status=403, code="foreign_origin")

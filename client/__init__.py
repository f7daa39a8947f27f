"""The codec on a server, by the same calls as in the process.

from hourglass.client import Client

with Client("127.0.0.1:50051") as client:
    data = client.encode("photo.jpg", quality=50)
    pixels = client.decode(data)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hourglass.client.remote import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    """`Client`, loaded when it is first asked for: `compress-image` lives here too, and starts faster without grpc."""
    if name == "Client":
        from hourglass.client.remote import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

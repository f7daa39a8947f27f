"""The codec on a server, by the same calls as in the process.

from hourglass.client import Client

with Client("127.0.0.1:50051") as client:
    data = client.encode("photo.jpg", quality=50)
    pixels = client.decode(data)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hourglass.client.remote import AsyncClient, Client, Encoded, ServerInfo, Tls

__all__ = ["AsyncClient", "Client", "Encoded", "ServerInfo", "Tls"]


def __getattr__(name: str) -> object:
    """The names above, loaded when first asked for: `compress-image` lives here too, and starts faster without grpc."""
    if name in __all__:
        from hourglass.client import remote

        return getattr(remote, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

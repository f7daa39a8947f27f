"""The codec on a server, by the same calls as in the process.

from hourglass.client import Client

with Client("127.0.0.1:50051") as client:
    data = client.encode("photo.jpg", quality=50)
    pixels = client.decode(data)
"""

from __future__ import annotations

from hourglass.client.remote import Client

__all__ = ["Client"]

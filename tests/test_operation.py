"""What an operator relies on: documents that are true, deployment files that fit the flags, traces, logs."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from hourglass.client import Client
from hourglass.codec import errors, watch
from hourglass.server import telemetry
from hourglass.server.config import Config
from hourglass.server.worker import Server

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "server" / "deploy"
HOURGLASS_SERVER = str(Path(sys.executable).with_name("hourglass-server"))

Serve = Callable[[Config], AbstractContextManager[Server]]


def test_every_flag_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- flags -->\n(.*?)<!-- /flags -->", readme, re.S)
    assert table is not None
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table[1].splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        ("--" + field.name.replace("_", "-"), f"HOURGLASS_{field.name.upper()}") for field in fields(Config)
    ]
    assert [row[3] for row in rows] == [field.metadata["help"] for field in fields(Config)]
    shown = subprocess.run([HOURGLASS_SERVER, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(row[0] in shown and row[1] in shown for row in rows)


def test_deployment_files_use_what_there_is() -> None:
    known = {f"HOURGLASS_{field.name.upper()}" for field in fields(Config)}
    for name in ("Dockerfile", "kubernetes.yaml", "hourglass-server.service"):
        used = set(re.findall(r"HOURGLASS_[A-Z_]+[A-Z]", (DEPLOY / name).read_text()))
        assert used <= known, name


def test_dashboard_shows_metrics_that_there_are() -> None:
    dashboard = (DEPLOY / "grafana.json").read_text()
    json.loads(dashboard)
    shown = set(re.findall(r"hourglass_[a-z_]+", dashboard))
    families = {family.name for family in telemetry.Telemetry().registry.collect()}
    assert "|".join(watch.HOPS) in dashboard
    assert {re.sub(r"_(total|bucket|sum)$", "", name) for name in shown} == families


def test_check(address: str) -> None:
    done = subprocess.run([HOURGLASS_SERVER, "--check", address], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{address}: SERVING\n")
    done = subprocess.run([HOURGLASS_SERVER, "--check", "127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        self.spans += [span for r in request.resource_spans for s in r.scope_spans for span in s.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def test_traces(serve: Serve, parrots: Path) -> None:
    """A call is a span, below the caller's, with one below it for each part; what takes turns is told in seconds."""
    collector = _Collector()
    receiver = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    config = Config(listen="127.0.0.1:0", trace_endpoint=f"http://127.0.0.1:{port}")
    with serve(config) as server, Client(f"127.0.0.1:{server.port}") as client:
        client.encode(parrots)
    receiver.stop(None).wait()
    names = {span.name for span in collector.spans}
    assert {"hourglass.v1.CodecService/Encode", "queue", "image", "codec"} <= names
    (call,) = (span for span in collector.spans if span.name.endswith("/Encode"))
    (part,) = (span for span in collector.spans if span.name == "codec")
    assert part.parent_span_id == call.span_id
    inside = {attribute.key: attribute.value.double_value for attribute in part.attributes}
    encoding = ("analysis", "quantisation", "prior", "entropy", "pack", "lossless")
    assert inside.keys() == {f"hourglass.{name}_seconds" for name in encoding}
    assert 0 < sum(inside.values()) <= (part.end_time_unix_nano - part.start_time_unix_nano) / 1e9
    assert call.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano <= call.end_time_unix_nano


def test_logs_tell_of_failures(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, parrots: Path
) -> None:
    """An error of the server's own is told in full to its log, and to the client only where to look."""
    from hourglass.codec import Codec

    def broken(*_: object, **__: object) -> bytes:
        raise errors.ModelError("encoder.onnx is missing: /secret/place")

    monkeypatch.setattr(Codec, "warm_up", lambda _: None)
    monkeypatch.setattr(Codec, "encode", broken)
    caplog.set_level(logging.ERROR)
    fails = pytest.raises(errors.ModelError, match="its log tells why")
    config = Config(listen="127.0.0.1:0")
    with serve(config) as server, Client(f"127.0.0.1:{server.port}") as client, fails as caught:
        client.encode(parrots)
    assert "secret" not in str(caught.value)
    (line,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert line.facts["request_id"] in str(caught.value)  # type: ignore[attr-defined]
    text = telemetry._Json().format(line)
    assert json.loads(text)["request_id"] == line.facts["request_id"]  # type: ignore[attr-defined]
    assert "/secret/place" in json.loads(text)["traceback"]

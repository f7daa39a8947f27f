"""What the server tells of itself: metrics, logs and traces, all made from one Record for each call."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import prometheus_client as prometheus

from hourglass.codec.errors import InvalidArgument
from hourglass.codec.watch import HOPS

_log = logging.getLogger("hourglass.server")

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 60)


@dataclass(frozen=True)
class Hop:
    """A part of a call: begin and end in ns since 1970; parts: seconds of what goes on inside it, by name."""

    name: str
    began: int
    ended: int
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """One call, filled in as it goes on."""

    method: str
    request_id: str
    client: str
    metadata: Mapping[str, str]
    began: int = field(default_factory=time.time_ns)
    code: str = "OK"
    message: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    pixels: int = 0
    pictures: int = 0
    failures: int = 0
    ratios: list[float] = field(default_factory=list)
    hops: list[Hop] = field(default_factory=list)

    @contextmanager
    def hop(self, name: str, parts: Mapping[str, float] | None = None) -> Iterator[None]:
        """Time a part of the call: receive, queue, header, image, codec, measure, write or send."""
        began = time.time_ns()
        try:
            yield
        finally:
            self.hops.append(Hop(name, began, time.time_ns(), parts or {}))


class Telemetry:
    """Takes the records of one process. registry: where its metrics are, for tests and for one process alone."""

    def __init__(self, trace_endpoint: str = "") -> None:
        self.registry = prometheus.CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self._calls = prometheus.Counter("hourglass_calls", "Calls answered.", ["method", "code"], **common)
        self._seconds = prometheus.Histogram(
            "hourglass_call_seconds",
            "From the first byte of a call to its last.",
            ["method"],
            buckets=_SECONDS,
            **common,
        )
        self._hops = prometheus.Histogram(
            "hourglass_hop_seconds",
            "Parts of calls, by the clock: receive, header, queue, image, codec, measure, write, send. "
            f"Inside codec, for each picture summed over its tiles and threads: {', '.join(HOPS)}.",
            ["method", "hop"],
            buckets=_SECONDS,
            **common,
        )
        self._pictures = prometheus.Counter("hourglass_pictures", "Pictures done.", ["method", "result"], **common)
        self._pixels = prometheus.Counter("hourglass_pixels", "Pixels done.", ["method"], **common)
        self._bytes = prometheus.Counter("hourglass_bytes", "Bytes of messages.", ["method", "direction"], **common)
        self._ratio = prometheus.Histogram(
            "hourglass_ratio",
            "Raw 24-bit size over file size of pictures encoded.",
            buckets=(5, 10, 20, 30, 40, 60, 80, 120, 200, 400),
            **common,
        )
        self._gauges = {
            name: prometheus.Gauge(f"hourglass_{name}", text, multiprocess_mode="livesum", **common)
            for name, text in {
                "queue_length": "Works that wait for a slot.",
                "running": "Works in a slot.",
                "inside": "Calls in the house.",
                "budget_bytes": "Bytes of the memory budget in use.",
                "resident_bytes": "Resident memory of the workers.",
                "workers": "Workers that serve.",
            }.items()
        }
        self._provider = _provider(trace_endpoint) if trace_endpoint else None
        self._tracer = self._provider.get_tracer("hourglass.server") if self._provider else None

    def gauges(self, **values: float) -> None:
        """Set gauges by name, and the resident memory."""
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        for name, value in {**values, "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE")}.items():
            self._gauges[name].set(value)

    def add(self, record: Record) -> None:
        """Count, log and trace a call that has ended."""
        ended = time.time_ns()
        self._calls.labels(record.method, record.code).inc()
        self._seconds.labels(record.method).observe((ended - record.began) / 1e9)
        sums: dict[str, float] = {}
        for hop in tuple(record.hops):  # work that was given up may still add its own
            for name, seconds in {hop.name: (hop.ended - hop.began) / 1e9, **hop.parts}.items():
                self._hops.labels(record.method, name).observe(seconds)
                sums[name] = sums.get(name, 0.0) + seconds
        for result, count in (("ok", record.pictures), ("failed", record.failures)):
            if count:
                self._pictures.labels(record.method, result).inc(count)
        self._pixels.labels(record.method).inc(record.pixels)
        self._bytes.labels(record.method, "in").inc(record.bytes_in)
        self._bytes.labels(record.method, "out").inc(record.bytes_out)
        for ratio in record.ratios:
            self._ratio.observe(ratio)
        self._log(record, ended, sums)
        if self._tracer is not None:
            self._trace(record, ended)

    def close(self) -> None:
        """Send the traces that are left; takes a moment."""
        if self._provider is not None:
            self._provider.shutdown()

    def _log(self, record: Record, ended: int, sums: dict[str, float]) -> None:
        facts = {
            "method": record.method,
            "code": record.code,
            "request_id": record.request_id,
            "client": record.client,
            "ms": round((ended - record.began) / 1e6, 1),
            "hops_ms": {name: round(1000 * seconds, 1) for name, seconds in sums.items()},
            "bytes_in": record.bytes_in,
            "bytes_out": record.bytes_out,
            "pixels": record.pixels,
        }
        _log.info(record.message or "call", extra={"facts": facts})

    def _trace(self, record: Record, ended: int) -> None:
        """A span for the call, below the caller's own where its metadata names one, and one below it for each hop.

        What takes turns inside a hop is no span but an attribute, its seconds.
        """
        from opentelemetry import propagate, trace

        assert self._tracer is not None
        span = self._tracer.start_span(
            f"hourglass.v1.CodecService/{record.method}",
            context=propagate.extract(record.metadata),
            kind=trace.SpanKind.SERVER,
            start_time=record.began,
            attributes={
                "rpc.system": "grpc",
                "rpc.method": record.method,
                "rpc.grpc.status_code": record.code,
                "hourglass.request_id": record.request_id,
                "hourglass.pixels": record.pixels,
            },
        )
        if record.code not in ("OK", "CANCELLED"):
            span.set_status(trace.StatusCode.ERROR, record.message)
        inside = trace.set_span_in_context(span)
        for hop in tuple(record.hops):
            parts = {f"hourglass.{name}_seconds": seconds for name, seconds in hop.parts.items()}
            self._tracer.start_span(hop.name, context=inside, start_time=hop.began, attributes=parts).end(hop.ended)
        span.end(ended)


def _provider(endpoint: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise InvalidArgument(
            f"--trace-endpoint needs OpenTelemetry ({exc}); run pip install 'hourglass-codec[tracing]'"
        ) from exc
    provider = TracerProvider(resource=Resource.create({"service.name": "hourglass-server"}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class _Json(logging.Formatter):
    """One JSON object a line: time, level, message, process, and the facts given with the message."""

    _zone: ClassVar[str] = "%Y-%m-%dT%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime(self._zone, time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            "pid": record.process,
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logs(level: str) -> None:
    """JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)  # Pillow's, of what it finds in files
    # What Python itself would print, of threads, destructors and its own end too.
    sys.excepthook = _log_exception
    threading.excepthook = lambda args: _log.error(
        "thread %s failed", args.thread and args.thread.name, exc_info=args.exc_value
    )
    sys.unraisablehook = lambda args: _log.error(
        "%s: %r", args.err_msg or "exception ignored in", args.object, exc_info=args.exc_value
    )


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _log.critical("the process fails", exc_info=(kind, error, trace))

"""A trained run as a small HTTP service: `python -m iqe_jax.serve RUN`, then open http://127.0.0.1:8000.

Scans go in by POST /predict, scores and heat maps come out; nothing is stored and nothing is sent elsewhere. This file
reads the command line, opens the port and ends in good order; the rest is in web.py, service.py and batching.py.
"""

import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from iqe_jax import cli
from iqe_jax.batching import Limits
from iqe_jax.progress import console

PROGRAM = "iqe_jax.serve"
DESCRIPTION = """A trained run as a small HTTP service: `python -m iqe_jax.serve RUN`, then open http://127.0.0.1:8000.

Scans go in by POST /predict, scores and heat maps come out; nothing is stored and nothing is sent elsewhere."""
TOKEN = "IQE_JAX_TOKEN"
PACKAGES = ("fastapi", "uvicorn", "python_multipart")
LEAST_TOKEN = 16  # characters
GRACE = 60  # seconds that requests in flight have when the service is told to stop


@dataclass(frozen=True)
class Options:
    """What is served, where, and to whom."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a finished run of train.py or evaluate.py."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own (loopback) needs a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and says which."""
    token: str | None = None
    """What clients send as `Authorization: Bearer TOKEN`; better given as $IQE_JAX_TOKEN, which other users of the
    machine do not see."""
    allow_host: tuple[str, ...] = ()
    """Further names that clients may call the service by, as behind a proxy. On loopback only localhost is served."""
    prevalence: float | None = None
    """Share of anomalous images where scans come from, for the probability; by default the calibration pool's."""
    log: Literal["none", "requests", "names"] = "requests"
    """What is printed: nothing, a line per request, or with it the names of files, which may be patients'."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)


def serve(options: Options) -> None:
    """Load, compile, listen, and work until SIGTERM or SIGINT; then answer what is in flight.

    Raises ValueError or OSError, before the model is loaded, when the options cannot work or the port is taken.
    """
    token, hosts = check(options)
    listener = _bind(options.host, options.port)
    from iqe_jax import calibration, export
    from iqe_jax.config import read
    from iqe_jax.detector import load
    from iqe_jax.web import create_app

    run = options.run
    detector, calibrated = load(run), calibration.load(run)
    config = read(run / "config.json")
    about = export.describe(config, detector, export.chosen(run, config), calibrated)
    if calibrated is not None:
        about["prevalence"] = options.prevalence or calibrated.prevalence  # which probabilities hold for
    log = None if options.log == "none" else lambda line: console.print(line, markup=False, highlight=False)
    log_name = log if options.log == "names" else None
    app = create_app(
        detector,
        about=about,
        calibrated=calibrated,
        prevalence=options.prevalence,
        limits=options.limits,
        token=token,
        hosts=hosts,
        log=log,
        log_name=log_name,
    )
    server = _server(app, listener, about["weights"]["chosen"])
    # uvicorn gives the signal back once all is answered; that is then a good end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    console.print(f"Compiling {run}, which for a full-size model takes minutes the first time")
    server.run(sockets=[listener])


def check(options: Options) -> tuple[str | None, tuple[str, ...]]:
    """The token and the host names that are served. Raises ValueError for options that cannot work or are not safe."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install '.[serve]'")
    for name, value in vars(options.limits).items():
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be above 0, and finite")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port is {options.port}; expected 0 to 65535")
    if options.prevalence is not None and not 0 < options.prevalence < 1:
        raise ValueError(f"--prevalence is {options.prevalence}; it must lie between 0 and 1")
    token = options.token or os.environ.get(TOKEN) or None
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ValueError(
            f"the token must be {LEAST_TOKEN} plain characters or more, such as "
            "python -c 'import secrets; print(secrets.token_urlsafe())' prints"
        )
    if is_loopback(options.host):
        return token, ("localhost", "127.0.0.1", "[::1]", options.host, *options.allow_host)
    if token is None:
        raise ValueError(
            f"--host {options.host} is reached from other machines: set ${TOKEN} to a secret that clients send as "
            "Authorization: Bearer, or stay on 127.0.0.1"
        )
    return token, options.allow_host or ("*",)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port and does not listen yet. Raises OSError saying which could not be had."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # While it is allowed, another socket may bind until this one listens, which is after the model is compiled.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as fault:
        if listener is not None:
            listener.close()
        raise OSError(f"cannot listen on {host}, port {port} ({fault.strerror}): choose another --port") from fault
    return listener


def _server(app: Any, listener: socket.socket, chosen: str) -> Any:
    """uvicorn's server around `app`, which says where it listens once it does."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            if self.started:
                console.print(f"Serving on http://{shown}:{port} ({chosen}); Ctrl-C ends it", markup=False)

    settings = {"log_level": "warning", "access_log": False, "server_header": False}
    return Server(uvicorn.Config(app, timeout_graceful_shutdown=GRACE, **settings))


def main(argv: list[str]) -> None:
    """Serve the run that `argv` names."""
    options = tyro.cli(Options, args=argv, prog=PROGRAM, description=DESCRIPTION)
    with cli.started(cli.Launch(), PROGRAM):
        serve(options)


if __name__ == "__main__":
    main(sys.argv[1:])

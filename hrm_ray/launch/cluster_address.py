"""Checks without Ray, within seconds, that an address can be a Ray cluster; Ray itself would wait for minutes."""

from __future__ import annotations

import os
import socket

from hrm_ray.errors import Fault, SettingsError, UnavailableError

PROBE_TIMEOUT_S = 5.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
EMPTY_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""An HTTP/2 SETTINGS frame (RFC 9113, 6.5); both sides begin with one, type 4 in the fourth byte."""
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EMPTY_SETTINGS


def check_address(address: str) -> None:
    """Refuse an address that cannot be a Ray cluster, within seconds, before Ray would wait for it."""
    if address in ("auto", "local"):
        return
    if "://" in address:
        raise SettingsError(
            Fault(
                f"the Ray address {address}",
                "Ray Client and job addresses cannot be used for training",
                "Give host:port of the cluster's head (as `ray start --head` prints it), or use `ray job submit`",
            )
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise SettingsError(
            Fault(
                f"the Ray address {address}",
                "is not host:port",
                "Give --ray-address HOST:PORT such as 10.0.0.1:6379, or auto",
            )
        )
    host = host.strip("[]")
    problem = _probe(host, int(port))
    hint = "Give the address of a running head, or none to use this machine"
    own = own_address() if problem is None and host in LOOPBACK else None
    if own is not None and (there := _probe(own, int(port))) is not None:
        problem = f"Ray looks for it at {own}:{port}, this machine's own address, and {there}"
        hint = f"Start the head with --node-ip-address={own}, or give the address of a running head"
    if problem is not None:
        raise UnavailableError(Fault(f"the Ray address {address}", problem, hint))


def own_address() -> str | None:
    """The address of this machine, which Ray takes in place of a loopback address; None without a network."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
            unsent.connect(("8.8.8.8", 53))  # It sends nothing: the system chooses the interface.
            return str(unsent.getsockname()[0])
    except OSError:
        return None


def _probe(host: str, port: int) -> str | None:
    """What is wrong with the address, or None: a head speaks HTTP/2, as every gRPC server does.

    Ray itself would try for minutes and print warnings on the way.
    """
    try:
        with socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return None
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(len(EMPTY_SETTINGS))
    except TimeoutError:
        return f"it does not answer within {PROBE_TIMEOUT_S:.0f} s as a Ray head does"
    except OSError as error:
        return f"nothing answers there ({error})"
    is_settings = len(answer) > 3 and answer[3] == EMPTY_SETTINGS[3]
    return None if is_settings else "what answers there is not a Ray head"

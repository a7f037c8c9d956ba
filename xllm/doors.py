"""Decides by which doors a server is asked and by whom, as its flags say: addresses, keys, sites whose pages may ask.
What would be open to more than was meant is refused; a port that is in use is told before anything takes long."""

from __future__ import annotations

import argparse
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm import config
from xllm.commands import UsageError
from xllm.service.listener import bind, url
from xllm.service.sites import ANY, origins_of

if TYPE_CHECKING:
    from xllm.service.gate import Access


@dataclass(frozen=True)
class Doors:
    """Sockets that listen, and who may come in; `control` is that of --admin-port."""

    listener: socket.socket
    control: socket.socket | None
    keys: tuple[str, ...] | None
    admin: tuple[str, ...] | None
    origins: frozenset[str]

    def access(self) -> Access:
        """For the service; the control port is told."""
        from xllm.service.gate import Access, Keys

        keys, admin = (Keys(given) if given else None for given in (self.keys, self.admin))
        if self.control is None:
            return Access(keys, admin, self.origins)
        print(f"control on {url(self.control)}", flush=True)
        return Access(keys, admin, self.origins, self.control.getsockname()[1])


def open_doors(arguments: argparse.Namespace) -> Doors:
    """Reads the files of keys and binds. Raises UsageError."""
    keys = config.api_keys(arguments.api_key_file) if arguments.api_key_file else None
    admin = config.api_keys(arguments.admin_key_file) if arguments.admin_key_file else None
    if keys is None and not config.is_loopback(arguments.host):
        raise UsageError(f"--host {arguments.host} can be reached by others: give --api-key-file FILE, or 127.0.0.1")
    own = arguments.admin_port is not None
    if arguments.admin_host is not None and not own:
        raise UsageError(f"--admin-host {arguments.admin_host} is for a port of its own: give --admin-port too")
    admin_host = arguments.admin_host or "127.0.0.1"
    if admin is None and not config.is_loopback(admin_host):
        raise UsageError(f"--admin-host {admin_host} can be reached by others: give --admin-key-file FILE, or leave it")
    try:
        origins = origins_of(arguments.allow_origin)
    except ValueError as error:
        raise UsageError(f"--allow-origin: {error}") from None
    if ANY in origins and (keys is None or (own and admin is None)):
        raise UsageError("--allow-origin * lets every site ask a server without keys: name sites, or give key files")
    listener = _bind(arguments.host, arguments.port, "--port")
    control = _bind(admin_host, arguments.admin_port, "--admin-port") if own else None
    if control is not None and (port := control.getsockname()[1]) == listener.getsockname()[1]:
        # They have two addresses; it is by its port that a connection shows what it may ask.
        listener.close()
        control.close()
        raise UsageError(f"--admin-port {port} is the --port too: give it a port that no other address here has")
    return Doors(listener, control, keys, admin, origins)


def _bind(host: str, port: int, flag: str) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        text = f"can't listen on {host}:{port}: {error.strerror}; try {flag} 0 for a free one"
        raise UsageError(text) from None

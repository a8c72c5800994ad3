"""A network of a process's own: Ray listens on all addresses, and nobody else is to reach what a drill starts."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

__all__ = ["enter_own_network"]

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_SET_FLAGS, _UP = 0x8914, 1


def enter_own_network() -> None:
    """Leave the machine's network for one that has nothing but a loopback of its own; before any thread is started.

    Raises:
        OSError: this system lets nobody, or not this user, have one.
    """
    own = _NEW_NETWORK if os.geteuid() == 0 else _NEW_NETWORK | _NEW_USER
    if ctypes.CDLL(None, use_errno=True).unshare(own) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"there is no network namespace to be had: {os.strerror(number)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))

"""Run code with the file permissions of an ordinary user, also where the tests run as root."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

VERSION_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def unprivileged() -> Iterator[None]:
    """Obey file permissions within the context: a file with mode 0 cannot be read.

    For root, the capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (capabilities(7)) of this thread, and of threads
    that it starts, are disabled and restored. Root stays the owner of its files, so `tmp_path` needs no other mode.
    Processes that it starts are not affected.
    """
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root's permissions can be dropped on Linux only")
    header, data = _Header(VERSION_3, 0), (_Data * 2)()
    _call("capget", header, data)
    saved = data[0].effective
    data[0].effective = saved & ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    _call("capset", header, data)
    try:
        yield
    finally:
        data[0].effective = saved
        _call("capset", header, data)


def _call(name: str, header: _Header, data: ctypes.Array[_Data]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.byref(header), data):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")

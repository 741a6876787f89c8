"""Shared mappings without a descriptor: Python's own keep one open."""

import contextlib
import ctypes
import mmap
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@contextlib.contextmanager
def mapped(path, first: int):
    """A shared mapping whose descriptors are closed, as memory.

    `first` are the flags of a descriptor that is there before the one that is mapped."""
    before = os.open(path, first)
    descriptor = os.open(path, os.O_RDWR)
    size = os.fstat(descriptor).st_size
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    os.close(before)
    os.close(descriptor)
    ended = []

    def end():
        if not ended:
            assert libc.munmap(address, size) == 0
            ended.append(True)

    memory = (ctypes.c_char * size).from_address(address)
    memory.end = end
    try:
        yield memory
    finally:
        end()

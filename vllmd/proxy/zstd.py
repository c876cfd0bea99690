"""Decompress zstd, by libzstd and ctypes. Imported for the first body with that Content-Encoding."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator

from vllmd.errors import BadRequest


class _Buffer(ctypes.Structure):
    """A ``ZSTD_inBuffer`` or ``ZSTD_outBuffer`` of libzstd: pointer, size, position."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


@functools.cache
def _libzstd() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return None
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Buffer), ctypes.POINTER(_Buffer)]
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_DCtx_setParameter.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.ZSTD_DCtx_setParameter.restype = ctypes.c_size_t
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_isError.restype = ctypes.c_uint
    library.ZSTD_getErrorName.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.restype = ctypes.c_char_p
    return library


WINDOW_LOG_MAX = 100  # ZSTD_d_windowLogMax
MAX_FRAMES = 10_000  # a body has room for millions of empty ones, of nine bytes each
MAX_WINDOW_LOG = 23  # 8 MiB, which RFC 8878 wants every decoder to support; a frame may ask for gigabytes


def decompressed(body: bytes, most: int) -> Iterator[bytes]:
    """The frames in ``body``, decompressed, in pieces of up to ``most`` bytes; empty ones, too. Raises BadRequest."""
    library = _libzstd()
    if library is None:
        raise BadRequest("zstd needs libzstd.so.1, which this machine lacks; send the body as it is, or gzip")
    stream = library.ZSTD_createDStream()
    try:
        library.ZSTD_DCtx_setParameter(stream, WINDOW_LOG_MAX, MAX_WINDOW_LOG)
        out = ctypes.create_string_buffer(most)
        source = _Buffer(ctypes.cast(ctypes.c_char_p(body), ctypes.c_void_p), len(body), 0)
        left, frames = 1, 0  # of a frame: 0 at its end
        while True:
            target = _Buffer(ctypes.cast(out, ctypes.c_void_p), most, 0)
            left = library.ZSTD_decompressStream(stream, ctypes.byref(target), ctypes.byref(source))
            if library.ZSTD_isError(left):
                what = library.ZSTD_getErrorName(left).decode()
                raise BadRequest(f"the body is not compressed as its Content-Encoding says: {what}")
            yield bytes(memoryview(out)[: target.pos])
            frames += not left
            if frames > MAX_FRAMES:
                raise BadRequest(f"the compressed body has more than {MAX_FRAMES} frames")
            if source.pos == len(body) and target.pos < most:
                break
        if left:
            raise BadRequest("the compressed body ends in the middle")
    finally:
        library.ZSTD_freeDStream(stream)

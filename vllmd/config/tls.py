"""TLS for listeners: the context from a certificate and its key. Python's ssl does the work, OpenSSL below it.

HTTP/1.1 is all that is spoken inside, and said so in the handshake (ALPN), so that no client waits for HTTP/2.
"""

from __future__ import annotations

import ssl
from pathlib import Path


def context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context, TLS 1.2 and later. Raises ValueError, with the cause, where the files cannot be used."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.set_alpn_protocols(["http/1.1"])
    for file in (cert, key):
        try:
            file.open().close()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None

    def password() -> str:  # without it OpenSSL would ask at the terminal
        raise ValueError("encrypted")

    try:
        tls.load_cert_chain(cert, key, password=password)
    except ssl.SSLError as error:
        why = "does not belong to the certificate" if error.reason == "KEY_VALUES_MISMATCH" else f"({error.reason})"
        what = (
            f"{key} {why}" if "KEY" in str(error.reason) else f"{cert} and {key} are no certificate in PEM and its key"
        )
        raise ValueError(what) from None
    except ValueError as error:
        raise ValueError(f"{key} is encrypted: a service cannot ask for its password") from error
    return tls

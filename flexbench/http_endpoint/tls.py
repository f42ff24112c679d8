"""TLS: the system's certificates unless told otherwise, and its errors in words."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from flexbench.core.errors import ConfigError
from flexbench.http_endpoint.address import Url


@dataclass(frozen=True, kw_only=True)
class TlsOptions:
    """Which certificates are accepted: the system's authorities', `ca_file`'s instead, or any."""

    ca_file: Path | None = None
    is_insecure: bool = False

    def __post_init__(self) -> None:
        if self.ca_file is not None and self.is_insecure:
            raise ConfigError("--tls-insecure", "accepts any certificate; then --ca-file is no use")
        if self.ca_file is not None and not self.ca_file.is_file():
            raise ConfigError("--ca-file", f"there is no file {str(self.ca_file)!r}")


def make_context(options: TlsOptions) -> ssl.SSLContext:
    """Raises ConfigError for a --ca-file that has no certificates in it."""
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            "--ca-file", f"{str(options.ca_file)!r} cannot be read as certificates (PEM): {error}"
        ) from error
    if options.is_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


def describe_tls_error(error: Exception, url: Url) -> str:
    """What is wrong with a handshake, and what to do about it."""
    if not isinstance(error, ssl.SSLError):
        return f"{url.place} closed the connection during the TLS handshake"
    # Python sets these on errors that come from OpenSSL, which not all do.
    reason = getattr(error, "reason", None) or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        problem = getattr(error, "verify_message", reason).rstrip(".")
        return (
            f"the certificate of {url.place} is not accepted: {problem}; --ca-file names the "
            "certificate of a private authority, --tls-insecure accepts any"
        )
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return f"{url.place} does not speak TLS; does its address begin with http:// ?"
    return f"no TLS connection to {url.place}: {reason.replace('_', ' ').lower()}"

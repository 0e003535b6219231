"""Keep the texts of requests and answers for an audit: one file each, encrypted under the tenant's key.

    <audit dir>/content/<tenant>/key             32 random bytes, encrypted with a key derived from the audit's
    <audit dir>/content/<tenant>/<request id>    AES-256-GCM of the content; it also authenticates the request id

The chain contains only the SHA-256 of each encrypted file. The chain therefore stays valid when a file is erased,
or a tenant's key and with it all of that tenant's contents. Tenants' names are hashes.

Erasing overwrites the key once and removes it. A drive that keeps old blocks, a snapshot or a backup may still hold
it.

Elsewhere: the chain is `chain.py`; `audit.py` decides what is written here, and when.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.installed import command_for_extra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CONTENT = "content"  # name of the directory
MAX_BYTES = 8 << 20  # per object; we never write a larger file
_KEY = "key"
_NONCE_BYTES, _TAG_BYTES = 12, 16
_REQUEST_ID = re.compile(r"req_[0-9a-f]{24}")
_GOING = ".erasing-"


def require_cryptography() -> None:
    """Check that contents can be encrypted.

    Raises:
        UsageError: the package `cryptography` is not installed.
    """
    _cipher(bytes(32))


def _cipher(key: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise UsageError(
            "contents are encrypted with the package cryptography, which is not installed",
            hint=f"`{command_for_extra('audit')}`",
        ) from None
    return AESGCM(key)


class SealedContents:
    """The contents in an audit's directory. One process at a time writes; any number may read.

    Args:
        audit_key: the key of the chain's HMACs.
    """

    def __init__(self, directory: Path, audit_key: bytes) -> None:
        self._path = directory
        self._wrapping_key = hmac.new(audit_key, b"argosy audit content", hashlib.sha256).digest()

    def put(self, key_id: str, request_id: str, content: bytes) -> str:
        """Encrypt and write a content; return the SHA-256 of the encrypted file.

        Raises:
            OSError: it cannot be written.
            UsageError: the key of the tenant is damaged.
        """
        directory = self._directory(key_id)
        with Directory(self._path) as audit:
            cipher = _cipher(self._tenant_key(audit, directory))
            nonce = os.urandom(_NONCE_BYTES)
            data = nonce + cipher.encrypt(nonce, content, request_id.encode())
            audit.put(directory / _name(request_id), data)
        return hashlib.sha256(data).hexdigest()

    def get(self, key_id: str, request_id: str) -> bytes | None:
        """The content of a request; None if it or its key was erased.

        Raises:
            UsageError: it was changed, or encrypted with another key.
        """
        directory = self._directory(key_id)
        with Directory(self._path) as audit:
            data, wrapped = _read(audit, directory / _name(request_id)), _read(audit, directory / _KEY)
        if data is None or wrapped is None:
            return None
        return _decrypt(_decrypt(self._wrapping_key, wrapped, _KEY.encode()), data, request_id.encode())

    def is_same(self, key_id: str, request_id: str, sha256: str) -> bool | None:
        """Whether the encrypted file has this SHA-256; None if it is gone or can no longer be decrypted."""
        directory = self._directory(key_id)
        if not _REQUEST_ID.fullmatch(request_id):
            return False
        with Directory(self._path) as audit:
            data = _read(audit, directory / request_id)
            if data is None or audit.stat(directory / _KEY) is None:
                return None
        return hashlib.sha256(data).hexdigest() == sha256

    def erase(self, key_id: str) -> int:
        """Erase a tenant's key and contents; return the number of contents.

        Raises:
            OSError: they cannot be removed.
        """
        directory = self._directory(key_id)
        with Directory(self._path) as audit:
            if not audit.is_directory(directory):
                return 0
            # Rename first: after a kill from here on nothing can be looked up, and `sweep` removes the rest.
            going = Path(CONTENT, f"{_GOING}{directory.name}-{os.urandom(4).hex()}")
            audit.move(directory, going)
            with audit.directory(CONTENT) as contents:
                contents.sync()
            return _remove(audit, going)

    def sweep(self, before: float) -> int:
        """Remove contents written before this time, in seconds since 1970, and the leftovers of a killed `put`.

        Returns:
            The number of contents.

        Raises:
            OSError: they cannot be removed.
        """
        num_removed = 0
        with Directory(self._path) as audit:
            for directory in _directories(audit):
                if directory.name.startswith(_GOING):
                    _remove(audit, directory)
                    continue
                for name in set(audit.names(directory)) - {_KEY}:
                    path = directory / name
                    if not _REQUEST_ID.fullmatch(name):
                        audit.remove(path)
                        continue
                    facts = audit.stat(path)
                    if facts is not None and facts.st_mtime < before:
                        audit.remove(path)
                        num_removed += 1
        return num_removed

    def size(self, key_id: str | None = None) -> tuple[int, int]:
        """Number and bytes of the contents, of all tenants or of one."""
        with Directory(self._path) as audit:
            directories = _directories(audit) if key_id is None else [self._directory(key_id)]
            facts = [audit.stat(path) for directory in directories for path in _contents(audit, directory)]
        return len(facts), sum(one.st_size for one in facts if one is not None)

    @staticmethod
    def _directory(key_id: str) -> Path:
        tenant = hashlib.sha256(b"tenant " + key_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return Path(CONTENT, tenant)

    def _tenant_key(self, audit: Directory, directory: Path) -> bytes:
        """The key of a tenant, created on first use. It is read each time because it may have been erased."""
        wrapped = _read(audit, directory / _KEY)
        if wrapped is not None:
            return _decrypt(self._wrapping_key, wrapped, _KEY.encode())
        audit.directory(directory, make=True, mode=0o700).close()
        key, nonce = os.urandom(32), os.urandom(_NONCE_BYTES)
        audit.put(directory / _KEY, nonce + _cipher(self._wrapping_key).encrypt(nonce, key, _KEY.encode()))
        return key


# Every path below is inside the directory of the audit.


def _directories(audit: Directory) -> list[Path]:
    names = [Path(CONTENT, name) for name in audit.names(CONTENT)]
    return [name for name in names if audit.is_directory(name)]


def _contents(audit: Directory, directory: Path) -> list[Path]:
    return [directory / name for name in audit.names(directory) if _REQUEST_ID.fullmatch(name)]


def _name(request_id: str) -> str:
    if not _REQUEST_ID.fullmatch(request_id):
        raise ValueError("not a request id")
    return request_id


def _read(audit: Directory, path: Path) -> bytes | None:
    """The content of a file, at most MAX_BYTES; None if there is no such file."""
    try:
        descriptor = audit.open(path)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb", buffering=0) as file:
        return file.read(MAX_BYTES)


def _decrypt(key: bytes, data: bytes, bound_to: bytes) -> bytes:
    cipher = _cipher(key)
    from cryptography.exceptions import InvalidTag

    try:
        if len(data) < _NONCE_BYTES + _TAG_BYTES:
            raise InvalidTag
        return cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], bound_to)
    except InvalidTag:
        what = "key of contents" if bound_to == _KEY.encode() else "content"
        raise UsageError(f"a {what} of the audit was changed, or encrypted with another key") from None


def _remove(audit: Directory, directory: Path) -> int:
    """Overwrite and remove the key of a doomed directory, then its contents; return how many there were."""
    key = audit.stat(directory / _KEY)
    if key is not None and stat.S_ISREG(key.st_mode):
        descriptor = audit.open(directory / _KEY, os.O_WRONLY)
        try:
            os.pwrite(descriptor, bytes(key.st_size), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    audit.remove(directory / _KEY)
    num_contents = len(_contents(audit, directory))
    audit.remove_tree(directory)
    return num_contents

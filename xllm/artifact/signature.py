"""Who vouches for an artifact: an Ed25519 signature over the digest of its manifest, which covers every other byte.

`signature.json` is sealed like the manifest, so that a changed one is refused even where no signature is asked for.
The library that computes signatures is imported only where one is made or asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.artifact.seal import ArtifactError, sealed, spelled, unseal
from xllm.artifact.store import Store, read

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "signature.json"
_PREFIX = b"xllm artifact signature 1\n"  # a signature made for this purpose serves no other
_MAX_KEY_BYTES = 1 << 16


def new_key(path: str | os.PathLike[str]) -> Path:
    """Writes a private key (PEM, PKCS 8, readable by its owner alone) and beside it, with the suffix ".pub", its public
    key. Returns the path of the public key. Raises FileExistsError rather than replace a key."""
    _library()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, private, public = Ed25519PrivateKey.generate(), Path(path), Path(f"{os.fspath(path)}.pub")
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    told = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    for file, data, mode in ((private, secret, 0o600), (public, told, 0o644)):
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
            out.write(data)
    return public


def sign_digest(manifest_digest: str, key_file: str | os.PathLike[str]) -> bytes:
    """The contents of signature.json. Raises ArtifactError `bad-key` for a file that holds no Ed25519 private key."""
    key = _private_key(key_file)
    body = {
        "algorithm": "ed25519",
        "manifest": manifest_digest,
        "signature": key.sign(_PREFIX + manifest_digest.encode()).hex(),
    }
    return spelled(sealed(body))


def sign(folder: Path, manifest_digest: str, key_file: str | os.PathLike[str]) -> None:
    """Writes the signature into an artifact folder, in the place of one that was there."""
    data = sign_digest(manifest_digest, key_file)
    folder = folder.resolve()  # behind a link, what lies beside the link may be another file system
    import secrets  # costs a start nothing

    aside = folder.parent / f".{folder.name}.{SIGNATURE}-{secrets.token_hex(4)}"
    try:
        aside.write_bytes(data)
        aside.chmod(0o644)
        aside.replace(folder / SIGNATURE)
    finally:
        aside.unlink(missing_ok=True)


def check_signature(store: Store, manifest_digest: str, public_key: str | os.PathLike[str] | None) -> None:
    """Raises ArtifactError: `signature-missing`, `signature-wrong`, or as a changed file is refused."""
    if SIGNATURE not in store.names():
        if public_key is not None:
            raise ArtifactError(
                "signature-missing",
                f"{store.path} has no {SIGNATURE}; sign it with `xllm sign {store.path} --key FILE`",
            )
        return
    body = unseal(read(store, SIGNATURE), SIGNATURE)
    if body.get("manifest") != manifest_digest or body.get("algorithm") != "ed25519":
        raise ArtifactError("signature-wrong", f"{SIGNATURE} is not of this manifest.json; sign the artifact again")
    if public_key is None:
        return
    _library()
    from cryptography.exceptions import InvalidSignature

    key = _public_key(public_key)
    try:
        key.verify(bytes.fromhex(body["signature"]), _PREFIX + manifest_digest.encode())
    except (InvalidSignature, ValueError, TypeError, KeyError):
        raise ArtifactError(
            "signature-wrong", f"{SIGNATURE} was not made with the key that {public_key} belongs to"
        ) from None


def _private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _loaded(path, Ed25519PrivateKey, lambda data: load_pem_private_key(data, None), "private")


def _public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _loaded(path, Ed25519PublicKey, load_pem_public_key, "public")


def _loaded(path: str | os.PathLike[str], kind: type, load: Any, what: str) -> Any:
    try:
        with open(path, "rb") as file:
            key = load(file.read(_MAX_KEY_BYTES))
    except OSError:
        raise
    except Exception as error:  # the library raises its own, ValueError and TypeError, by version
        raise ArtifactError("bad-key", f"{path} holds no {what} key in PEM: {error}") from error
    if not isinstance(key, kind):
        raise ArtifactError("bad-key", f"{path} holds another kind of key, an Ed25519 {what} key is needed")
    return key


def _library() -> None:
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        raise ArtifactError("no-cryptography", "signatures need the package cryptography: pip install 'xllm[sign]'")

"""A certificate authority of one user's own, for fal's host names and no others.

Its folder holds

    ca.pem       what programs are told to trust
    ca-key.pem   what signs, drawn once; it never leaves the folder
    hosts.pem    the certificate for fal's host names and its key, issued anew before it expires
    bundle.pem   the public authorities and ours, for programs that take one file

What an older version drew for fewer host names is drawn anew.

The authority's certificate is constrained to fal's domains: even whoever steals the key can pose as no
other host. Only programs that are given ca.pem or bundle.pem trust it; no system-wide store is touched.
"""

import os
import shutil
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deployments.connect.hosts import PREFIXES

HOSTS = tuple(PREFIXES)
AUTHORITY_DAYS = 3650
HOSTS_DAYS = 365
RENEWAL_DAYS = 30  # before the end
CLOCKS_APART = timedelta(hours=1)


def user_folder() -> Path:
    """Where the authority of the user who runs this is kept."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "darkroom" / "connect"


class Authority:
    """The authority in a folder, drawn where there is none or the old one is of no use any more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not _is_fresh(self.certificate):
            _found(folder)
        if not _is_fresh(folder / "hosts.pem"):
            _write(folder / "hosts.pem", _issue(folder))

    @property
    def certificate(self) -> Path:
        """The authority's own."""
        return self.folder / "ca.pem"

    def context(self) -> ssl.SSLContext:
        """For a listener that is fal's hosts."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "hosts.pem")
        return context

    def bundle(self, others: Path | None) -> Path:
        """One file with `others`, or else the public authorities, and ours."""
        ours = self.certificate.read_text()
        text = (others or Path(certifi.where())).read_text()
        path = self.folder / "bundle.pem"
        _write(path, (text if ours in text else f"{text.rstrip()}\n{ours}").encode())
        return path


def _is_fresh(path: Path) -> bool:
    """Whether the certificate is there, for these names, and will be valid for a while."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    return left > timedelta(days=RENEWAL_DAYS) and _names(certificate) == set(HOSTS)


def _names(certificate: x509.Certificate) -> set[str]:
    """Of an authority, which hosts it may certify; of a certificate of hosts, which."""
    for extension in certificate.extensions:
        match extension.value:
            case x509.NameConstraints(permitted_subtrees=trees):
                return {name.value for name in trees or ()}
            case x509.SubjectAlternativeName() as names:
                return set(names.get_values_for_type(x509.DNSName))
    return set()


def _found(folder: Path) -> None:
    """Draw a key and certify it by itself. Whoever is first wins; all others use theirs."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # 0700, as the folder then is
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "darkroom connect, of this user only")])
    builder = (
        _certificate(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.NameConstraints([x509.DNSName(host) for host in HOSTS], None), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _write(new / "ca-key.pem", _pem(key))
    _write(new / "ca.pem", builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    if folder.exists() and not _is_fresh(folder / "ca.pem"):
        shutil.rmtree(folder)
    try:
        new.rename(folder)
    except OSError:
        if not _is_fresh(folder / "ca.pem"):
            raise
        shutil.rmtree(new)


def _issue(folder: Path) -> bytes:
    """A certificate for fal's hosts, its key before it."""
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    signer = load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOSTS[0])])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = (
        _certificate(name, authority.subject, key.public_key(), HOSTS_DAYS)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
    )
    return _pem(key) + builder.sign(signer, SHA256()).public_bytes(Encoding.PEM)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), now - CLOCKS_APART, now + timedelta(days=days)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, readable by its owner only."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # 0600
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(name, path)

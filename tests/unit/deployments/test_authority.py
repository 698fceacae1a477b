"""The user's own certificate authority."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import certifi
import pytest
from cryptography import x509

from deployments.connect import authority
from deployments.connect.authority import HOSTS, Authority

FAL = {"fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "fal.media"}


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "data" / "connect")


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_its_certificate_is_for_exactly_fals_hosts(ours: Authority) -> None:
    hosts = certificate(ours.folder / "hosts.pem")
    names = hosts.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == FAL == set(HOSTS)
    assert len(names) == len(FAL)
    hosts.verify_directly_issued_by(certificate(ours.certificate))


def test_it_can_certify_no_other_host(ours: Authority) -> None:
    extensions = certificate(ours.certificate).extensions
    limits = extensions.get_extension_for_class(x509.NameConstraints)
    assert limits.critical
    assert {name.value for name in limits.value.permitted_subtrees or ()} == FAL
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_only_its_owner_reads_its_folder(ours: Authority) -> None:
    assert stat.S_IMODE(ours.folder.stat().st_mode) == 0o700
    ours.bundle(None)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in ours.folder.iterdir()}
    assert files == dict.fromkeys(("ca.pem", "ca-key.pem", "hosts.pem", "bundle.pem"), 0o600)


def test_it_is_drawn_once(ours: Authority) -> None:
    before = {path.name: path.read_bytes() for path in ours.folder.iterdir()}
    Authority(ours.folder)
    assert {path.name: path.read_bytes() for path in ours.folder.iterdir()} == before


def test_what_is_about_to_expire_is_issued_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "HOSTS_DAYS", authority.RENEWAL_DAYS - 1)
    old = Authority(tmp_path / "connect")
    key = (old.folder / "ca-key.pem").read_bytes()
    monkeypatch.undo()
    new = Authority(tmp_path / "connect")
    left = certificate(new.folder / "hosts.pem").not_valid_after_utc - datetime.now(UTC)
    assert left > timedelta(days=authority.RENEWAL_DAYS)
    assert (new.folder / "ca-key.pem").read_bytes() == key


def test_an_authority_about_to_expire_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "AUTHORITY_DAYS", authority.RENEWAL_DAYS - 1)
    old = Authority(tmp_path / "connect").certificate.read_bytes()
    monkeypatch.undo()
    assert Authority(tmp_path / "connect").certificate.read_bytes() != old
    assert [path.name for path in tmp_path.iterdir()] == ["connect"]


def test_an_authority_for_fewer_hosts_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that an older version has drawn may not certify what this one answers for."""
    monkeypatch.setattr(authority, "HOSTS", HOSTS[:-1])
    old = Authority(tmp_path / "connect").certificate.read_bytes()
    monkeypatch.undo()
    new = Authority(tmp_path / "connect")
    assert new.certificate.read_bytes() != old
    certificate(new.folder / "hosts.pem").verify_directly_issued_by(certificate(new.certificate))


def test_the_bundle_adds_to_what_is_trusted_already(ours: Authority, tmp_path: Path) -> None:
    own = ours.certificate.read_text()
    assert ours.bundle(None).read_text() == f"{Path(certifi.where()).read_text().rstrip()}\n{own}"
    corporate = tmp_path / "corporate.pem"
    corporate.write_text("theirs\n")
    assert ours.bundle(corporate).read_text() == f"theirs\n{own}"
    assert ours.bundle(ours.folder / "bundle.pem").read_text() == f"theirs\n{own}"  # exec within exec

"""The keys of webhooks: drawn once, shared, rotated with an overlap."""

import base64
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deployments.webhooks.keyring import DRAWING_S, FIRST, Keyring, open_keyring
from tests.support.jobs import Clock

OVERLAP_S = 1000.0
MESSAGE = b"a message"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keyring(tmp_path: Path, clock: Clock) -> Keyring:
    return Keyring(tmp_path / "keys", OVERLAP_S, clock)


def listed(keyring: Keyring) -> list[str]:
    return [key["x"] for key in keyring.jwks()["keys"]]


def signer(keyring: Keyring) -> str:
    """The published key that signs now."""
    signature = keyring.sign(MESSAGE)
    return next(x for x in listed(keyring) if _verifies(x, signature))


def _verifies(x: str, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(x)).verify(signature, MESSAGE)
    except InvalidSignature:
        return False
    return True


def test_a_key_is_published_with_a_padded_x(keyring: Keyring) -> None:
    [key] = keyring.jwks()["keys"]
    assert (key["kty"], key["crv"]) == ("OKP", "Ed25519")
    assert len(key["x"]) == 44
    assert key["x"].endswith("=")
    assert len(base64.urlsafe_b64decode(key["x"])) == 32
    assert "d" not in key  # the private half


def test_the_first_key_lasts_and_is_its_owners_alone(keyring: Keyring, tmp_path: Path) -> None:
    first = listed(keyring)
    [path] = (tmp_path / "keys").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = open_keyring(f"file://{tmp_path}/keys", OVERLAP_S)
    assert listed(again) == first


def test_processes_that_begin_at_once_share_one_key(tmp_path: Path, clock: Clock) -> None:
    with ThreadPoolExecutor(16) as threads:
        rings = [Keyring(tmp_path / "keys", OVERLAP_S, clock) for _ in range(16)]
        assert len(set(threads.map(lambda ring: tuple(listed(ring)), rings))) == 1


def test_a_key_is_never_put_over_another(keyring: Keyring, tmp_path: Path) -> None:
    first = listed(keyring)
    keyring._draw(FIRST)  # by a process that did not see it yet
    assert listed(keyring) == first
    assert len(list((tmp_path / "keys").iterdir())) == 1


def test_what_a_process_was_drawing_is_removed_once_it_must_be_dead(
    keyring: Keyring, tmp_path: Path, clock: Clock
) -> None:
    listed(keyring)
    dead, drawing = (tmp_path / "keys" / f"{name}.new" for name in ("dead", "drawing"))
    for path, age_s in ((dead, DRAWING_S + 1), (drawing, 0)):
        path.touch()
        os.utime(path, (clock.now - age_s, clock.now - age_s))
    keyring.rotate()
    assert not dead.exists() and drawing.exists()


def test_t24_a_new_key_is_published_before_it_signs_and_the_old_one_after(
    keyring: Keyring, clock: Clock
) -> None:
    [old] = listed(keyring)
    assert keyring.rotate() == clock.now + OVERLAP_S + 1
    assert listed(keyring)[0] == signer(keyring) == old
    [new] = set(listed(keyring)) - {old}
    clock.now += OVERLAP_S
    assert signer(keyring) == old
    clock.now += 1
    assert listed(keyring) == [new, old]
    assert signer(keyring) == new
    clock.now += OVERLAP_S - 1
    assert listed(keyring) == [new, old]
    clock.now += 1
    assert listed(keyring) == [new]


def test_another_process_sees_the_new_key(keyring: Keyring, tmp_path: Path, clock: Clock) -> None:
    other = Keyring(tmp_path / "keys", OVERLAP_S, clock)
    assert len(listed(other)) == 1
    keyring.rotate()
    assert listed(other) == listed(keyring)
    assert len(listed(other)) == 2


def test_one_key_at_a_time_waits_for_its_turn(keyring: Keyring, clock: Clock) -> None:
    keyring.rotate()
    with pytest.raises(ValueError, match="published already"):
        keyring.rotate()
    clock.now += OVERLAP_S + 1
    keyring.rotate()


def test_keys_that_nobody_needs_are_removed(keyring: Keyring, tmp_path: Path, clock: Clock) -> None:
    [old] = listed(keyring)
    keyring.rotate()
    clock.now += 2 * OVERLAP_S + 2
    keyring.rotate()
    assert old not in listed(keyring)
    assert len(list((tmp_path / "keys").iterdir())) == len(listed(keyring)) == 2


def test_a_leaked_key_is_gone_with_its_file(keyring: Keyring, tmp_path: Path) -> None:
    [leaked] = listed(keyring)
    (tmp_path / "keys" / "0.pem").unlink()
    [fresh] = listed(keyring)
    assert fresh != leaked
    assert signer(keyring) == fresh


def test_what_is_no_such_key_is_named(keyring: Keyring, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "0.pem").write_text("nonsense")
    with pytest.raises(ValueError):
        keyring.jwks()
    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "keys" / "0.pem").write_bytes(other)
    with pytest.raises(ValueError, match="no Ed25519 key"):
        keyring.jwks()
    with pytest.raises(ValueError, match="file://"):
        open_keyring("s3://keys", 1)

"""SQL in what a list is asked for: it is a text that finds nothing, or is refused."""

import httpx
import pytest

from tests.support.jobs import ENDPOINT

PAYLOADS = [
    "'",
    '"',
    "''",
    "`",
    "\\'",
    ";",
    "--",
    "/*",
    "' --",
    "' OR '1'='1",
    "' OR 1=1 --",
    '" OR ""="',
    "') OR ('1'='1",
    "1 OR 1=1",
    "1) OR (1=1",
    "x' AND 1=0 UNION SELECT * FROM jobs --",
    "' UNION SELECT name FROM sqlite_master --",
    "' UNION ALL SELECT NULL,NULL,NULL --",
    "1 UNION SELECT usename FROM pg_user",
    "'; DROP TABLE jobs; --",
    "'; DELETE FROM jobs; --",
    "'; UPDATE jobs SET tenant='alice'; --",
    "'; ATTACH DATABASE '/tmp/x' AS y; --",
    "'; SELECT load_extension('x'); --",
    "'; COPY jobs TO PROGRAM 'id'; --",
    "' AND randomblob(1000000000) --",
    "'; SELECT pg_sleep(10); --",
    "' || (SELECT 1) || '",
    "' AND SUBSTR(tenant,1,1)='a",
    "' ORDER BY 1 --",
    "seq DESC; --",
    "1, (SELECT 1)",
    "%",
    "_",
    "%%' --",
    "fal-ai/%",
    "' LIKE '%",
    "' GLOB '*",
    "\\",
    "\\x27 OR 1=1",
    "%27%20OR%201=1",
    "＇ OR 1=1",  # full width
    "ʼ OR 1=1",
    "$1",
    ":tenant",
    "?",
    "{0}",
    "%(tenant)s",
    "NULL",
    "1e3",
    "0x1",
    "-1",
    "9" * 30,
    "true",
]
FILTERS = [
    ("/v1/models/requests", "cursor"),
    ("/v1/models/requests", "limit"),
    ("/v1/models/requests", "endpoint_id"),
    ("/v1/models/requests", "expand"),
    ("/v1/models", "q"),
    ("/v1/models", "category"),
    ("/v1/models", "endpoint_id"),
    ("/v1/models", "cursor"),
    ("/v1/models", "limit"),
    ("/v1/models", "status"),
]


@pytest.mark.parametrize(("path", "name"), FILTERS)
async def test_t38_no_filter_is_a_statement(
    path: str, name: str, alice: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    sent = (await alice.post(f"/queue/{ENDPOINT}", json={"prompt": "a cat"})).json()["request_id"]
    await bob.post(f"/queue/{ENDPOINT}", json={"prompt": "bob's own"})
    assert len(set(PAYLOADS)) >= 40
    for payload in PAYLOADS:
        answer = await alice.get(path, params={name: payload})
        assert answer.status_code in (200, 400), (payload, answer.text)
        assert "bob's own" not in answer.text
        if answer.status_code == 200 and name in ("endpoint_id", "q", "category"):
            assert not answer.json().get("items") and not answer.json().get("models") or name == "q", payload
    assert (await alice.get(f"/queue/{ENDPOINT}/requests/{sent}/status")).status_code in (200, 202)


async def test_t38_no_key_id_or_tag_is_a_statement(alice: httpx.AsyncClient) -> None:
    for payload in PAYLOADS:
        header = payload.encode()
        told = await alice.post(
            f"/queue/{ENDPOINT}",
            json={"prompt": payload},
            headers={b"idempotency-key": header, b"x-fal-tags": header},
        )
        assert told.status_code in (200, 400), (payload, told.text)
        if told.status_code == 200:
            again = await alice.post(
                f"/queue/{ENDPOINT}",
                json={"prompt": payload},
                headers={b"idempotency-key": header, b"x-fal-tags": header},
            )
            assert again.json()["request_id"] == told.json()["request_id"], payload
        for path in (f"/queue/{ENDPOINT}/requests/{payload}/status", f"/queue/{ENDPOINT}/requests/{payload}"):
            assert (await alice.get(path)).status_code in (400, 404, 405), payload

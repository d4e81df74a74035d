"""URIs name places; secrets neither come in by them nor go out in messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymerge.merge_actors.errors import RaymergeError
from raymerge.merge_actors.storage.retry import one_line
from raymerge.merge_actors.storage.uris import absolute, checked, is_remote, redacted


def test_a_uri_has_one_spelling(tmp_path: Path) -> None:
    assert absolute("s3://bucket/models/one//") == "s3://bucket/models/one"
    assert (
        absolute("abfs://box@account.dfs.core.windows.net/a") == "abfs://box@account.dfs.core.windows.net/a"
    )
    assert absolute("hf://org/name@v1.0") == "hf://org/name@v1.0"
    assert absolute(f"file://{tmp_path}") == str(tmp_path)
    assert [is_remote(path) for path in ("s3://b", "org/name", "/a://b", "file:///a", "hf://a/b")] == [
        True,
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://AKIAEXAMPLE:hunter2hunter2@bucket/key", "s3://bucket/key carries credentials; leave them out"),
        ("sftp://me:hunter2hunter2@host/key", "sftp://host/key carries credentials; leave them out"),
        (
            "https://host/key?X-Amz-Signature=hunter2hunter2",
            "https://host/key has a query, which may hold a token",
        ),
        ("s3://bucket/key?secret=hunter2hunter2", "s3://bucket/key has a query"),
        ("s3://bucket/a/../../other", "'.' or '..' in its path"),
        ("s3:///", "names no bucket; write s3://BUCKET/PATH"),
    ],
)
def test_secrets_in_uris_are_refused_and_not_repeated(uri: str, message: str) -> None:
    with pytest.raises(RaymergeError) as raised:
        checked(uri)
    assert message in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_messages_of_libraries_are_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a-long-account-key==")
    text = (
        "GET https://user:pass@host/x?sv=1&sig=abc%2Fdef&se=2 failed\nfor key a-long-account-key== and "
        f"{os.environ['AWS_SECRET_ACCESS_KEY']} (Request ID: ABC)"
    )
    assert redacted("plain s3://bucket/key?") == "plain s3://bucket/key?"
    assert one_line(
        OSError(text)
    ) == "GET https://***@host/x?sv=1&sig=*** failed for key *** and ***".replace("sig=***", "sig=***&se=2")

"""No password, token or signature of an address is written anywhere: it is refused, and left out of every message."""

import logging

import pytest

from amclr_scale.addresses import masked, refusal, refusals
from amclr_scale.checkpoint.cached import local_copy
from amclr_scale.commands.main import main
from amclr_scale.config.load import build, load
from amclr_scale.data import remote
from amclr_scale.errors import UserError

SECRET = "hush"
LONG = f"{SECRET}0123456789ABCDEF"
WITH = {
    f"https://{SECRET}@host/a.tar": "https://...@host/a.tar",
    f"https://me:{SECRET}@host:8080/a.tar": "https://...@host:8080/a.tar",
    f"https://me:{SECRET}@{SECRET}@host/a.tar": "https://...@host/a.tar",
    f"https://me:{SECRET}/{SECRET}@host/a.tar": "https://...@host/a.tar",
    f"sftp://me:{SECRET}@host/a.tar": "sftp://...@host/a.tar",
    f"s3://{SECRET}@bucket/a.tar": "s3://...@bucket/a.tar",
    f"mystore://{LONG}@host/a.tar": "mystore://...@host/a.tar",
    f"mystore://me:{SECRET}@host/a.tar": "mystore://...@host/a.tar",
    f"simplecache::s3://me:{SECRET}@bucket/a.tar": "simplecache::s3://...@bucket/a.tar",
    f"https://h/a.tar?x=1&X-Amz-Signature={SECRET}&y=2": "https://h/a.tar?x=1&X-Amz-Signature=...&y=2",
    f"https://h/a.tar?AWSAccessKeyId={SECRET}&Signature={SECRET}": "https://h/a.tar?AWSAccessKeyId=...&Signature=...",
    f"https://h/a.tar?sv=1&sig={SECRET}": "https://h/a.tar?sv=1&sig=...",
    f"https://h/a.tar?access_token={SECRET}": "https://h/a.tar?access_token=...",
    f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://h/a.tar": (
        "pipe:curl -H 'Authorization: Bearer ...' https://h/a.tar"
    ),
    f"pipe:curl -u me:{SECRET} https://h/a.tar": "pipe:curl -u ... https://h/a.tar",
    f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp s3://b/a.tar -": (
        "pipe:AWS_SECRET_ACCESS_KEY=... aws s3 cp s3://b/a.tar -"
    ),
    f"s3://key:{SECRET}/{SECRET}@bucket/a.tar": "s3://...@bucket/a.tar",
    f"https://h/a.tar?Policy={LONG}&Signature={SECRET}~{SECRET}&Key-Pair-Id={SECRET}": (
        "https://h/a.tar?Policy=...&Signature=...&Key-Pair-Id=..."
    ),
    f"https://h/a.tar?key={LONG}": "https://h/a.tar?key=...",
    f"https://h/a.tar?code={LONG}": "https://h/a.tar?code=...",
    f"https://h/a.tar?pass={SECRET}&sas={SECRET}": "https://h/a.tar?pass=...&sas=...",
    f"https://h/a.tar?hdnts=exp=1~acl=/*~hmac={SECRET}": "https://h/a.tar?hdnts=...",
    f"pipe:aws_secret_access_key='{SECRET}' aws s3 cp s3://b/a.tar -": (
        "pipe:aws_secret_access_key=... aws s3 cp s3://b/a.tar -"
    ),
    f"pipe:export HF_TOKEN={SECRET}; hf download x": "pipe:export HF_TOKEN=...; hf download x",
    f"pipe:hf download --token {SECRET} x": "pipe:hf download --token ... x",
    f"pipe:rclone cat :s3:b/a.tar --s3-secret-access-key={SECRET}": (
        "pipe:rclone cat :s3:b/a.tar --s3-secret-access-key=..."
    ),
    f"pipe:az storage blob download --account-key {SECRET} --name a": (
        "pipe:az storage blob download --account-key ... --name a"
    ),
    f"pipe:curl -su 'me:{SECRET} {SECRET}' https://h/a.tar": "pipe:curl -su ... https://h/a.tar",
    f"pipe:curl -ume:{SECRET} https://h/a.tar": "pipe:curl -u... https://h/a.tar",
    f"pipe:curl -H 'Cookie: session={SECRET}; b={SECRET}' https://h/a.tar": (
        "pipe:curl -H 'Cookie: ...' https://h/a.tar"
    ),
    f"pipe:curl -H 'Authorization: Digest name=me, response={SECRET}' https://h/a.tar": (
        "pipe:curl -H 'Authorization: Digest ...' https://h/a.tar"
    ),
    f"pipe:wget --header='PRIVATE-TOKEN: {SECRET}' -O- https://h/a.tar": (
        "pipe:wget --header='PRIVATE-TOKEN: ...' -O- https://h/a.tar"
    ),
    f"pipe:sshpass -p {SECRET} ssh me@h cat a.tar": "pipe:sshpass -p ... ssh me@h cat a.tar",
    f"pipe:openssl enc -d -pass pass:{SECRET} -in a.tar": "pipe:openssl enc -d -pass pass:... -in a.tar",
    f"pipe:gpg --passphrase {SECRET} -d a.tar": "pipe:gpg --passphrase ... -d a.tar",
}
WITHOUT = [
    "https://host/{00000..00099}.tar", "https://host/a.tar?download=true", "sftp://me@host/a", "abfs://c@account.net/a",
    "dask://w@h/a.tar", "oss://bucket-of-2026-images@x/a.tar", "mystore://container@account/a.tar",
    "hf://datasets/me/data@main/a.tar", "github://org:data@main/a.tar", "s3://bucket/token=1/a.tar", "runs/a@b:c",
    'pipe:curl -sfH "Authorization: Bearer $TOKEN" https://h/a.tar', "pipe:curl https://me:$PASSWORD@h/a.tar",
    "data.tokenizer=emoji, key=3, token=5", "https://[::1]:8080/a@b.tar",
    "https://h/a.tar?key=captions&sort_key=name&partition-key=3&code=fr&policy=public&token=true", "file://a@b/c.tar",
    "zip://a@b.jpg::https://h/a.zip", "oci://bucket@namespace/a.tar", "root://me@host//a.tar", "s3://bucket/a@b=c.tar",
    "s3://arn:aws:s3:eu-west-1:012345678901:accesspoint/name/a@b.tar", "https://h:{8080..8083}/a@b/{0..3}.tar",
    "pipe:ssh -i ~/.ssh/id_rsa me@host sudo -u data cat a.tar", "pipe:docker run --user 1000:1000 image cat a.tar",
    "pipe:sort -u a.tar", "pipe:MAX_TOKENS=77 KEYS=3 make_tar --pad-token 0 --key=column", "pipe:cat token=3/a.tar",
    "pipe:curl -sSfL --user-agent me --netrc-file ~/.netrc --key me.pem https://h/a.tar", "pipe:gsutil cat gs://b/a@b.tar",
    "pipe:wget --password-file=me.txt -O- https://h/a.tar", "pipe:openssl enc -d -pass file:key -in a.tar",
]  # fmt: skip


@pytest.mark.parametrize("address", WITH)
def test_secrets_are_seen_and_left_out(address):
    assert masked(address) == WITH[address]
    assert masked(f"of {address}, '{address}'").count("...") == 2 * WITH[address].count("...")
    words = refusal("data.train", address)
    assert words.startswith("data.train: expected an address without password, token or signature")
    assert f"got {WITH[address]};" in words
    for text in (words, str(UserError(f"{address}: cannot be fetched"))):
        assert SECRET not in text


@pytest.mark.parametrize("address", WITHOUT)
def test_other_addresses_and_other_texts_stay_as_they_are(address):
    assert masked(address) == address
    assert refusal("data.train", address) == ""


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"train": f"https://{SECRET}@h/a.tar"}},
        {"data": {"train": ["a.tar", f"https://{SECRET}@h/a.tar"]}},
        {"data": {"train": {"one": f"https://{SECRET}@h/a.tar"}}},
        {"data": {"tokenizer": f"https://{SECRET}@h/tokenizer.json"}},
        {"evaluation": {"splits": {"val": f"https://h/a.tar?sig={SECRET}"}}},
        {"evaluation": {"probes": [{"train": f"https://{SECRET}@h/a.tar", "test": "emoji/test"}]}},
        {"run": {"remote": f"https://{SECRET}@h/runs"}},
        {"resume": f"https://{SECRET}@h/runs/a"},
        {"model": {"init": f"https://{SECRET}@h/model"}},
    ],
)
def test_a_configuration_holds_none(tree):
    """So none can come into config.yaml, checkpoints, reports, or a tracker's dashboard, which are made of it."""
    with pytest.raises(UserError, match=r"(?m)^[a-z.0-9]+: expected an address without password") as told:
        build(tree)
    assert SECRET not in str(told.value)
    assert str(told.value).startswith(refusals(tree)[0])
    assert ("'pipe:curl" in str(told.value)) == ("data" in tree or "evaluation" in tree)  # no run lies behind a command


def test_what_cannot_be_read_as_a_configuration_is_told_without_them():
    for word in ("data.trian=", "train.samples=", "seed=[", ""):
        with pytest.raises(UserError) as told:
            load(None, [f"{word}https://{SECRET}@h/a.tar"])
        assert SECRET not in str(told.value)


def test_an_index_holds_none(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["shards", "index", f"https://{SECRET}@h/a.tar", "--out", "index.json"]) == 2
    said = "".join(capfd.readouterr())
    assert "expected an address without password, token or signature" in said
    assert SECRET not in said
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_what_a_store_s_package_says_is_told_without_them(monkeypatch, caplog, tmp_path):
    """They put the signed address of a redirection into their errors."""
    signed = f"403 Forbidden for url: https://cdn.net/a.tar?Expires=1&Signature={SECRET}&Key-Pair-Id={SECRET}"

    def refused(*_):
        raise OSError(signed)

    monkeypatch.setattr(remote, "_copy", refused)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="403 Forbidden") as told:
        remote.fetch("hf://datasets/a/b/a.tar", tmp_path / "a.tar")
    assert caplog.text.count("403 Forbidden for url") == remote.ATTEMPTS - 1
    assert SECRET not in caplog.text + str(told.value)
    with pytest.raises(UserError, match="checkpoint: expected an address without password"):
        local_copy(f"https://{SECRET}@h/runs/a", "checkpoint")

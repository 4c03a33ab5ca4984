"""Secrets in addresses: where they stand, and text without them.

An address is written into configurations, checkpoints, logs, reports and other people's dashboards. A password, a
token in a user name's place (https://TOKEN@host/...) and a signature in a query belong into none of them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_HIDDEN = "..."
_SHARDS = ("data.", "evaluation.", "shards", "--shards")  # keys that a pipe:COMMAND can be given to
_BEGIN = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://")
_AUTHORITY = re.compile(r"[^\s/?#'\"]*")
_REST = re.compile(r"[^\s'\"]*")
_PORT = re.compile(r"\d*|\{[\d.,]+\}|\$\w+|\$\{\w+\}")
# There, a name alone before the host may be a token or the key of an account; elsewhere only a long one may.
_TOKEN = {
    "http", "https", "git+http", "git+https", "webdav", "webdavs", "dav", "davs", "s3", "s3a", "s3n", "gs", "gcs", "hf",
}  # fmt: skip
# There, it says who logs in, or which container it is, and may be long.
_LOGIN = {
    "sftp", "ssh", "scp", "rsync", "ftp", "ftps", "smb", "hdfs", "webhdfs", "abfs", "abfss", "wasb", "wasbs", "az",
    "adl", "git+ssh", "memory", "oci", "root", "roots", "xroot", "irods", "dask", "oss", "cos", "cosn", "obs", "ks3",
    "swift",
}  # fmt: skip
# There, no host follows but a path, which may have an @: on this machine, within an archive, or at a revision.
_PATH = {"file", "local", "tar", "zip", "libarchive", "github", "git"}
_PASSWORD = r"(?:secret|token|password|passwd|passphrase|credentials?|signature)"
_KEY = (
    r"(?:(?:access|account|api|auth|private|secret|shared|subscription)[-_]?key(?:[-_]?id)?|access[-_]?id|"
    r"key[-_]pair[-_]id)"
)
_NAME = (
    rf"(?:(?:[\w.-]*[-_.])?(?:sig|sas|pass|pwd|auth|authorization|bearer|jwt|hdnts|hdnea|{_PASSWORD}|{_KEY})_*"
    rf"|\w*(?:{_PASSWORD}|accesskeyid|accessid|apikey))"
)
_SURE = re.compile(rf"[?&;#~]{_NAME}=(?P<secret>[^&;#\s'\"]+)", re.IGNORECASE)
# Names that other things have too: then a secret is long, and of letters and digits.
_LONG = r"(?=[^&;#\s'\"]*\d)(?=[^&;#\s'\"]*[A-Za-z])(?P<secret>[^&;#\s'\"]{16,})"
_LONG_NAME = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{16,}", re.DOTALL)
_PERHAPS = re.compile(rf"[?&;#](?:[\w.-]*[-_.])?(?:key|ak|code|policy|session|sessionid|hmac)={_LONG}", re.IGNORECASE)
_VALUE = r"(?P<secret>'[^']*'|\"[^\"]*\"|[^\s'\";|&]+)"
_IN_COMMAND = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (  # of pipe:COMMAND, where $VARIABLE is no secret
    r"(?<=['\"])(?:(?:proxy-)?authorization|cookie)\s*:\s*(?:[a-z]+\s+)?(?P<secret>[^'\"]+)",
    r"(?<!['\"\w-])(?:(?:proxy-)?authorization|cookie)\s*:\s*(?P<secret>[^\s'\"]+)",
    rf"\b(?:[\w-]*{_PASSWORD}|[\w-]*{_KEY})\s*:\s*(?P<secret>[^\s'\"]+)",
    rf"(?<![\w-])\w*(?:{_PASSWORD}|pass|{_KEY})={_VALUE}",
    rf"(?<![\w-])[\w-]*key(?:=|:\s*){_LONG}",
    rf"\s--[\w-]*(?:{_PASSWORD}|bearer|{_KEY}|connection-string)[ =]{_VALUE}",
    rf"\b(?:curl|lftp|smbclient)\b[^|;]*?\s(?:-[a-z]*u\s?|--(?:proxy-)?user[ =]){_VALUE}",
    rf"\bsshpass\s+(?:-\w+\s+)*?-p\s?{_VALUE}",
    rf"\bopenssl\b[^|;]*?\s-k\s{_VALUE}",
    rf"\bpass:{_VALUE}",
))  # fmt: skip
# No secret: a number, one that names a folder, a word of configurations.
_NONE = re.compile(r"['\"]?(?:\d{1,5}(?:/.*)?|true|false|null|none|yes|no|basic)?['\"]?", re.IGNORECASE)


def _is_token(protocol: str, name: str) -> bool:
    """Whether a name alone before a host may be a secret."""
    return protocol in _TOKEN or (protocol not in _LOGIN and _LONG_NAME.fullmatch(name) is not None)


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    """From where to where secrets stand in a text; they may overlap."""
    for begin in _BEGIN.finditer(text):
        protocol, at = begin["protocol"].lower(), begin.end()
        authority = _AUTHORITY.match(text, at)
        rest = _REST.match(text, at)
        assert authority is not None
        assert rest is not None
        who, sign, _ = authority[0].rpartition("@")
        port = authority[0].partition(":")[2] if not authority[0].startswith("[") else ""
        numbered = _PORT.fullmatch(port) or authority[0].startswith("arn:")
        if not sign and not numbered and "@" in rest[0]:  # a password with a slash in it
            who = rest[0].rpartition("@")[0]
        if who and protocol not in _PATH and (":" in who or _is_token(protocol, who)):
            yield at, at + len(who)
        for pattern in (_SURE, _PERHAPS):
            for found in pattern.finditer(text, at, rest.end()):
                yield found.span("secret")
    pipe = text.find("pipe:")
    for pattern in _IN_COMMAND if pipe >= 0 else ():
        for found in pattern.finditer(text, pipe):
            yield found.span("secret")


def masked(text: str) -> str:
    """The text with `...` in place of each secret of an address in it."""
    if "://" not in text and "pipe:" not in text:
        return text
    parts, done = list[str](), 0
    expanded = "pipe:" in text  # by a shell
    for begin, end in sorted(_secrets(text)):
        value = text[begin:end]
        if end > done and not _NONE.fullmatch(value) and not (expanded and "$" in value):
            parts += [text[done:begin], _HIDDEN] if begin >= done else []
            done = end
    return "".join([*parts, text[done:]])


def refusal(key: str, text: str) -> str:
    """Why a text cannot be used as an address, the key first; "": it holds no secret."""
    shown = masked(text)
    if shown == text:
        return ""
    command = "or name a command that reads them from one: 'pipe:curl -sfH \"Authorization: Bearer $TOKEN\" URL'"
    return (
        f"{key}: expected an address without password, token or signature, since it is written into records, "
        f"checkpoints and logs, got {shown}; give secrets to the package for its protocol, as variables or in its own "
        f"file{f', {command}' if key.startswith(_SHARDS) else ''}"
    )


def refusals(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The same of all texts in nested sections."""
    lines = list[str]()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            lines += refusals(value, f"{key}.")
        elif isinstance(value, list | tuple):
            lines += refusals({str(number): one for number, one in enumerate(value)}, f"{key}.")
        elif isinstance(value, str) and (words := refusal(key, value)):
            lines.append(words)
    return lines

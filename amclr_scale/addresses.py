"""Secrets in addresses: where they stand, and text without them.

An address is written into configurations, checkpoints, logs, reports and other people's dashboards. A password, a
token in a user name's place (https://TOKEN@host/...) and a signature in a query belong into none of them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_HIDDEN = "..."
_BEGIN = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://")
_AUTHORITY = re.compile(r"[^\s/?#'\"]*")
_REST = re.compile(r"[^\s'\"]*")
# There, a name before the host says who logs in, or which container it is; elsewhere it is as good as a password.
_LOGIN = {
    "sftp", "ssh", "scp", "rsync", "ftp", "ftps", "smb", "hdfs", "webhdfs", "abfs", "abfss", "wasb", "wasbs", "az",
    "adl", "git+ssh", "memory",
}  # fmt: skip
_REVISION = {"github", "git"}  # there, fsspec reads an organization, a repository and a revision before the @
_NAME = (
    r"(?:[\w.-]*[-_.])?(?:sig|signature|token|secret|password|passwd|pwd|auth|authorization|credentials?|key|apikey|"
    r"accesskey|accesskeyid|accessid|keyid|jwt|policy|code)|\w*(?:accesskeyid|accessid|signature|apikey|token|password)"
    r"|key-pair-id"
)
_PARAMETER = re.compile(rf"[?&;#](?:{_NAME})=(?P<secret>[^&;#\s'\"]+)", re.IGNORECASE)
_IN_COMMAND = (  # of pipe:COMMAND, where $VARIABLE is no secret
    re.compile(r"(?i)(?:authorization|[\w-]*(?:token|key|secret))\s*:\s*(?:(?:bearer|basic|token)\s+)?(?P<secret>[^\s'\"]+)"),
    re.compile(r"\b\w*(?:SECRET|TOKEN|PASSWORD|KEY)\w*=(?P<secret>[^\s;]+)"),
    re.compile(r"(?:^|\s)(?:-u|--user|--(?:[a-z]+-)?password|--oauth2-bearer)[ =](?P<secret>\S+)"),
)  # fmt: skip


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    """From where to where secrets stand in a text; they may overlap."""
    pipe = text.find("pipe:")
    for begin in _BEGIN.finditer(text):
        protocol, at = begin["protocol"].lower(), begin.end()
        authority = _AUTHORITY.match(text, at)
        rest = _REST.match(text, at)
        assert authority is not None
        assert rest is not None
        who, sign, _ = authority[0].rpartition("@")
        port = authority[0].partition(":")[2] if not authority[0].startswith("[") else ""
        if not sign and port and not port.isdecimal() and "@" in rest[0]:  # a password with a slash in it
            who = rest[0].rpartition("@")[0]
        if who and protocol not in _REVISION and not (protocol in _LOGIN and ":" not in who):
            yield at, at + len(who)
        for found in _PARAMETER.finditer(text, at, rest.end()):
            yield found.span("secret")
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
        if begin >= done and not (expanded and "$" in text[begin:end]):
            parts += [text[done:begin], _HIDDEN]
            done = end
    return "".join([*parts, text[done:]])


def refusal(key: str, text: str) -> str:
    """Why a text cannot be used as an address, the key first; "": it holds no secret."""
    shown = masked(text)
    if shown == text:
        return ""
    return (
        f"{key}: expected an address without password, token or signature, since it is written into records, "
        f"checkpoints and logs, got {shown}; give secrets to the package for its protocol (as variables or in its own "
        "file), or name a command that reads them from one: 'pipe:curl -sfH \"Authorization: Bearer $TOKEN\" URL'"
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

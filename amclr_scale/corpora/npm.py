"""A pinned archive of npm's registry: fetched by npm, or given, and never used before its checksum is right."""

import base64
import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from amclr_scale.errors import UserError


@dataclass(frozen=True)
class NpmPackage:
    """One release.

    Attributes:
        integrity: as the registry gives it, `sha512-` and base64.
    """

    name: str
    version: str
    file: str
    integrity: str

    def fetch(self, folder: Path) -> Path:
        """The archive in `folder`, downloaded by `npm pack` where it is not there yet.

        Raises:
            UserError: there is no npm, it fails, or what came is another archive.
        """
        path = folder / self.file
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{self.name}@{self.version}"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                words = (getattr(error, "stderr", "") or str(error)).strip()
                raise UserError(
                    f"--archive: {' '.join(command)} failed: {words.splitlines()[-1]}; fetch {self.name} "
                    f"{self.version} from npm's registry yourself and give the file: --archive {self.file}"
                ) from error
        return self.verified(path)

    def verified(self, path: Path) -> Path:
        """The path itself, once its bytes are those of the pinned release.

        Raises:
            UserError: there is no such file, or it is another one.
        """
        if not path.is_file():
            raise UserError(f"--archive: expected {self.file} of {self.name} {self.version}, found no file {path}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
        found = f"sha512-{base64.b64encode(digest).decode()}"
        if found != self.integrity:
            raise UserError(
                f"--archive: {path}: expected {self.name} {self.version} with {self.integrity}, got {found}; remove "
                "the file and fetch it again"
            )
        return path

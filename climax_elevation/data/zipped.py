"""Downloads of the Climate Data Store that are an archive, whatever their suffix: unpacked while they are read."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path

from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

MAGIC = b"PK\x03\x04"


class Unpacked:
    """The files of an archive in a temporary folder, which goes when this does.

    Args:
        path: A zip archive of data files.

    Raises:
        InputError: If it is damaged, or the disk has too little space.
    """

    def __init__(self, path: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="climax-elevation-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        try:
            with zipfile.ZipFile(path) as archive:
                size, free = sum(one.file_size for one in archive.infolist()), shutil.disk_usage(self.folder).free
                if size > free:
                    raise InputError(
                        f"{path} is a zip archive of {size / 2**30:.1f} GiB, and {self.folder.parent} has "
                        f"{free / 2**30:.1f} GiB free: unpack it into a folder, and give that"
                    )
                archive.extractall(self.folder)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            self.remove()
            raise InputError(f"{path} is a zip archive that cannot be unpacked: {error}") from error
        except InputError:
            self.remove()
            raise
        self.files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        logger.info("%s is a zip archive: reading %s", path, ", ".join(file.name for file in self.files))

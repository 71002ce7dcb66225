"""The TFDS builder behind `bmad.load_split`: one split of one set, as records of image and mask paths.

Kept apart from bmad.py because importing TFDS is slow; nothing else may import this module at its top. It holds paths,
never pixels, so a prepared split takes a few megabytes at most. Finding folders and checking them is bmad.py's work.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import tensorflow_datasets as tfds


class Row(NamedTuple):
    """One record: paths relative to the set's folder as bytes, so that names that are not UTF-8 survive."""

    image: bytes
    mask: bytes  # empty where the image has no mask
    label: int
    id: int


class Bmad(tfds.core.GeneratorBasedBuilder):
    """Image paths, mask paths and labels of one split in a fixed order, as array_record: no TensorFlow is needed."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, split: str, rows: list[Row], **kwargs: Any):
        self._split, self._rows = split, rows
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Text(), "mask": tfds.features.Text(), "label": np.int64, "id": np.int64}
        )
        # Shuffling would sort by a hash of the key; the rows come in the order in which they are to be read.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in self._rows:
            yield row.id, row._asdict()


def prepare(data_dir: Path, split: str, rows: list[Row]) -> None:
    """Writes the records below `data_dir`, without network access and without a word on the terminal."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Bmad(split=split, rows=rows, data_dir=os.fspath(data_dir))
        offline = tfds.download.DownloadConfig()
        offline.try_download_gcs = False
        builder.download_and_prepare(download_config=offline)


def read(data_dir: Path, split: str) -> list[Row]:
    """The rows that `prepare` wrote, in their order."""
    builder = cast(Any, Bmad(split=split, rows=[], data_dir=os.fspath(data_dir)))
    source = builder.as_data_source(split)
    records = source.__getitems__(range(len(source)))
    return [Row(bytes(r["image"]), bytes(r["mask"]), int(r["label"]), int(r["id"])) for r in records]

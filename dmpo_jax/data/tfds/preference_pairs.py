"""TFDS builder: any source of raw pairs -> ArrayRecord splits, on one machine or with Beam.

    python -m dmpo_jax.data.tfds --config=pickapic --manual_dir=FOLDER --data_dir=OUT

This runs `tfds build preference_pairs --imports=dmpo_jax.data.tfds ...` without TensorFlow.

`--config` is a kind of source and `--manual_dir` its path. Other settings of PairsConfig are
given as JSON, under a name of your own:

    --config='{"name": "mine", "source": "table:gs://BUCKET/pairs.jsonl", "ties": "drop"}'

With `--beam_pipeline_options=runner=DirectRunner,direct_num_workers=8,...` a Beam pipeline
writes the shards (`pip install '.[beam]'`); the output is byte-identical. The source
`tfds:OUT/preference_pairs/NAME/1.0.0` reads them.
"""

import dataclasses
import functools
import json
import os
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from dmpo_jax import locks
from dmpo_jax.data import sources
from dmpo_jax.data.sources.bad_records import Tally
from dmpo_jax.data.sources.built import STATISTICS
from dmpo_jax.data.tfds import build
from dmpo_jax.errors import MissingPackageError, UserError
from dmpo_jax.progress import Progress

DESCRIPTION = """
Preference pairs: two images of a prompt, and the probability that image_0 is the preferred one.
Images are as the source encodes them (JPEG, PNG, ...), bad records skipped and counted in
statistics.json. Train and validation share no prompt. Stored in the source's order: shuffle.
"""


@dataclasses.dataclass(eq=False, kw_only=True)
class PairsConfig(tfds.core.BuilderConfig):
    """Settings of a build.

    source: KIND:PATH; an empty PATH stands for the manual folder. ties: "keep" or "drop".
    validation_fraction: of the prompts. max_bad: largest share of the rows that may be bad.
    allow_outside: also read images outside the folder of the table that names them.
    shard_pairs: approximate rows a shard, since units of the source are not split.
    """

    source: str = ""
    ties: str = "keep"
    validation_fraction: float | int = 0.01
    max_bad: float | int = 0.01
    allow_outside: bool = False
    shard_pairs: int = 1000


class PreferencePairs(FileReaderBuilder):
    """TFDS builder that writes shard by shard, unlike TFDS's GeneratorBasedBuilder.

    GeneratorBasedBuilder sends every image through a shuffle, on disk or in Beam, and reads the
    source once for each split. Its shards depend on whether Beam cut them. This builder reads the
    source once and shuffles nothing. A shard depends only on its part of the source.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The folder that holds the source, given as --manual_dir."
    BUILDER_CONFIGS = [  # noqa: RUF012 - as TFDS expects
        PairsConfig(name=kind, source=f"{kind}:") for kind in sources.SOURCES
    ]

    def __init__(self, *, file_format: Any = None, **arguments: Any):
        if file_format not in (None, "array_record", tfds.core.FileFormat.ARRAY_RECORD):
            raise UserError(f"pairs are built as array_record only, but got {file_format!r}")
        super().__init__(file_format="array_record", **arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=build.make_features(),
            disable_shuffling=True,
        )

    def download_and_prepare(self, **settings: Any) -> None:
        """Builds as TFDS does, unless it is built; takes its keywords.

        Raises:
            UserError: another process is building it.
        """
        wanted = settings.get("download_config") or tfds.download.DownloadConfig()
        if self.data_path.exists() and not wanted.download_mode.overwrite_dataset:
            super().download_and_prepare(**settings)  # reuses it, wherever it may not be written
            return
        folder = epath.Path(self.data_path).parent
        with locks.hold(folder, "tfds build"):
            for left in folder.glob(f"incomplete.*_{self.version}"):  # by a build that was killed
                left.rmtree()
            super().download_and_prepare(**settings)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        if download_config.max_examples_per_split is not None or download_config.num_shards:
            raise UserError(
                "max_examples_per_split and num_shards have no meaning here: choose a smaller "
                "source, or shard_pairs in the config"
            )
        job, shards = self._planned(dl_manager)
        reports = _write_all(job, shards, download_config)
        text = json.dumps(build.summarize(job, reports), indent=1, ensure_ascii=False)
        (self.data_path / STATISTICS).write_text(text)
        self.info.set_splits(
            tfds.core.SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=split,
                        # A shard without a pair of a split has length 0 and no file.
                        shard_lengths=[report.counts[split].pairs for report in reports],
                        num_bytes=sum(report.sizes[split] for report in reports),
                        filename_template=self._get_filename_template(split),
                    )
                    for split in build.SPLITS
                    if any(report.counts[split].pairs for report in reports)
                ]
            )
        )

    def _planned(self, dl_manager: Any) -> tuple[build.Job, list[build.Shard]]:
        config: Any = self.builder_config
        kind, _, path = config.source.partition(":")
        job = build.Job(
            # TFDS checks the manual folder when it is read, so read it only if it is needed.
            source=f"{kind}:{path or dl_manager.manual_dir}",
            ties=config.ties,
            validation_fraction=config.validation_fraction,
            max_bad=config.max_bad,
            allow_outside=config.allow_outside,
            folder=os.fspath(self.data_path),
        )
        units = build.open_source(job).units()
        planned = build.plan_shards(units, config.shard_pairs)
        templates = {split: self._get_filename_template(split) for split in build.SPLITS}
        shards = []
        for i, part in enumerate(planned):
            files = {
                split: template.sharded_filepath(shard_index=i, num_shards=len(planned)).name
                for split, template in templates.items()
            }
            shards.append(build.Shard(tuple(part), files))
        return job, shards


def _write_all(
    job: build.Job, shards: list[build.Shard], download_config: Any
) -> list[build.Report]:
    """Writes every shard, in turn in this process or, if requested, in a Beam pipeline."""
    runner, options = download_config.beam_runner, download_config.beam_options
    reports: list[build.Report] = []
    if runner is None and options is None:
        tally = Tally(job.max_bad, total=build.count_rows(job))
        with Progress(len(shards), description="shards") as progress:
            for shard in shards:
                build.write_shard(job, shard)
                reports.append(build.take_report(job, shard))
                tally.merge(reports[-1].tally)
                tally.check()  # fails now rather than at the end
                progress.advance()
        return reports
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingPackageError(
            "a Beam build needs Apache Beam: pip install '.[beam]'"
        ) from error
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        write = beam.Map(functools.partial(build.write_shard, job))
        # Without Reshuffle a runner may fuse the steps and leave all shards to one worker.
        _ = pipeline | beam.Create(shards) | beam.Reshuffle() | write
    return [build.take_report(job, shard) for shard in shards]

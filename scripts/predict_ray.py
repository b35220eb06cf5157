"""Classify many pictures with Ray, on this machine or on a cluster.

    pip install -e '.[ray]'
    python scripts/predict_ray.py photos --out answers
    python scripts/predict_ray.py s3://bucket/photos --out /shared/answers --address HOST:6379

The pictures are divided into shards by a hash of their names. Actors classify a shard at a time and
write it as one file, with the columns of ``horsehuman predict``. A shard whose actor is killed is
classified again. The same command, run again, classifies only the shards that are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from horsehuman.data.images import PictureError, is_hidden, read_picture
from horsehuman.data.sources import expand_sources, is_url, read_source
from horsehuman.errors import HorseHumanError, check_number, one_line, os_errors, printable
from horsehuman.inference.output import COLUMNS, as_row
from horsehuman.inference.predict import load, predict
from horsehuman.models.checkpoint import weight_files
from horsehuman.run_dir import read_json, write_atomic, write_json
from horsehuman.runtime import log_to_stderr, tune_process

try:
    import pyarrow as pa
    import ray
    from pyarrow import csv, dataset, fs, parquet
except ImportError:
    sys.exit("error: Ray is not installed: pip install -e '.[ray]'")

#: Seconds to wait for an answer of a cluster.
SECONDS = 10.0

#: Columns of a shard.
SCHEMA = pa.schema(
    (name, pa.float64() if name in ("probability", "logit") else pa.string()) for name in COLUMNS
)


def main(arguments: list[str] | None = None) -> int:
    """Classify the pictures of the shards that are missing, and print how many there were."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, file, pattern or URI")
    parser.add_argument("--model", default="inception", help="name, run, checkpoint or .onnx file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv")
    parser.add_argument("--shards", type=int, default=256, help="number of shards (256)")
    parser.add_argument("--actors", type=int, default=0, help="0: one for each GPU or core")
    parser.add_argument("--address", help="HOST:PORT of a cluster; default: this machine")
    options = parser.parse_args(arguments)
    log_to_stderr()
    systems: dict[str, Any] = {}
    try:
        check_number("--actors", options.actors, int, at_least=0)
        if ":/" in str(options.out):
            raise HorseHumanError(f"--out {printable(options.out)}: name a folder, not a URI")
        found = [list_pictures(source, systems) for source in options.sources]
        pictures = {name: state for each in found for name, state in each.items()}
        shards = make_shards(pictures, options.shards)
        with os_errors("write into", f"--out {options.out}"):
            missing = missing_shards(shards, options)
        if missing:
            classify(missing, systems, options)
        files = [str(options.out / f"{name}.{options.format}") for name in shards]
        answers = dataset.dataset(files, schema=SCHEMA, format=options.format)
        errors = answers.count_rows(filter=dataset.field("status") == "error")
    except (HorseHumanError, OSError, ValueError, ray.exceptions.RayError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    total = f"{len(pictures):,} pictures ({errors:,} unreadable) in {len(shards):,} shards"
    print(f"{total}, {len(missing):,} of them new: {printable(options.out)}")
    return int(errors > 0)


def list_pictures(source: str, systems: dict[str, Any]) -> dict[str, str]:
    """Return size and time of change of each picture by its name; those of a URI have URIs.

    Args:
        source: File, folder, pattern, address, or URI of a folder.
        systems: The file systems of URIs by scheme; that of this one is added.

    Raises:
        HorseHumanError: The source has no pictures.
    """
    scheme, _, rest = source.partition("://")
    if is_url(source):
        return {source: ""}
    if rest:
        systems[scheme], path = fs.FileSystem.from_uri(source)
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        found = systems[scheme].get_file_info(selector)
        files = [file for file in found if file.is_file and not is_hidden(file.base_name)]
    else:
        found = fs.LocalFileSystem().get_file_info(list(expand_sources([source], recursive=True)))
        files = [file for file in found if file.is_file]
    if not files:
        raise HorseHumanError(f"{printable(source)}: no pictures: check the path")
    start = f"{scheme}://" if rest else ""
    return {start + file.path: f"{file.size} {file.mtime_ns}" for file in files}


def digest(text: str) -> str:
    """Return eight hex digits."""
    return hashlib.blake2b(os.fsencode(text), digest_size=4).hexdigest()


def make_shards(pictures: dict[str, str], count: int) -> dict[str, list[str]]:
    """Divide pictures by the hashes of their names; return names by the file name of the shard.

    The file name ends with a digest of names, sizes and times: a shard that has changed is another
    file.
    """
    check_number("--shards", count, int, at_least=1)
    parts: list[dict[str, str]] = [{} for _ in range(count)]
    for name in sorted(pictures):
        parts[int(digest(name), 16) % count][name] = pictures[name]
    return {f"{k:05}-{digest(repr(part))}": list(part) for k, part in enumerate(parts) if part}


def missing_shards(shards: dict[str, list[str]], options: argparse.Namespace) -> list[Any]:
    """Return files and names of the missing shards; remove files of shards that no longer exist.

    Raises:
        HorseHumanError: The folder has answers of another model or source, or in another format.
    """
    model, out, suffix = options.model, options.out, options.format
    weights = [Path(model)] if model.endswith(".onnx") else weight_files(model)
    key = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    job = {"model": key, "format": suffix, "source": options.sources}
    for name, value in read_json(out / "_job.json").items():
        if job.get(name) != value:
            raise HorseHumanError(f"--out {out} is of another {name}: name another folder")
    write_json(out / "_job.json", job)
    for path in out.glob(f"*.{suffix}"):
        if path.stem not in shards:
            path.unlink()
    files = {out / f"{name}.{suffix}": names for name, names in shards.items()}
    return [{"path": str(p), "names": names} for p, names in files.items() if not p.exists()]


class ShardClassifier:
    """An actor that loads a classifier once, and writes shards.

    Args:
        model: Name, run, checkpoint or exported file.
        folder: Working folder of the driver, which relative names begin at.
        systems: The file systems of URIs by scheme.
    """

    def __init__(self, model: str, folder: str, systems: dict[str, Any]) -> None:
        os.chdir(folder)
        tune_process()
        self.classifier: Any = load(model)
        self.systems = systems
        if os.environ.get("CUDA_VISIBLE_DEVICES") and hasattr(self.classifier, "to"):
            self.classifier.to("cuda")

    def __call__(self, shard: dict[str, Any]) -> dict[str, str]:
        """Classify the pictures of a shard and write its file; return an error, or nothing."""
        names, path = [str(name) for name in shard["names"]], Path(shard["path"])
        predictions = predict(self.classifier, names, read=self.read)
        rows = [as_row(x) | {"source": printable(x.source)} for x in predictions]
        table = pa.Table.from_pylist(rows, SCHEMA)
        write = csv.write_csv if path.suffix == ".csv" else parquet.write_table
        try:
            write_atomic(path, lambda file: write(table, file))
        except OSError as error:
            return {"error": f"cannot write {printable(path)}: {error.strerror or error}"}
        return {"error": ""}

    def read(self, name: str) -> Any:
        """Read a picture; see :func:`~horsehuman.data.images.read_picture`."""
        scheme, _, path = name.partition("://")
        if scheme not in self.systems:
            return read_source(name)
        try:
            with self.systems[scheme].open_input_stream(path) as file:
                return read_picture(io.BytesIO(file.read()), printable(name))
        except OSError as error:
            raise PictureError(f"cannot read {printable(name)}: {one_line(error)}") from error


def classify(shards: list[Any], systems: dict[str, Any], options: argparse.Namespace) -> None:
    """Classify shards with a pool of actors.

    Raises:
        HorseHumanError: Nobody answers at the address within :data:`SECONDS`, or a shard cannot be
            written.
    """
    if options.address is not None:  # ray.init would go on trying for minutes
        host, _, port = options.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), SECONDS).close()
        except (OSError, OverflowError, ValueError) as error:
            name = f"--address {printable(options.address)}"
            raise HorseHumanError(f"{name}: no answer: give HOST:PORT of a cluster") from error
    ray.init(options.address or "local", log_to_driver=False, logging_level=logging.WARNING)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    actors = options.actors or gpus or int(resources["CPU"])
    answers = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
        ShardClassifier,  # type: ignore[arg-type]
        fn_constructor_args=(options.model, str(Path.cwd()), systems),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(shards))),
        num_cpus=1,
        num_gpus=min(1, gpus),
    )
    for answer in answers.iter_rows():
        if answer["error"]:
            raise HorseHumanError(answer["error"])


if __name__ == "__main__":
    raise SystemExit(main())

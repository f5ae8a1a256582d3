"""Records as TensorBoard event files.

Events are written with the `tensorboard` package's RecordWriter. Its EventFileWriter would import TensorFlow if that
is installed, and has a queue whose events are lost when the process is killed.
"""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from hrm_ray.types import Record

_FILE_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class TensorBoardSink:
    """Scalars as `train/<name>` and `eval/<name>`, the items of a list as `<name>/<index>`, events as text.

    Each record is in the file when `write` returns. `resume_step` is the step a resumed run starts from: TensorBoard
    then hides what an earlier file of the folder holds for later steps. OSError when the folder cannot be written.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names and never looks back: a file of a run resumed
        # within the same second must still sort after the one it continues.
        stamps = (int(match[1]) for match in map(_FILE_NAME.match, os.listdir(folder)) if match)
        stamp = max(int(time.time()), max(stamps, default=-1) + 1)
        path = folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(path.open("xb"))
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:
            restart = SessionLog(status=SessionLog.START)
            self._put(Event(wall_time=time.time(), step=resume_step + 1, session_log=restart))

    def write(self, record: Record) -> None:
        """Take one record; ValueError once closed."""
        summary = _event_summary(record) if record.kind == "event" else _metric_summary(record)
        self._put(Event(wall_time=record.time_s, step=record.step, summary=summary))

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._writer.close()

    def _put(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _metric_summary(record: Record) -> Summary:
    summary = Summary()
    for name, value in record.values.items():
        tag = f"{record.kind}/{name}"
        if isinstance(value, str):
            summary.value.append(_text(tag, value))
        elif isinstance(value, list):
            summary.value.extend(_scalar(f"{tag}/{index}", item) for index, item in enumerate(value))
        else:
            summary.value.append(_scalar(tag, value))
    return summary


def _event_summary(record: Record) -> Summary:
    """One text: level and message, then the event's other values, if any."""
    others = dict(record.values)
    level, message = others.pop("level", "INFO"), others.pop("message", "")
    parts = [f"{level}: {message}", *(f"{name} = {value}" for name, value in others.items())]
    return Summary(value=[_text("event", "\n\n".join(parts))])


def _scalar(tag: str, value: float | bool) -> Summary.Value:
    return Summary.Value(tag=tag, simple_value=float(value))


def _text(tag: str, text: str) -> Summary.Value:
    tensor = TensorProto(
        dtype=DT_STRING,
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        string_val=[text.encode("utf-8", errors="replace")],
    )
    return Summary.Value(tag=tag, metadata=create_summary_metadata(None, None), tensor=tensor)

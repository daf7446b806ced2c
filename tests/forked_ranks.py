"""Several ranks in a test: forked processes that talk by gloo, without the seconds that torchrun takes to start."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

SECONDS = 60


def on_ranks(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work()` returns, or the exception it raises, on each of `count` ranks that have joined each other."""
    context = multiprocessing.get_context("fork")
    meeting = folder / f"meeting{len(list(folder.glob('meeting*')))}"
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_rank, args=(rank, count, work, str(meeting), pipes[rank][1])) for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        answers: list[Any] = [_answer(reader, writer) for reader, writer in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for answer in answers:
        if isinstance(answer, str):
            raise AssertionError(answer)
    return [value for (value,) in answers]


def _answer(reader: Connection, writer: Connection) -> Any:
    writer.close()  # the child has its own end
    assert reader.poll(SECONDS), "a rank hangs"
    return pickle.loads(reader.recv_bytes())


def _rank(rank: int, count: int, work: Callable[[], Any], meeting: str, writer: Connection) -> None:
    answer: Any
    try:
        dist.init_process_group("gloo", store=dist.FileStore(meeting, count), rank=rank, world_size=count)
        dist.barrier()  # a rank that leaves at once would break the connections of one that is still arriving
        try:
            answer = (work(),)
        except Exception as error:
            answer = (error,)
        dist.destroy_process_group()
    except BaseException:
        answer = traceback.format_exc()
    try:
        text = pickle.dumps(answer)  # not `send`, which would pass tensors through files of this process
    except Exception:
        text = pickle.dumps(traceback.format_exc())
    writer.send_bytes(text)
    writer.close()
    os._exit(0)

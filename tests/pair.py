"""Two processes that share jobs, as torchrun would start them, kept for all tests of a session."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing

from robustflat.ranks import joined, speaks

SIZE = 2
PATIENCE = 300.0


class Pair:
    """Runs functions of importable modules on two ranks with gloo; results travel as pickles."""

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The function's result on each rank; what it raises is returned in its place."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        order = pickle.dumps((function, arguments, port))
        for end in self._ends:
            end.send_bytes(order)
        assert all(end.poll(PATIENCE) for end in self._ends), "a rank hangs"
        return [pickle.loads(end.recv_bytes()) for end in self._ends]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, end: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, arguments, port = pickle.loads(end.recv_bytes())
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        torch.manual_seed(0)
        answer: Any
        try:
            with joined():
                answer = function(*arguments)
        except Exception as error:
            answer = error
            answer.speaks = speaks()
        end.send_bytes(pickle.dumps(answer))

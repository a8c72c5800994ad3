"""A peer in a process of its own, so that its memory is its own and no thread pool of one slows another down.

Two threads of one process that both compute with torch share its cores badly: `generate` beside an engine would write a
third slower than alone. All is timed where it is called: an answer's way between the processes takes nobody's time.

Importing this is light: a process sets the number of its threads before anything that reads it is imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from copyspec_engine import CopySpecError
from copyspec_engine.cli.demo.figures import PeerAnswer

__all__ = ["PeerProcess", "TransformersSide"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
END_TIMEOUT_S = 5.0


class TransformersSide:
    """transformers on an engine's weights, and its answers as `GENERATE` and `LOOKUP`.

    Args:
        model: a name or path, as the engine knows it.
        device: as torch calls it.
        dtype: of the weights, as torch calls it.
        trust_remote_code: whether code of the checkpoint may run.

    Raises:
        ModelLoadError: it cannot load the model.
    """

    def __init__(self, model: str, device: str, dtype: str, *, trust_remote_code: bool) -> None:
        from copyspec_engine.cli.demo.transformers_lanes import transformers_lanes

        self._lanes = transformers_lanes(model, device, dtype, trust_remote_code=trust_remote_code)

    def answer(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        """The answer of a lane, which reads the whole prompt in every turn."""
        return self._lanes[name](prompt_ids, max_tokens)

    def close(self) -> None:
        """Nothing is to be ended."""


class PeerProcess:
    """One of the sides, made in a process of its own; `close` ends it, and so does leaving its `with` block.

    Args:
        name: what it is called in errors.
        threads: how many threads compute in it.
        make: makes the side, there.
        arguments: of `make`, by name.

    Raises:
        CopySpecError: the side cannot be made.
    """

    def __init__(self, name: str, threads: int, make: Callable[..., Any], **arguments: Any) -> None:  # noqa: ANN401
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:  # noqa: ANN401 - as the method has it
        """What a method of the side gives.

        Raises:
            CopySpecError: the method raised one, or the process has ended.
        """
        self._connection.send((method, arguments))
        return self._result()

    def close(self) -> None:
        """End the process; it is killed if it does not end by itself."""
        self._connection.close()
        for end in (self._process.terminate, self._process.kill):
            self._process.join(END_TIMEOUT_S)
            if self._process.exitcode is None:
                end()
        self._process.join()

    def _result(self) -> Any:  # noqa: ANN401
        try:
            failed, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(END_TIMEOUT_S)
            raise CopySpecError(f"The process of {self._name} ended with exit code {self._process.exitcode}") from None
        if failed:
            raise CopySpecError(result)
        return result


def _serve(connection: Connection, threads: int, make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """What a process does: makes its side and calls its methods, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; who started this one closes its end then
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    import torch

    torch.set_num_threads(threads)
    with ExitStack() as stack, contextlib.suppress(EOFError, BrokenPipeError):
        try:
            side = stack.enter_context(contextlib.closing(make(**arguments)))
        except CopySpecError as error:
            connection.send((True, str(error)))
            return
        connection.send((False, None))
        while True:
            method, given = connection.recv()
            try:
                answer = False, getattr(side, method)(*given)
            except CopySpecError as error:
                answer = True, str(error)
            connection.send(answer)

"""No argument from Python ends the process: each binding answers with a result or an exception."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from argosy import _native as native
from tests.native.odd_arguments import Case

ROOT = Path(__file__).parents[2]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 14))
    return Case(native, native.Runtime(1), str(path))


@pytest.mark.full
def test_odd_arguments_to_every_binding_end_in_a_result_or_an_exception(tmp_path: Path) -> None:
    note = tmp_path / "note"
    walk = [sys.executable, "-m", "tests.native.odd_arguments", "--note", str(note)]
    done = subprocess.run(walk, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{note.read_text()}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_none_in_a_list_is_refused_with_its_index(case: Case) -> None:
    x = case.floats(1, 64)
    with pytest.raises(ValueError, match=r"matrices\[1\] is None, expected argosy._native.Matrix"):
        native.matmul(case.runtime, [case.matrix(16, 64), None], x, [case.floats(1, 16)] * 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"records\[0\]\[0\] is None, expected argosy._native.Record"):
        case.store().fetch_many(case.arena(), [(None, 0)])
    with pytest.raises(ValueError, match=r"shared\[2\] is None, expected argosy._native.Matrix"):
        native.routed_ffn(
            case.matrix(4, 64, "f32"), case.routing(), width=32,
            shared=(case.matrix(32, 64), case.matrix(32, 64), None),  # type: ignore[arg-type]
        )  # fmt: skip
    (runtime, kv), arguments = case.stack_arguments()
    for name, kind in (("layers", "Layer"), ("rotaries", "Rotary")):
        with pytest.raises(ValueError, match=rf"{name}\[0\] is None, expected argosy._native.{kind}"):
            native.Stack(runtime, kv, **arguments | {name: [None]})


def test_a_layer_that_does_not_fit_the_stack_is_refused(case: Case) -> None:
    (runtime, kv), arguments = case.stack_arguments()
    norm, narrow = case.floats(64), case.floats(32)
    for arguments_of_layer, sentence in (
        ({"rotary": 1}, r"layers\[0\]: rotary is 1, expected 0 to 0"),
        ({"rotary": -1}, r"layers\[0\]: rotary is -1, expected 0 to 0"),
    ):
        layer = native.Layer(norm, case.gqa(), norm, case.routed(), **arguments_of_layer)
        with pytest.raises(ValueError, match=sentence):
            native.Stack(runtime, kv, **arguments | {"layers": [layer]})
    layer = native.Layer(narrow, case.gqa(), narrow, case.routed())
    with pytest.raises(ValueError, match=r"layers\[0\]: size of the norms is 32, expected 64"):
        native.Stack(runtime, kv, **arguments | {"layers": [layer]})
    for name in ("mixer_post_norm", "ffn_post_norm"):
        with pytest.raises(ValueError, match=rf"{name} has shape \[32\], expected \[64\]"):
            native.Layer(norm, case.gqa(), norm, case.routed(), **{name: narrow})  # type: ignore[arg-type]


def test_an_arena_that_was_never_initialised_is_refused() -> None:
    native.Arena(1 << 16)  # freed at once, so that the next one reuses its memory
    arena = native.Arena.__new__(native.Arena)
    with pytest.raises(ValueError, match="memory is an Arena that was never initialised"):
        native.Matrix(arena, 0, "q4", 16, 64)


def test_a_step_without_dimensions_is_refused(case: Case) -> None:
    import numpy as np

    step = case.step()
    with pytest.raises(ValueError, match=r"token_ids has shape \[\], expected \[any\]"):
        case.stack().begin(np.array(1, np.int32), *step[1:])


BEYOND = r"would take more than 2\^62 bytes"


@pytest.mark.parametrize(
    ("latent", "max_tokens", "sentence"),
    [
        ((2**31, 32, 16, 32, 8, 2), 8, "a dimension of a layer is 2147483648, expected 0 to 1073741824"),
        ((2, 32, -1, 32, 8, 2), 8, "a dimension of a layer is -1, expected 0 to 1073741824"),
        ((2**20, 2**30 - 1, 0, 32, 8, 2), 8, r"a layer is \d+ columns wide, expected at most 1099511627776"),
        ((2**12, 2**28, 0, 32, 2**28, 2), 2**31 - 1, BEYOND),
        ((2, 32, 16, 32, 8, 2), 0, "max_tokens is 0, expected 1 to 2147483647"),
        ((2, 32, 16, 32, 8, 2), 2**31, "max_tokens is 2147483648, expected 1 to 2147483647"),
    ],
)
def test_a_size_that_overflows_is_refused(
    latent: tuple[int, int, int, int, int, int], max_tokens: int, sentence: str
) -> None:
    def buffer_bytes() -> int:
        sizes = native.StackSizes(64, 8)
        sizes.add_latent_attention(*latent)
        return sizes.buffer_bytes(max_tokens)

    with pytest.raises(ValueError, match=sentence):
        buffer_bytes()


def test_scratch_that_overflows_is_refused() -> None:
    sizes = native.StackSizes(2**30, 8)
    sizes.add_routed(8, 8, 2**30, 0)
    with pytest.raises(ValueError, match=BEYOND):
        sizes.scratch_bytes(2**31 - 1, 2)


def test_more_assignments_than_an_int32_can_count_are_refused() -> None:
    sizes = native.StackSizes(64, 8)
    sizes.add_routed(8, 4, 32, 0)
    with pytest.raises(ValueError, match="max_tokens is 536870912, expected 1 to 536870911"):
        sizes.buffer_bytes(2**29)


MAKERS = ("native.Runtime(200)", "native.Store(200)", "native.int8_probe(200)")


@pytest.mark.parametrize("make", MAKERS)
def test_when_threads_cannot_start_the_error_names_the_limits(make: str) -> None:
    """Each thread reserves a stack, so a limit on address space allows some threads but not all."""
    code = f"""if True:
        import resource
        from argosy import _native as native
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (256 << 20),) * 2)
        try:
            {make}
        except RuntimeError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
        native.Runtime(2).close()  # those that could be started were joined: their memory is free again
    """
    assert resource.getrlimit(resource.RLIMIT_STACK)[0] >= 1 << 20
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "threads could be started: Resource temporarily unavailable" in done.stdout
    assert "ulimit -u" in done.stdout
    assert "pids.max" in done.stdout

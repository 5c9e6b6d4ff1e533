"""The GPU's WaveNet kernel against the core's own step: logits, picks, many clips, several programs a clip.

`test_cuda_wavenet` runs this file in a process of its own, where Triton's interpreter takes the place of a GPU
(TRITON_INTERPRET=1, read when Triton is imported); without that variable it needs a GPU. The interpreter runs one
program after the other, so that with several of them only one sample a launch can be made there.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from dfcli.cores import WaveNet
from dfcli.cores.protocols import Picking
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice, pick
from dfcli.kernels.cuda import wavenet as wavenet_cuda
from dfcli.kernels.cuda.wavenet import Persistent
from dfcli.system.device import Device
from tests.generation.engine import picking, start
from tests.kernels.test_wavenet_sample import VARIANTS, build, compare

KIND = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FEW = KIND == "cpu"  # the interpreter takes about a second for a sample
DEVICE = Device(torch.device(KIND), KIND, KIND, "float32", "", 1)


def fast(core: WaveNet, opening: list[list[int]], processors: int = 1) -> Persistent:
    return start(Persistent(core.to(DEVICE.torch_device), DEVICE, processors), opening)


def same(core: WaveNet, opening: list[list[int]], samples: int, processors: int) -> Persistent:
    """Asserts that the kernel does what the plain step does, sample by sample."""
    ours = Persistent(core.to(DEVICE.torch_device), DEVICE, processors)
    compare(core, ours, Plain(core, DEVICE), opening, samples)
    return ours


PROGRAMS = [(6, 2, 3), (3, 17, 1), (100, 1, 8), (6, 17, 3)]


@pytest.mark.parametrize("variant", ["norm", "kernel 3", "embedding and decoder", "conditions"] if FEW else VARIANTS)
def test_logits_and_picks_are_the_plain_steps(variant: str) -> None:
    same(build(**VARIANTS[variant]), [[1, 2, 3], [4, 5, 6]], 2 if FEW else 20, processors=1)


@pytest.mark.parametrize(("processors", "clips", "programs"), PROGRAMS[:2] if FEW else PROGRAMS)
def test_programs_that_share_the_layers(processors: int, clips: int, programs: int) -> None:
    ours = same(build(), [[clip % 12, 3, 5] for clip in range(clips)], 2 if FEW else 12, processors)
    assert (ours._sizes.G, ours._sizes.M) == (programs, 1 if clips < 17 else 16)


@pytest.mark.parametrize("filters", [picking(), picking(0), picking(0.8, 5), picking(1, None, 0.9, 0.05)])
def test_long_chunks_wherever_they_are_cut(filters: Picking) -> None:
    core, opening, uniforms = build(), [[1, 2], [1, 2]], Dice(4, range(2)).draw(6 if FEW else 50)
    ours = fast(core, opening)
    made = np.concatenate([ours.generate(part, filters) for part in np.split(uniforms, [1, 3], axis=1)], axis=1)
    np.testing.assert_array_equal(made, start(Plain(core, DEVICE), opening).generate(uniforms, filters))


@pytest.mark.parametrize("clips", [1] if FEW else [1, 20])
@pytest.mark.parametrize(
    "filters",
    [
        picking(), picking(0), picking(0.8, 40, 0.8, 0.05), picking(1, None, 1e-9), picking(1e-30),
        picking(0.7, 5), picking(1.3, None, 0.9), picking(1, 1), picking(1, None, None, 0.3), picking(1e30),
    ][: 5 if FEW else None],
)  # fmt: skip
def test_pick_is_the_pick_of_sampling(filters: Picking, clips: int) -> None:
    core, rng, V = build(vocab_size=200), np.random.default_rng(0), 200
    engine = fast(core, [[1]] * clips)
    for round_ in range(2 if FEW else 40 // clips):
        values = (3 * rng.standard_normal((clips, V))).astype(np.float32)
        if round_ % 2:
            values = values.round()  # with many equal ones
        uniforms = rng.random((clips, 1)) * (round_ > 0)
        engine._state.logits[:clips, :V] = torch.from_numpy(values)
        made = engine.generate(uniforms, filters)[:, 0]
        np.testing.assert_array_equal(made, pick(values, filters, uniforms[:, 0]))


def test_a_start_forgets_what_was_before() -> None:
    engine = fast(build(), [[1, 2]] * 2)
    uniforms = Dice(1, [0, 1]).draw(2 if FEW else 12)
    first = engine.generate(uniforms, picking())
    np.testing.assert_array_equal(start(engine, [[1, 2]] * 2).generate(uniforms, picking()), first)


def test_a_model_that_diverged_is_told() -> None:
    core = build()
    torch.nn.init.constant_(core.layers[1].residual.bias, float("nan"))
    engine = fast(core, [[1]])
    engine.generate(Dice(1, [0]).draw(3), picking())
    assert not engine.finite()


@pytest.mark.skipif(KIND == "cpu", reason="the interpreter cannot run programs that wait for each other in long chunks")
@pytest.mark.parametrize("clips", [1, 16, 17, 300])
def test_on_a_gpu(clips: int) -> None:
    core = build(dilations=(1, 2, 4, 8, 16), residual=64, skip=256, head=256, vocab_size=256)
    uniforms, opening = Dice(0, range(clips)).draw(1000), [[128]] * clips
    engine = wavenet_cuda.build(core.to(DEVICE.torch_device), DEVICE)
    made = start(engine, opening).generate(uniforms, picking())
    np.testing.assert_array_equal(made, start(Plain(core, DEVICE), opening).generate(uniforms, picking()))

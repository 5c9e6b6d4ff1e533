"""The arithmetic of the cores, compiled for a CPU or a GPU: optional, for speed.

A module that trains or generates computes one core on one kind of device, by the functions below. Its import fails
where numba or Triton is missing. `known.py` lists the fields and values of a config that these modules compute.

Training (`gpt_train`, `wavenet_train`), chosen by `training/backend.py`:

    supports(config, precision="float32") -> str | None
    rounds(config) -> bool
    build(core, workers: threads.WorkerPool, on_event, precision="float32") -> protocols.Pass

Generation (`gpt_sample`, `wavenet_sample`, `cuda.gpt`, `cuda.wavenet`), chosen by `generation/engines.py`:

    supports(config, device) -> str | None
    build(core, device, exact=True, on_event=ignore) -> protocols.Engine

`supports` gives None where `build` takes a model of this config, else the reason against it, a clause.

`build` takes a core whose config `supports` accepts. It compiles what is not compiled yet, and tells `on_event` where
that takes long. It raises what the compiler or the device raises. These errors have no common base class, so the caller
catches all of them and uses PyTorch. `cores/protocols.py` says what the result does:

- A pass gives the loss and the gradients of the core to 1e-5. With the precision "bfloat16" it rounds the inputs of
  matrix products, as PyTorch's autocast does, if `rounds` says that it can for this config on this processor.
- An engine makes the picks of the plain engine. If `exact` is false, it may round its weights for speed, and the picks
  differ. Only `wavenet_sample` does this. `--engine fast` asks for exact picks, `--engine auto` does not.
"""

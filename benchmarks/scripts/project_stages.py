"""The stages of the project's own benchmarks: the commands of each, as a user would type them, and what they write."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = "examples/shapes"
VENV = "build/optimum-venv"
DRAWN = ("--sampler", "DPM++ 2M", "--schedule", "karras", "--guidance", "5")
BATCHES, SIZES, STEPS = "1,2,4", "64,128,192,256", "5,10,20,40"
_AGAINST = ", against optimum-cli: time, memory, files, nodes"
# A range for what grows, beside the engine that is made for the size of `end-to-end`.
ENGINE_SIZES, ENGINE_BATCHES = "64..256", "1..4"


@dataclass(frozen=True)
class Command:
    """A command line, its first word `latentrt` or `python`.

    Attributes:
        may_fail: it makes what this machine may not be able to make; the benchmark's rows say what is missing then.
    """

    words: tuple[str, ...]
    may_fail: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the benchmarks that is done as a whole or not at all.

    Attributes:
        about: what it measures, for people.
        results: files that it leaves in the plan's folder; none for a stage that only makes what others measure.
        needs: stages that have to be done before.
    """

    name: str
    about: str
    commands: tuple[Command, ...]
    results: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the benchmarks are run.

    Attributes:
        out: folder of the results, from the repository's root, as all paths are.
        bundle: of the shapes model, in fp32, fp16 and int8.
        gpu: on the GPU, beside PyTorch in fp16.
        full_size: side of the pictures at the width of Stable Diffusion 1.5, in pixels.
        full_steps: of those.
        quick: next to no runs, to see that everything starts.
    """

    out: str
    bundle: str
    gpu: bool
    full_size: int
    full_steps: int
    quick: bool = False

    def file(self, stem: str, kind: str = "json") -> str:
        """Name of a results file: it says on what it ran."""
        return f"{stem}-{'gpu' if self.gpu else 'cpu'}.{kind}"

    def path(self, stem: str, kind: str = "json") -> str:
        """Of a results file, from the root."""
        return f"{self.out}/{self.file(stem, kind)}"

    @property
    def models(self) -> str:
        """Where `bench_export.py` keeps what it exported."""
        return f"{self.out}/models"


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    """All stages, in their order."""
    everywhere = (_end_to_end, _export_full_size, _full_size, _growth)
    makers = (_bundle, *everywhere) if plan.gpu else (_bundle, _export, *everywhere, _samplers, _int8)
    return tuple(make(plan) for make in makers)


def _bundle(plan: Plan) -> Stage:
    optimize = ("latentrt", "optimize", plan.bundle, "--target")
    if not plan.gpu:
        # fp32 stays as it is: laid out for the CPU a graph opens sooner and runs no faster.
        commands = (Command((*optimize, "cpu", "--precision", "int8")),)
        return Stage(name="bundle", about="int8 graphs of the shapes model for the CPU", commands=commands)
    build = ("latentrt", "build", plan.bundle, "--precision")
    sizes = (("--size", "128", "--batch", "1"), ("--size", ENGINE_SIZES, "--batch", ENGINE_BATCHES))
    engines = [Command((*build, "fp16", *size), may_fail=True) for size in sizes]
    engines.append(Command((*build, "int8", "--components", "unet", *sizes[0]), may_fail=True))
    return Stage(
        name="bundle",
        about="engines and graphs of the shapes model for this GPU",
        commands=(Command((*optimize, "cuda"), may_fail=True), *engines),
    )


def _export(plan: Plan) -> Stage:
    return Stage(
        name="export",
        about=f"export of the shapes model{_AGAINST}",
        commands=(_exported(plan, f"shapes={SHAPES}", "export"),),
        results=(plan.file("export"),),
    )


def _export_full_size(plan: Plan) -> Stage:
    bundle = f"{plan.models}/sd1/bundle"
    after = []
    if plan.gpu:
        after.append(Command(("latentrt", "optimize", bundle, "--target", "cuda"), may_fail=True))
        size = ("--size", str(plan.full_size), "--batch", "1")
        after.append(Command(("latentrt", "build", bundle, "--precision", "fp16", *size), may_fail=True))
    return Stage(
        name="export-full-size",
        about=f"export of Stable Diffusion 1.5, random weights{'' if plan.gpu else _AGAINST}",
        commands=(_exported(plan, "sd1=random", "export-full-size"), *after),
        results=(plan.file("export-full-size"),),
    )


def _exported(plan: Plan, checkpoint: str, stem: str) -> Command:
    options = ("--precision", "fp16", "--no-optimum") if plan.gpu else ("--venv", VENV)
    script = ("python", "benchmarks/scripts/bench_export.py", checkpoint, "--work", plan.models)
    return Command((*script, *options, "--json", plan.path(stem)))


def _end_to_end(plan: Plan) -> Stage:
    judge = ("--prompts", "shapes", "--quality", "8" if plan.quick else "64", "--judge", f"{SHAPES}/judge.py:shows")
    words = _bench(plan, plan.bundle, "--size", "128", "--steps", "20", *DRAWN, *judge)
    words += _systems(plan, "fp16,int8" if plan.gpu else "fp32,fp16,int8", "diffusers,torch-compile,optimum", "shapes")
    words += _length(plan, 5, "--seconds", "30")
    return Stage(
        name="end-to-end",
        about="the shapes model against the others: pictures, cold starts, memory, quality",
        commands=(Command((*words, *_reports(plan, "end-to-end"))),),
        results=(plan.file("end-to-end"), plan.file("end-to-end", "md")),
        needs=("bundle",) if plan.gpu else ("bundle", "export"),
    )


def _full_size(plan: Plan) -> Stage:
    drawn = ("--size", str(plan.full_size), "--steps", str(plan.full_steps), *DRAWN, "--quality", "0")
    precision = "fp16" if plan.gpu else "fp32"
    words = _bench(plan, f"{plan.models}/sd1/bundle", *drawn)
    # torch.compile takes minutes for networks of this size on a CPU.
    words += _systems(plan, precision, "diffusers,torch-compile" if plan.gpu else "diffusers,optimum", "sd1")
    usual = () if plan.gpu else ("--warm-up", "1", "--min-runs", "6", "--max-runs", "8", "--seconds", "90")
    words += _length(plan, 1, *usual)
    return Stage(
        name="full-size",
        about="Stable Diffusion 1.5 at full width, random weights",
        commands=(Command((*words, *_reports(plan, "full-size"))),),
        results=(plan.file("full-size"), plan.file("full-size", "md")),
        needs=("export-full-size",),
    )


def _growth(plan: Plan) -> Stage:
    varied = {
        "batch": ("--batch", BATCHES, "--size", "128", "--steps", "20"),
        "size": ("--size", SIZES, "--steps", "20"),
        "steps": ("--steps", STEPS, "--size", "128"),
    }
    commands = []
    for name, drawn in varied.items():
        words = _bench(plan, plan.bundle, *drawn, *DRAWN, "--prompts", "shapes", "--quality", "0")
        words += _systems(plan, "fp16" if plan.gpu else "fp32", "diffusers", "shapes")
        words += _length(plan, 0, "--min-runs", "6", "--max-runs", "12", "--seconds", "8")
        commands.append(Command((*words, "-o", plan.path(f"growth-{name}"))))
    return Stage(
        name="growth",
        about="the shapes model by batch, size and steps",
        commands=tuple(commands),
        results=tuple(plan.file(f"growth-{name}") for name in varied),
        needs=("bundle",),
    )


def _samplers(plan: Plan) -> Stage:
    repeats = ("--repeats", "1") if plan.quick else ()
    words = ("python", "benchmarks/scripts/bench_samplers.py", *repeats, "--json", plan.path("samplers"))
    about = "host time of a step against diffusers' schedulers"
    return Stage(name="samplers", about=about, commands=(Command(words),), results=(plan.file("samplers"),))


def _int8(plan: Plan) -> Stage:
    runs = ("--runs", "1") if plan.quick else ()
    script = ("python", "benchmarks/scripts/bench_int8_cpu.py", "--bundle", plan.bundle, *runs)
    return Stage(
        name="int8",
        about="int8 against fp32, a call of the U-Net on the CPU",
        commands=(Command((*script, "--json", plan.path("int8"))),),
        results=(plan.file("int8"),),
    )


def _bench(plan: Plan, bundle: str, *drawn: str) -> tuple[str, ...]:
    backend = "cuda,tensorrt" if plan.gpu else "onnxruntime"
    return ("latentrt", "bench", bundle, *drawn, "--backend", backend)


def _systems(plan: Plan, precision: str, against: str, model: str) -> tuple[str, ...]:
    rivals = [name for name in against.split(",") if not (plan.gpu and name == "optimum")]
    checkpoint = SHAPES if model == "shapes" else f"{plan.models}/{model}/checkpoint"
    words = ("--precision", precision, "--against", ",".join(rivals), "--checkpoint", checkpoint)
    if "optimum" not in rivals:
        return words
    return (*words, "--optimum-python", f"{VENV}/bin/python", "--optimum-model", f"{plan.models}/{model}/optimum")


def _reports(plan: Plan, stem: str) -> tuple[str, ...]:
    return ("-o", plan.path(stem), "--markdown", plan.path(stem, "md"), "--html", plan.path(stem, "html"))


def _length(plan: Plan, cold: int, *usual: str) -> tuple[str, ...]:
    """How long a `latentrt bench` takes; one run of each row to see that it starts."""
    runs = ("--warm-up", "1", "--min-runs", "1", "--max-runs", "1") if plan.quick else usual
    return (*runs, "--cold", str(min(cold, 1) if plan.quick else cold))
